/* Port and MMIO exits whose every loss or repetition shows.
 *
 * A doubled or dropped register write shows in what is read back; a doubled read of the UART's receive buffer eats
 * a byte of the loopback stream; a doubled or dropped transmit shows in the numbered `seq` lines on COM1. */
#include "virtio.h"

enum { UART_IIR = COM1 + 2, UART_MCR = COM1 + 4, UART_LSR = COM1 + 5, UART_SCRATCH = COM1 + 7 };
#define MCR_LOOP 0x10
#define MCR_NORMAL 0x08
#define LSR_DATA_READY 1
#define LOOP_BYTES 8
#define STRING_ITEMS 64

struct exits {
    struct virtio_device *device; /* one that no task drives: its registers are ours */
    u16 slots[PCI_MAX_FUNCTIONS];
    u32 slot_count;
    u32 ids[PCI_MAX_FUNCTIONS];
    u64 ok, seq, random;
    u32 timer_last;
    u64 seq_every;
    bool open, timer, string, loop, cf8, ecam, sse, uart;
    u32 next_check;
};

#define EXPECT(what, got, want)                                                                              \
    do {                                                                                                     \
        u64 got_ = (got), want_ = (want);                                                                    \
        if (got_ != want_)                                                                                   \
            bad("exits BAD %s got=0x%lx want=0x%lx after=%lu", what, got_, want_, e->ok);                    \
    } while (0)

static void check_scratch(struct exits *e)
{
    if (!e->uart)
        return;
    lock_take(&uart_lock);
    for (u32 i = 0; i < 8; i++) {
        u8 value = (u8)random64(&e->random);
        out8(UART_SCRATCH, value);
        u8 got = in8(UART_SCRATCH);
        if (got != value) {
            lock_drop(&uart_lock);
            EXPECT("scratch", got, value);
            lock_take(&uart_lock);
        }
    }
    lock_drop(&uart_lock);
}

/* In loopback what is sent is received: n writes, n reads, in order, then nothing. */
static void check_loopback(struct exits *e)
{
    u8 sent[LOOP_BYTES], got[LOOP_BYTES];
    u32 received = 0;
    bool more;
    if (!e->loop)
        return;
    lock_take(&uart_lock);
    out8(UART_MCR, MCR_LOOP | MCR_NORMAL);
    for (u32 i = 0; i < LOOP_BYTES; i++) {
        sent[i] = (u8)(e->seq + e->ok + i);
        out8(COM1, sent[i]);
        if (in8(UART_LSR) & LSR_DATA_READY)
            got[received++] = in8(COM1);
    }
    more = in8(UART_LSR) & LSR_DATA_READY;
    out8(UART_MCR, MCR_NORMAL);
    in8(UART_IIR);
    lock_drop(&uart_lock);
    EXPECT("loopback-count", received, LOOP_BYTES);
    EXPECT("loopback-rest", more, 0);
    for (u32 i = 0; i < received; i++)
        EXPECT("loopback-byte", got[i], sent[i]);
}

static void check_timer(struct exits *e)
{
    if (!e->timer)
        return;
    u32 mask = acpi.pm_timer_32bit ? 0xffffffff : 0xffffff;
    for (u32 i = 0; i < 4; i++) {
        u32 now = in32(acpi.pm_timer);
        if (((now - e->timer_last) & mask) > mask / 2)
            bad("exits BAD pm-timer got=0x%x last=0x%x after=%lu", now, e->timer_last, e->ok);
        e->timer_last = now;
    }
}

static void check_cf8(struct exits *e)
{
    if (!e->cf8)
        return;
    for (u32 i = 0; i < 8; i++) {
        u32 value = 0x80000000u | (u32)(random64(&e->random) & 0xfffc);
        lock_take(&pci_lock);
        out32(CF8, value);
        u32 got = in32(CF8);
        lock_drop(&pci_lock);
        EXPECT("cf8-latch", got, value);
    }
}

