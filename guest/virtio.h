/* virtio 1.0 over PCI: transport and split virtqueues. Virtio 1.2 §2.7, §4.1. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "pci.h"

enum { VIRTIO_NET = 1, VIRTIO_BLOCK = 2, VIRTIO_CONSOLE = 3, VIRTIO_RNG = 4 };

#define F_RING_INDIRECT_DESC (1ull << 28)
#define F_RING_EVENT_IDX (1ull << 29)
#define F_VERSION_1 (1ull << 32)

enum { /* common configuration, §4.1.4.3 */
    COMMON_DEVICE_FEATURE_SELECT = 0x00,
    COMMON_DEVICE_FEATURE = 0x04,
    COMMON_DRIVER_FEATURE_SELECT = 0x08,
    COMMON_DRIVER_FEATURE = 0x0c,
    COMMON_MSIX_CONFIG = 0x10,
    COMMON_NUM_QUEUES = 0x12,
    COMMON_STATUS = 0x14,
    COMMON_GENERATION = 0x15,
    COMMON_QUEUE_SELECT = 0x16,
    COMMON_QUEUE_SIZE = 0x18,
    COMMON_QUEUE_VECTOR = 0x1a,
    COMMON_QUEUE_ENABLE = 0x1c,
    COMMON_QUEUE_NOTIFY_OFF = 0x1e,
    COMMON_QUEUE_DESC = 0x20,
    COMMON_QUEUE_DRIVER = 0x28,
    COMMON_QUEUE_DEVICE = 0x30,
};

struct vring_desc {
    u64 address;
    u32 length;
    u16 flags, next;
};
struct vring_used_elem {
    u32 id, length;
};

struct segment {
    void *data;
    u32 length;
};

struct virtio_device {
    struct pci_function *pci;
    u16 type;
    u16 queue_count;
    u64 features; /* offered until virtio_start(), then negotiated */
    u64 common, device, notify, isr;
    u32 notify_multiplier;
    u32 device_length;
};

struct virtqueue {
    struct virtio_device *device;
    struct cpu *cpu; /* whose LAPIC gets the interrupt */
    u16 index, size;
    u8 vector; /* 0 = polled */
    bool indirect, event_idx;
    volatile struct vring_desc *desc;
    volatile u16 *avail; /* flags, idx, ring[size], used_event */
    volatile u16 *used;  /* flags, idx, then ring[size], avail_event */
    u16 avail_index, last_used, free_head, free_count;
    u16 kicked_index;
    void **cookies; /* by descriptor head; NULL = not in flight */
    struct vring_desc *indirect_tables;
    u32 max_segments;
    u64 notify_address;
    u64 kicks, completions;
    /* The lost-interrupt watch of virtqueue.c. */
    bool armed, watching;
    u32 armed_irqs, watch_ticks, lost_irq_ticks;
};

struct virtio_device *virtio_find(u16 type, u32 nth); /* NULL when there is none */
u64 virtio_offered(const struct virtio_device *device);
/* Reset to FEATURES_OK with `wanted` of the offered features (and VERSION_1). */
void virtio_negotiate(struct virtio_device *device, u64 wanted);
struct virtqueue *virtio_queue(struct virtio_device *device, u16 index, u32 max_segments, bool interrupts);
void virtio_start(struct virtio_device *device); /* DRIVER_OK */
u32 virtio_config_read(const struct virtio_device *device, u32 offset, u32 size);

/* `out` segments the device reads, then `in` segments it writes. False when the ring is full. */
bool virtqueue_add(struct virtqueue *queue, const struct segment *segments, u32 out, u32 in, void *cookie);
void virtqueue_kick(struct virtqueue *queue);
/* The cookie of a finished chain, NULL when none. Says BAD for ids that are not in flight. */
void *virtqueue_get(struct virtqueue *queue, u32 *length);
/* Ask for an interrupt; false when something has finished meanwhile. */
bool virtqueue_arm(struct virtqueue *queue);

#endif
