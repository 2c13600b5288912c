/* The virtio-pci transport. */
#include "virtio.h"

enum { CFG_COMMON = 1, CFG_NOTIFY = 2, CFG_ISR = 3, CFG_DEVICE = 4 };
enum { STATUS_ACKNOWLEDGE = 1, STATUS_DRIVER = 2, STATUS_DRIVER_OK = 4, STATUS_FEATURES_OK = 8 };
#define VIRTIO_VENDOR 0x1af4
#define VIRTIO_MODERN 0x1040
#define RING_PACK 4096

static struct virtio_device devices[PCI_MAX_FUNCTIONS];
static u32 device_count;

static void capability_read(struct virtio_device *d, u8 at)
{
    struct pci_function *f = d->pci;
    u32 kind = pci_read(f->slot, at + 3u, 1), bar = pci_read(f->slot, at + 4u, 1);
    if (bar > 5 || !f->bars[bar].size)
        return;
    u64 address = f->bars[bar].address + pci_read(f->slot, at + 8u, 4);
    if (kind == CFG_COMMON && !d->common)
        d->common = address;
    else if (kind == CFG_ISR && !d->isr)
        d->isr = address;
    else if (kind == CFG_DEVICE && !d->device) {
        d->device = address;
        d->device_length = pci_read(f->slot, at + 12u, 4);
    } else if (kind == CFG_NOTIFY && !d->notify) {
        d->notify = address;
        d->notify_multiplier = pci_read(f->slot, at + 16u, 4);
    }
}

static void scan(void)
{
    pci_init();
    for (u32 i = 0; i < pci_count; i++) {
        struct pci_function *f = &pci_functions[i];
        if (f->vendor != VIRTIO_VENDOR || f->device < VIRTIO_MODERN)
            continue;
        struct virtio_device *d = &devices[device_count];
        *d = (struct virtio_device){.pci = f, .type = (u16)(f->device - VIRTIO_MODERN)};
        for (u8 at = pci_capability(f, PCI_CAP_VENDOR, 0); at; at = pci_capability(f, PCI_CAP_VENDOR, at))
            capability_read(d, at);
        if (!d->common || !d->notify)
            continue;
        pci_enable(f);
        d->queue_count = mmio_read16(d->common + COMMON_NUM_QUEUES);
        d->features = virtio_offered(d);
        device_count++;
    }
}

struct virtio_device *virtio_find(u16 type, u32 nth)
{
    static struct lock lock;
    static bool scanned;
    lock_take(&lock);
    if (!scanned)
        scan();
    scanned = true;
    lock_drop(&lock);
    for (u32 i = 0; i < device_count; i++)
        if (devices[i].type == type && !nth--)
            return &devices[i];
    return NULL;
}

u64 virtio_offered(const struct virtio_device *d)
{
    u64 features;
    mmio_write32(d->common + COMMON_DEVICE_FEATURE_SELECT, 1);
    features = (u64)mmio_read32(d->common + COMMON_DEVICE_FEATURE) << 32;
    mmio_write32(d->common + COMMON_DEVICE_FEATURE_SELECT, 0);
    return features | mmio_read32(d->common + COMMON_DEVICE_FEATURE);
}

static u8 status_get(const struct virtio_device *d) { return mmio_read8(d->common + COMMON_STATUS); }

static void status_add(const struct virtio_device *d, u8 bits)
{
    mmio_write8(d->common + COMMON_STATUS, status_get(d) | bits);
}

void virtio_negotiate(struct virtio_device *d, u64 wanted)
{
    mmio_write8(d->common + COMMON_STATUS, 0);
    for (u32 i = 0; status_get(d) != 0; i++)
        if (i == 1000000)
            die("virtio 00:%02x: reset does not finish", d->pci->slot >> 3);
    status_add(d, STATUS_ACKNOWLEDGE);
    status_add(d, STATUS_DRIVER);
    if (!(d->features & F_VERSION_1))
        die("virtio 00:%02x: VERSION_1 is not offered", d->pci->slot >> 3);
    d->features &= wanted | F_VERSION_1;
    for (u32 half = 0; half < 2; half++) {
        mmio_write32(d->common + COMMON_DRIVER_FEATURE_SELECT, half);
        mmio_write32(d->common + COMMON_DRIVER_FEATURE, (u32)(d->features >> 32 * half));
    }
    status_add(d, STATUS_FEATURES_OK);
    if (!(status_get(d) & STATUS_FEATURES_OK))
        die("virtio 00:%02x: features 0x%lx were refused", d->pci->slot >> 3, d->features);
    if (d->pci->msix_cap)
        pci_msix_enable(d->pci);
}