static void check_config(struct exits *e)
{
    if (!e->slot_count)
        return;
    u32 i = (u32)(random64(&e->random) % e->slot_count);
    u16 slot = e->slots[i];
    if (e->cf8) {
        EXPECT("cfc-read32", cf8_read(slot, PCI_VENDOR, 4), e->ids[i]);
        EXPECT("cfc-read16", cf8_read(slot, PCI_VENDOR + 2, 2), e->ids[i] >> 16);
        EXPECT("cfc-read8", cf8_read(slot, PCI_VENDOR + 1, 1), e->ids[i] >> 8 & 0xff);
    }
    if (e->ecam) {
        EXPECT("ecam-read32", ecam_read(slot, PCI_VENDOR, 4), e->ids[i]);
        EXPECT("ecam-read16", ecam_read(slot, PCI_VENDOR, 2), e->ids[i] & 0xffff);
        EXPECT("ecam-read8", ecam_read(slot, PCI_VENDOR + 3, 1), e->ids[i] >> 24);
    }
}

static void check_config_write(struct exits *e)
{
    if (!e->device)
        return;
    u16 slot = e->device->pci->slot;
    u8 value = (u8)random64(&e->random);
    if (e->cf8) {
        cf8_write(slot, PCI_INTERRUPT_LINE, 1, value);
        EXPECT("cfc-write8", cf8_read(slot, PCI_INTERRUPT_LINE, 1), value);
    }
    if (e->ecam) {
        EXPECT("ecam-after-cfc", e->cf8 ? ecam_read(slot, PCI_INTERRUPT_LINE, 1) : value, value);
        ecam_write(slot, PCI_INTERRUPT_LINE, 1, (u8)~value);
        EXPECT("ecam-write8", ecam_read(slot, PCI_INTERRUPT_LINE, 1), (u8)~value);
    }
}

static void check_common(struct exits *e)
{
    if (!e->device)
        return;
    u64 common = e->device->common;
    u32 value = (u32)random64(&e->random) & 1;
    mmio_write32(common + COMMON_DEVICE_FEATURE_SELECT, value);
    mmio_write32(common + COMMON_DRIVER_FEATURE_SELECT, !value);
    EXPECT("device-feature-select", mmio_read32(common + COMMON_DEVICE_FEATURE_SELECT), value);
    EXPECT("driver-feature-select", mmio_read32(common + COMMON_DRIVER_FEATURE_SELECT), !value);
    EXPECT("device-feature", mmio_read32(common + COMMON_DEVICE_FEATURE),
           e->device->features >> 32 * value & 0xffffffff);
    u16 queue = (u16)(random64(&e->random) % e->device->queue_count);
    mmio_write16(common + COMMON_QUEUE_SELECT, queue);
    EXPECT("queue-select", mmio_read16(common + COMMON_QUEUE_SELECT), queue);
}

/* A masked MSI-X entry is 16 bytes of memory: 4- and 8-byte accesses, and one of 16 that KVM cuts in two. */
static void check_msix(struct exits *e)
{
    if (!e->device || !e->device->pci->msix_table)
        return;
    u64 entry = e->device->pci->msix_table;
    u64 address = random64(&e->random) & 0xfffffffffffffffcul, low, high;
    u32 data = (u32)random64(&e->random);
    mmio_write32(entry + 12, 1);
    mmio_write32(entry, (u32)address);
    mmio_write32(entry + 4, (u32)(address >> 32));
    mmio_write32(entry + 8, data);
    EXPECT("msix-read64", mmio_read64(entry), address);
    mmio_write64(entry, ~address & -4ul);
    EXPECT("msix-write64", mmio_read32(entry) | (u64)mmio_read32(entry + 4) << 32, ~address & -4ul);
    if (!e->sse)
        return;
    __asm__ volatile("movdqu (%2), %%xmm0\n\tmovq %%xmm0, %0\n\tpsrldq $8, %%xmm0\n\tmovq %%xmm0, %1"
                     : "=r"(low), "=r"(high)
                     : "r"(entry)
                     : "xmm0", "memory");
    EXPECT("msix-read128-low", low, ~address & -4ul);
    EXPECT("msix-read128-high", high, data | 1ul << 32);
}

