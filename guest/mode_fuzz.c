/* `fuzz`: programs every device at random, as a hostile driver would: configuration space, BARs, MSI-X, virtio
 * registers, ring contents, notifications, ports.
 *
 * It wants to live through it, to see what the VMM makes of step 100,000: what the devices may write by DMA is kept to
 * an arena of its own, MSI messages to vectors that have a handler, and what ends the VM by request (S5, resets) is left
 * out. No answer is judged. That the VMM lives, and that only what was abused is worse for it, is for the host to see. */
#include "virtio.h"

#define ARENA_SIZE 0x200000u
#define DATA_AT 0x100000u /* rings below, buffers above; descriptors point to either */
#define RING_STRIDE 0x8000u
#define LONGEST 0x10000u
#define MAX_DEVICES 16
#define FIRST_VECTOR 0x30u
#define COMMAND_ON (PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_OFF)

struct fuzz {
    u64 random, steps, arena;
    struct virtio_device *devices[MAX_DEVICES];
    u32 count;
    u64 regions[4]; /* registers at fixed addresses: IOAPIC, GED, hotplug of PCI and CPUs; 0: none */
    bool open;
};

static u32 below(struct fuzz *f, u32 limit) { return (u32)(random64(&f->random) >> 20) % limit; }

static u64 number(struct fuzz *f)
{
    static const u64 edges[] = {0, 1, 2, 0x7f, 0x80, 0xff, 0xffff, 0x10000, 0x7fffffff, 0xffffffff, ~0ul};
    return below(f, 3) ? edges[below(f, ARRAY_SIZE(edges))] : random64(&f->random) >> below(f, 64);
}

/* In the arena and far from its end, or nowhere near RAM. */
static u64 dma_address(struct fuzz *f)
{
    if (!below(f, 12))
        return 1ul << (40 + below(f, 23)) | number(f) >> 32;
    u64 address = f->arena + below(f, ARENA_SIZE - LONGEST);
    return below(f, 4) ? address & -64ul : address;
}

static u32 dma_length(struct fuzz *f)
{
    static const u32 lengths[] = {0, 1, 10, 12, 16, 512, 1024, 4096, 8192, LONGEST};
    return below(f, 20) ? lengths[below(f, ARRAY_SIZE(lengths))] : 0xffffffffu - below(f, 64);
}

static void access(struct fuzz *f, u64 address, u32 size, bool write, u64 value)
{
    (void)f;
    switch (size | (u32)write << 8) {
    case 1: mmio_read8(address); break;
    case 2: mmio_read16(address); break;
    case 4: mmio_read32(address); break;
    case 8: mmio_read64(address); break;
    case 1 | 256: mmio_write8(address, (u8)value); break;
    case 2 | 256: mmio_write16(address, (u16)value); break;
    case 4 | 256: mmio_write32(address, (u32)value); break;
    default: mmio_write64(address, value);
    }
}

/* ---- registers ------------------------------------------------------------------------------------------ */

static void step_config(struct fuzz *f, struct virtio_device *d)
{
    u16 slot = below(f, 8) ? d->pci->slot : (u16)below(f, 256);
    u32 size = 1u << below(f, 3), reg = below(f, 2) ? below(f, 0xc0) : below(f, 0x1000);
    bool ports = below(f, 2), write = below(f, 2);
    reg &= ~(size - 1) & (ports ? 0xff : 0xfff);
    if (ports && write)
        cf8_write(slot, (u16)reg, size, (u32)number(f));
    else if (ports)
        cf8_read(slot, (u16)reg, size);
    else if (write)
        ecam_write(slot, (u16)reg, size, (u32)number(f));
    else
        ecam_read(slot, (u16)reg, size);
}

/* So that the function answers again: its BAR where it was, decoding on. */
static void step_restore(struct fuzz *f, struct virtio_device *d)
{
    struct pci_function *p = d->pci;
    (void)f;
    for (u32 i = 0; i < 6; i++) {
        if (!p->bars[i].size || p->bars[i].io)
            continue;
        pci_write(p->slot, (u16)(PCI_BAR0 + 4 * i), 4, (u32)p->bars[i].address);
        if (p->bars[i].wide)
            pci_write(p->slot, (u16)(PCI_BAR0 + 4 * i + 4), 4, (u32)(p->bars[i].address >> 32));
        i += p->bars[i].wide;
    }
    pci_write(p->slot, PCI_COMMAND, 2, COMMAND_ON);
}

static u64 message_data(struct fuzz *f) { return FIRST_VECTOR + below(f, 64); }

static void step_bar(struct fuzz *f, struct virtio_device *d)
{
    const u64 places[] = {d->common, d->common, d->common, d->isr, d->device, d->notify, d->pci->msix_table,
                          d->pci->msix_table, d->pci->bars[0].address};
    u64 place = places[below(f, ARRAY_SIZE(places))], bar = d->pci->bars[0].address, value = number(f);
    u32 size = 1u << below(f, 4);
    if (!place)
        return;
    u64 at = place + below(f, place == bar ? (u32)d->pci->bars[0].size - 8 : 0x40), table = d->pci->msix_table;
    if (below(f, 8))
        at &= -(u64)size;
    if (at >= d->common + COMMON_QUEUE_DESC - 7 && at < d->common + 0x40)
        value = dma_address(f);
    if (table && at >= table - 7 && at < table + 16u * d->pci->msix_vectors) {
        at &= -4ul;
        size = 4;
        value = (at & 12) == 8 ? message_data(f) : (at & 12) == 12 ? below(f, 2) : (at & 12) ? 0 : msi_address(this_cpu());
    }
    access(f, at, size, below(f, 3), value);
}