static void ring_allocate(struct virtqueue *q)
{
    q->desc = memory_alloc(sizeof(struct vring_desc) * q->size, RING_PACK);
    q->avail = memory_alloc(6 + 2ull * q->size, RING_PACK);
    q->used = memory_alloc(6 + 8ull * q->size, RING_PACK);
    q->cookies = memory_alloc(sizeof(void *) * q->size, 16);
    if (q->indirect)
        q->indirect_tables = memory_alloc(sizeof(struct vring_desc) * q->size * q->max_segments, RING_PACK);
    for (u16 i = 0; i < q->size; i++)
        q->desc[i].next = (u16)(i + 1);
    q->free_count = q->size;
}

static void interrupt_connect(struct virtqueue *q)
{
    struct virtio_device *d = q->device;
    u16 entry = (u16)(q->index < d->pci->msix_vectors ? q->index : d->pci->msix_vectors - 1);
    q->vector = irq_vector(q->cpu);
    pci_msix_set(d->pci, entry, q->cpu, q->vector, word_flag("irq_mask", false));
    mmio_write16(d->common + COMMON_QUEUE_VECTOR, entry);
    if (mmio_read16(d->common + COMMON_QUEUE_VECTOR) != entry)
        die("virtio 00:%02x: queue %u takes no MSI-X vector", d->pci->slot >> 3, q->index);
}

struct virtqueue *virtio_queue(struct virtio_device *d, u16 index, u32 max_segments, bool interrupts)
{
    struct virtqueue *q = memory_alloc(sizeof(*q), 64);
    mmio_write16(d->common + COMMON_QUEUE_SELECT, index);
    q->device = d;
    q->cpu = this_cpu();
    q->index = index;
    q->size = mmio_read16(d->common + COMMON_QUEUE_SIZE);
    if (!q->size)
        die("virtio 00:%02x: no queue %u", d->pci->slot >> 3, index);
    u16 limit = (u16)word_u64("ring", q->size);
    if (limit && limit < q->size && !(limit & (limit - 1))) {
        mmio_write16(d->common + COMMON_QUEUE_SIZE, limit);
        q->size = limit;
    }
    q->indirect = d->features & F_RING_INDIRECT_DESC;
    q->event_idx = d->features & F_RING_EVENT_IDX;
    q->max_segments = max_segments;
    q->lost_irq_ticks = (u32)word_u64("lost_irq_ticks", 2);
    ring_allocate(q);
    if (interrupts && d->pci->msix_cap)
        interrupt_connect(q);
    u64 addresses[3] = {(u64)q->desc, (u64)q->avail, (u64)q->used};
    for (u32 i = 0; i < 3; i++) {
        mmio_write32(d->common + COMMON_QUEUE_DESC + 8 * i, (u32)addresses[i]);
        mmio_write32(d->common + COMMON_QUEUE_DESC + 8 * i + 4, (u32)(addresses[i] >> 32));
    }
    q->notify_address =
        d->notify + (u64)mmio_read16(d->common + COMMON_QUEUE_NOTIFY_OFF) * d->notify_multiplier;
    if (!q->vector)
        q->avail[0] = 1; /* VIRTQ_AVAIL_F_NO_INTERRUPT */
    mmio_write16(d->common + COMMON_QUEUE_ENABLE, 1);
    return q;
}

void virtio_start(struct virtio_device *d)
{
    status_add(d, STATUS_DRIVER_OK);
    if (status_get(d) != (STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK))
        die("virtio 00:%02x: status 0x%02x after DRIVER_OK", d->pci->slot >> 3, status_get(d));
}

u32 virtio_config_read(const struct virtio_device *d, u32 offset, u32 size)
{
    u64 at = d->device + offset;
    return size == 1 ? mmio_read8(at) : size == 2 ? mmio_read16(at) : mmio_read32(at);
}