/* INS reads the port into memory once per item: a repeated or cut exit breaks the count or the guard bytes. */
static void check_string(struct exits *e)
{
    u8 buffer[STRING_ITEMS + 16];
    u8 *to = buffer + 8;
    u64 count = STRING_ITEMS;
    if (!e->string || !e->uart)
        return;
    u8 value = (u8)random64(&e->random);
    memset(buffer, (u8)~value, sizeof(buffer));
    lock_take(&uart_lock);
    out8(UART_SCRATCH, value);
    __asm__ volatile("rep insb" : "+D"(to), "+c"(count) : "d"(UART_SCRATCH) : "memory");
    lock_drop(&uart_lock);
    EXPECT("ins-left", count, 0);
    EXPECT("ins-end", (u64)to, (u64)(buffer + 8 + STRING_ITEMS));
    for (u32 i = 0; i < sizeof(buffer); i++)
        EXPECT("ins-byte", buffer[i], i >= 8 && i < 8 + STRING_ITEMS ? value : (u8)~value);
}

/* Numbered lines; the second number is a function of the first, so a damaged line is told from a lost one. Every
 * other line is one OUTS. */
static void print_seq(struct exits *e)
{
    struct cpu *cpu = this_cpu();
    if (!e->seq_every || e->ok % e->seq_every)
        return;
    line_add("seq %08lx %04lx", e->seq, mix64(e->seq) & 0xffff);
    e->seq++;
    if (!e->string || e->seq & 1) {
        line_end();
        return;
    }
    const char *text = cpu->line;
    u64 count = cpu->line_length;
    lock_take(&uart_lock);
    __asm__ volatile("rep outsb" : "+S"(text), "+c"(count) : "d"(COM1) : "memory");
    uart_put('\n');
    lock_drop(&uart_lock);
    cpu->line_length = 0;
    EXPECT("outs-left", count, 0);
}

static void (*const checks[])(struct exits *) = {
    check_scratch, check_loopback, check_timer, check_cf8,    check_config, check_config_write,
    check_common,  check_msix,     check_string, print_seq,
};

static struct virtio_device *device_unused(void)
{
    for (u16 type = 63; type; type--) {
        struct virtio_device *d;
        for (u32 n = 0; (d = virtio_find(type, n)); n++)
            if (pci_claim(d->pci))
                return d;
    }
    return NULL;
}

/* At the first step, not at the start: by then the other tasks have claimed the devices that they drive. */
static void open(struct task *task, struct exits *e)
{
    e->random = word_u64("seed", 1) + task->cpu->index;
    virtio_find(0, 0); /* whatever the words: the functions are known after this */
    e->device = word_flag("mmio", true) ? device_unused() : NULL;
    if (e->device && e->device->pci->msix_cap)
        pci_msix_enable(e->device->pci);
    e->open = true;
    e->slot_count = pci_count;
    for (u32 i = 0; i < pci_count; i++) {
        e->slots[i] = pci_functions[i].slot;
        e->ids[i] = pci_functions[i].vendor | (u32)pci_functions[i].device << 16;
    }
    e->cf8 = pci_has_cf8 && word_flag("cf8", true);
    e->ecam = pci_has_ecam && word_flag("ecam", true);
    e->timer = acpi.pm_timer && word_flag("pmtimer", true);
    e->uart = word_flag("uart", true);
    e->loop = e->uart && word_flag("loop", true);
    e->string = word_flag("string", true);
    e->sse = word_flag("sse", true);
    e->seq_every = word_u64("seq_every", 16);
    if (e->timer)
        e->timer_last = in32(acpi.pm_timer);
    say("exits open slot=%u cf8=%u ecam=%u pmtimer=%u string=%u", e->device ? e->device->pci->slot >> 3 : 0,
        e->cf8, e->ecam, e->timer, e->string);
}

static void start(struct task *task) { task->state = memory_alloc(sizeof(struct exits), 64); }

static enum progress step(struct task *task)
{
    struct exits *e = task->state;
    if (!e->open)
        open(task, e);
    checks[e->next_check](e);
    if (++e->next_check < ARRAY_SIZE(checks))
        return BUSY;
    e->next_check = 0;
    e->ok++;
    bool last = task->passes && e->ok >= task->passes;
    if (last || report_due(task))
        say("exits ok %lu seq=%lu ns=%lu", e->ok, e->seq, now_ns());
    return last ? DONE : BUSY;
}

const struct mode mode_exits = {"exits", start, step};