static void step_ports(struct fuzz *f)
{
    static const u16 ports[] = {0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x61, 0x64, 0x70, 0x71, 0x80, 0x402,
                                0x601, 0x602, 0x603, 0x608, 0x60a, 0xcf8, 0xcfa, 0xe9, 0x92, 0xcf9, 0x1234};
    u16 port = ports[below(f, ARRAY_SIZE(ports))];
    u32 size = 1u << below(f, 3);
    u64 value = number(f);
    lock_take(&uart_lock);
    if (below(f, 2)) {
        (void)(size == 1 ? in8(port) : size == 2 ? in16(port) : in32(port));
    } else {
        /* Left out: 0x64 with 0xfe and CMOS register 0x8f with 0 reset, 0x601… with 1 and 0x34 reset and power off. */
        if (port == 0x64 || port == 0x70)
            value &= 0x7f;
        if ((port & ~3) == 0x600 && ((value & 0xff) == 1 || (value & 0xff) == 0x34))
            value = 0x21;
        size == 1 ? out8(port, (u8)value) : size == 2 ? out16(port, (u16)value) : out32(port, (u32)value);
    }
    out8(COM1 + 3, 3); /* lines can be printed again: 8 bits, no loop, no interrupts */
    out8(COM1 + 4, 8);
    out8(COM1 + 1, 0);
    lock_drop(&uart_lock);
}

static void step_fixed(struct fuzz *f)
{
    u64 at = f->regions[below(f, ARRAY_SIZE(f->regions))];
    u32 offset = below(f, 32), size = 1u << below(f, 4);
    if (!at)
        return;
    if (at == f->regions[0] && below(f, 2)) { /* the IOAPIC's window: a whole entry, or nothing that fires */
        mmio_write32(at, 0x10 + below(f, 48));
        mmio_write32(at + 0x10, (u32)(message_data(f) | (below(f, 2) ? 0x10000 : 0) | (below(f, 2) ? 0x8000 : 0)));
        return;
    }
    access(f, at + offset, size, at != f->regions[0] && below(f, 2), number(f));
}

/* ---- rings ---------------------------------------------------------------------------------------------- */

static u64 ring_of(struct fuzz *f, struct virtio_device *d, u32 queue)
{
    u32 n = (u32)(d->pci->slot >> 3) * 4 + queue;
    return f->arena + n % (DATA_AT / RING_STRIDE) * RING_STRIDE;
}

static void ring_addresses(struct fuzz *f, struct virtio_device *d, u32 queue)
{
    u64 base = ring_of(f, d, queue);
    u64 addresses[3] = {base, base + 0x2000, base + 0x4000};
    for (u32 i = 0; i < 3; i++) {
        u64 address = below(f, 16) ? addresses[i] : dma_address(f);
        mmio_write32(d->common + COMMON_QUEUE_DESC + 8 * i, (u32)address);
        mmio_write32(d->common + COMMON_QUEUE_DESC + 8 * i + 4, (u32)(address >> 32));
    }
}

/* From reset to DRIVER_OK, each part of it now and then wrong. */
static void step_activate(struct fuzz *f, struct virtio_device *d)
{
    u64 features = below(f, 4) ? d->features : d->features & random64(&f->random);
    step_restore(f, d);
    mmio_write8(d->common + COMMON_STATUS, 0);
    mmio_write8(d->common + COMMON_STATUS, 3);
    for (u32 half = 0; half < 2; half++) {
        mmio_write32(d->common + COMMON_DRIVER_FEATURE_SELECT, half);
        mmio_write32(d->common + COMMON_DRIVER_FEATURE, (u32)((features | F_VERSION_1) >> 32 * half));
    }
    mmio_write8(d->common + COMMON_STATUS, 11);
    if (d->pci->msix_cap && below(f, 2))
        pci_msix_enable(d->pci);
    for (u16 queue = 0; queue < d->queue_count; queue++) {
        memset((void *)ring_of(f, d, queue), 0, 0x6000);
        mmio_write16(d->common + COMMON_QUEUE_SELECT, queue);
        if (!below(f, 4))
            mmio_write16(d->common + COMMON_QUEUE_SIZE, (u16)(below(f, 2) ? 1u << below(f, 17) : number(f)));
        ring_addresses(f, d, queue);
        mmio_write16(d->common + COMMON_QUEUE_VECTOR, (u16)(below(f, 4) ? queue : number(f)));
        if (below(f, 8))
            mmio_write16(d->common + COMMON_QUEUE_ENABLE, 1);
    }
    mmio_write8(d->common + COMMON_STATUS, 15);
}

