/* Boot information, the bump allocator, and page tables above 4 GiB. */
#include "probe.h"

#define PAGE_TABLE 0x67
#define PAGE_2M 0xe7
#define PAGE_DEVICE 0x18 /* PCD PWT */
#define SIZE_2M 0x200000ull
#define SIZE_4G 0x100000000ull
#define RAM_TYPE 1

/* xen/include/public/arch-x86/hvm/start_info.h */
struct hvm_start_info {
    u32 magic, version, flags, nr_modules;
    u64 modlist, cmdline, rsdp, memmap;
    u32 memmap_entries, reserved;
};
struct hvm_module {
    u64 address, size, cmdline, reserved;
};
#define START_MAGIC 0x336ec578

extern u64 start_info_address;
extern u64 pml4[];
extern u8 image_end[];

struct memory_range memory_map[64];
u32 memory_map_count;
char command_line[4096];
u64 rsdp_address;

/* What allocations may still take of each RAM range; the top is lowered below modules (the initramfs). */
static struct {
    u64 next, end;
} free_ranges[64];
static u32 free_count;
static struct lock range_lock, table_lock;

void boot_info_read(void)
{
    const struct hvm_start_info *info = (const void *)start_info_address;
    const struct memory_range *map;
    if (info->magic != START_MAGIC || info->version < 1)
        die("no PVH start info with a memory map at 0x%lx", start_info_address);
    map = (const void *)info->memmap;
    for (u32 i = 0; i < info->memmap_entries && i < ARRAY_SIZE(memory_map); i++)
        memory_map[memory_map_count++] = map[i];
    rsdp_address = info->rsdp;
    if (info->cmdline) {
        const char *text = (const char *)info->cmdline;
        for (u32 i = 0; i + 1 < sizeof(command_line) && text[i]; i++)
            command_line[i] = text[i];
    }
}

void memory_init(void)
{
    const struct hvm_start_info *info = (const void *)start_info_address;
    const struct hvm_module *modules = (const void *)info->modlist;
    u64 lowest = ((u64)image_end + SIZE_2M - 1) & -SIZE_2M;
    for (u32 i = 0; i < memory_map_count; i++) {
        u64 start = memory_map[i].address, end = start + memory_map[i].size;
        if (memory_map[i].type != RAM_TYPE || end <= lowest)
            continue;
        if (start < lowest)
            start = lowest;
        for (u32 m = 0; m < info->nr_modules; m++)
            if (modules[m].address >= start && modules[m].address < end)
                end = modules[m].address;
        free_ranges[free_count].next = start;
        free_ranges[free_count++].end = end & -4096ull;
    }
}

void *memory_alloc(u64 size, u64 align)
{
    if (align < 16)
        align = 16;
    lock_take(&range_lock);
    for (u32 i = 0; i < free_count; i++) {
        u64 start = (free_ranges[i].next + align - 1) & -align;
        if (start + size > free_ranges[i].end || start + size > SIZE_4G)
            continue;
        free_ranges[i].next = start + size;
        lock_drop(&range_lock);
        return memset((void *)start, 0, size);
    }
    lock_drop(&range_lock);
    die("out of memory below 4 GiB: %lu bytes", size);
}

/* Taken from the top of the range with the most room, so that the bottom stays for memory_alloc(). */
u64 memory_claim(u64 size)
{
    u32 best = 0;
    size = (size + SIZE_2M - 1) & -SIZE_2M;
    lock_take(&range_lock);
    for (u32 i = 1; i < free_count; i++)
        if (free_ranges[i].end - free_ranges[i].next > free_ranges[best].end - free_ranges[best].next)
            best = i;
    u64 start = free_ranges[best].end - size;
    start &= -SIZE_2M;
    bool fits = free_count && size <= free_ranges[best].end && start >= free_ranges[best].next;
    if (fits)
        free_ranges[best].end = start;
    lock_drop(&range_lock);
    if (!fits)
        return 0;
    memory_map_range(start, size, false);
    return start;
}

static u64 *table_entry(u64 *table, u64 index)
{
    if (!(table[index] & 1))
        table[index] = (u64)memory_alloc(4096, 4096) | PAGE_TABLE;
    return (u64 *)(table[index] & 0x000ffffffffff000ull);
}

/* Entries only ever go from absent to present, which needs no TLB flush. */
void memory_map_range(u64 address, u64 size, bool device)
{
    u64 end = address + size;
    if (end <= SIZE_4G)
        return;
    if (end > 1ull << 47)
        die("0x%lx is above the lower half", address);
    lock_take(&table_lock);
    for (address &= -SIZE_2M; address < end; address += SIZE_2M) {
        u64 *pdpt = table_entry(pml4, address >> 39 & 511);
        u64 *pd = table_entry(pdpt, address >> 30 & 511);
        u64 *entry = &pd[address >> 21 & 511];
        if (!(*entry & 1))
            *entry = address | PAGE_2M | (device ? PAGE_DEVICE : 0);
    }
    lock_drop(&table_lock);
}