static void random_desc(struct fuzz *f, volatile struct vring_desc *desc)
{
    desc->address = dma_address(f);
    desc->length = dma_length(f);
    desc->flags = (u16)(below(f, 8) ? below(f, 8) : number(f));
    desc->next = (u16)(below(f, 8) ? below(f, 16) : number(f));
}

/* A chain that this kind of device takes for a request, most of the time. */
static void good_chain(struct fuzz *f, struct virtio_device *d, volatile struct vring_desc *desc, u32 head)
{
    u64 data = f->arena + DATA_AT + below(f, ARENA_SIZE - DATA_AT - LONGEST - 64);
    volatile u32 *header = (volatile u32 *)(data & -64ul);
    bool request = d->type == VIRTIO_BLOCK || d->type == VIRTIO_NET;
    u32 writes = d->type == VIRTIO_RNG || below(f, 2);
    for (u32 i = 0; i < 4; i++)
        header[i] = (u32)(below(f, 3) ? below(f, 16) : number(f));
    header[2] = below(f, 0x8010); /* a sector, or part of a vnet header */
    header[3] = below(f, 20) ? 0 : (u32)number(f);
    desc[head % 16] = (struct vring_desc){(u64)header, 16, request ? 1 : (u16)(2 * writes), (u16)((head + 1) % 16)};
    desc[(head + 1) % 16] = (struct vring_desc){data, 512u * below(f, 9), (u16)(1 + 2 * writes), (u16)((head + 2) % 16)};
    desc[(head + 2) % 16] = (struct vring_desc){data + LONGEST - 1, 1, 2, 0};
}

static void step_ring(struct fuzz *f, struct virtio_device *d)
{
    u32 queue = below(f, d->queue_count ? d->queue_count : 1);
    u64 base = ring_of(f, d, queue);
    volatile struct vring_desc *desc = (volatile struct vring_desc *)base;
    volatile u16 *avail = (volatile u16 *)(base + 0x2000);
    for (u32 n = 1 + below(f, 8); n; n--) {
        u32 head = below(f, 16);
        if (below(f, 4))
            good_chain(f, d, desc, head);
        else
            random_desc(f, &desc[below(f, 16)]);
        if (!below(f, 8))
            random_desc(f, (volatile struct vring_desc *)(f->arena + DATA_AT + 16u * below(f, 4096)));
        avail[2 + avail[1] % 256] = (u16)(below(f, 16) ? head : number(f));
        compiler_barrier();
        avail[1] = (u16)(below(f, 40) ? avail[1] + 1u : number(f));
    }
    avail[0] = (u16)(below(f, 8) ? 0 : number(f));
    mmio_write16(d->notify + (u64)d->notify_multiplier * (below(f, 16) ? queue : below(f, 64)), (u16)queue);
}

static void step_one(struct fuzz *f)
{
    struct virtio_device *d = f->devices[below(f, f->count)];
    switch (below(f, 16)) {
    case 0: step_activate(f, d); break;
    case 1 ... 5: step_ring(f, d); break;
    case 6 ... 8: step_bar(f, d); break;
    case 9: case 10: step_config(f, d); break;
    case 11: case 12: step_ports(f); break;
    case 13: step_fixed(f); break;
    default: step_restore(f, d);
    }
}

/* ---- the task ------------------------------------------------------------------------------------------- */

static void open(struct task *task, struct fuzz *f)
{
    f->random = word_u64("seed", 1) + task->cpu->index;
    f->arena = memory_claim(ARENA_SIZE);
    if (!f->arena)
        die("fuzz: no memory");
    for (u16 type = 1; type < 64; type++)
        for (u32 n = 0; virtio_find(type, n) && f->count < MAX_DEVICES; n++)
            f->devices[f->count++] = virtio_find(type, n);
    if (!f->count)
        die("fuzz: no virtio device");
    f->regions[0] = acpi.ioapic;
    f->regions[1] = word_u64("ged", 0);
    f->regions[2] = word_u64("phpr", 0);
    f->regions[3] = word_u64("pres", 0);
    for (u32 i = 1; i < ARRAY_SIZE(f->regions); i++)
        if (f->regions[i])
            memory_map_range(f->regions[i], 4096, true);
    f->open = true;
    say("fuzz open seed=%lu devices=%u arena=0x%lx", word_u64("seed", 1), f->count, f->arena);
}

static void start(struct task *task) { task->state = memory_alloc(sizeof(struct fuzz), 64); }

static enum progress step(struct task *task)
{
    struct fuzz *f = task->state;
    if (!f->open)
        open(task, f);
    for (u32 n = 0; n < 16; n++) {
        step_one(f);
        f->steps++;
    }
    bool last = task->passes && f->steps >= task->passes;
    if (last)
        for (u32 i = 0; i < f->count; i++) {
            step_restore(f, f->devices[i]);
            mmio_write8(f->devices[i]->common + COMMON_STATUS, 0);
        }
    if (last || report_due(task))
        say("fuzz ok %lu irqs=%u", f->steps, task->cpu->irq_total);
    return last ? DONE : BUSY;
}

const struct mode mode_fuzz = {"fuzz", start, step};
