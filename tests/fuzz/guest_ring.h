/*
 * One hostile driver's virtqueue, for the targets whose device has one: the rings lie at the start of guest memory, where
 * descriptors may point too. ring_play lets the driver do what the input says until it yields to the device.
 */
#ifndef FLOTILLA_GUEST_RING_H
#define FLOTILLA_GUEST_RING_H

#include "fuzz.h"
#include "vring_setup.h"

#define RING_BYTES 0x1000 /* descriptor table, avail and used ring of up to 128 entries */
#define RING_MAX_ORDER 7

struct ring {
    struct guest *guest;
    uint64_t base; /* guest address */
    uint16_t size;
    uint16_t avail;
    bool edge; /* the descriptor table ends where its region does: behind it is a red zone */
};

static inline struct vring_desc *ring_desc(const struct ring *r)
{
    return (void *)(r->guest->block[0] + (r->edge ? guest_size[0] - r->size * sizeof(struct vring_desc) : r->base));
}

static inline uint64_t ring_avail_gpa(const struct ring *r)
{
    return r->base + 0x800;
}

static inline struct vring_avail *ring_avail(const struct ring *r)
{
    return (void *)(r->guest->block[0] + ring_avail_gpa(r));
}

static inline uint64_t ring_used_gpa(const struct ring *r)
{
    return r->base + 0xa00;
}

static inline struct vring_used *ring_used(const struct ring *r)
{
    return (void *)(r->guest->block[0] + ring_used_gpa(r));
}

static inline struct vring_setup ring_setup(const struct ring *r, uint32_t index, uint8_t flags)
{
    return (struct vring_setup){
        .desc = (uintptr_t)ring_desc(r), .avail = (uintptr_t)ring_avail(r), .used = (uintptr_t)ring_used(r),
        .used_gpa = flags & 4 ? UINT64_MAX : ring_used_gpa(r), .index = index, .size = r->size, .kick_fd = -1,
        .call_fd = -1, .event_idx = flags & 1, .indirect = flags >> 1 & 1,
    };
}

static inline struct vring_memory *ring_memory(const struct guest *g)
{
    struct vring_memory *memory = malloc(sizeof(*memory) + GUEST_REGIONS * sizeof(struct vring_region));
    MUST(memory);
    memory->count = GUEST_REGIONS;
    for (int i = 0; i < GUEST_REGIONS; i++)
        memory->region[i] = (struct vring_region){guest_gpa[i], guest_size[i], (uintptr_t)g->block[i]};
    return memory;
}

static inline struct vring_desc ring_random_desc(struct input *in, uint16_t size)
{
    struct vring_desc d = {.addr = guest_address(in), .len = guest_length(in)};
    uint64_t kind = take(in, 1);
    d.flags = (uint16_t)(kind & 64 ? take(in, 2) : kind & 7);
    d.next = (uint16_t)(kind & 128 ? take(in, 2) : kind & 32 ? size : (kind >> 3 & 3) % size);
    return d;
}

/* A chain of `count` descriptors at `head`, the last `writable` of them for the device to write; the usual case. */
static inline void ring_chain(struct ring *r, struct input *in, uint16_t head)
{
    uint64_t shape = take(in, 1);
    uint32_t count = 1 + (shape & 3), writable = shape >> 2 & 3;
    for (uint32_t i = 0; i < count; i++) {
        bool last = i + 1 == count;
        ring_desc(r)[(head + i) % r->size] = (struct vring_desc){
            .addr = guest_address(in), .len = guest_length(in),
            .flags = (uint16_t)((last ? 0 : VRING_DESC_F_NEXT) | (i + writable >= count ? VRING_DESC_F_WRITE : 0)),
            .next = (uint16_t)((head + i + 1) % r->size),
        };
    }
}

static inline void ring_offer(struct ring *r, uint16_t head)
{
    ring_avail(r)->ring[r->avail++ & (r->size - 1)] = head;
    ring_avail(r)->idx = r->avail;
}

/* The same head many times, by chance one whose indirect table loops over a buffer that crosses two regions. */
static inline void ring_flood(struct ring *r, struct input *in)
{
    uint16_t head = (uint16_t)below(in, r->size), n = (uint16_t)below(in, 200);
    if (n & 1) {
        uint64_t at = guest_gpa[2] + 16 * below(in, 64);
        struct vring_desc loop = {guest_gpa[1] - 1 - below(in, 8), 16, VRING_DESC_F_NEXT | (n & 2), 0};
        memcpy(guest_at(r->guest, at, sizeof(loop)), &loop, sizeof(loop));
        ring_desc(r)[head] = (struct vring_desc){at, 16, VRING_DESC_F_INDIRECT, 0};
    }
    for (; n; n--)
        ring_offer(r, head);
}

/* One step of the driver; false: it has yielded, or the input is at its end. `op` numbers from 8 on are the device's. */
static inline bool ring_step(struct ring *r, struct input *in, uint8_t op)
{
    switch (op) {
    case 0: ring_chain(r, in, (uint16_t)below(in, r->size)); return true;
    case 1: ring_desc(r)[below(in, r->size)] = ring_random_desc(in, r->size); return true;
    case 2: ring_offer(r, (uint16_t)below(in, r->size + 1u)); return true; /* one of them is none */
    case 3: { /* a descriptor into an indirect table */
        uint8_t *entry = guest_at(r->guest, guest_address(in), sizeof(struct vring_desc));
        struct vring_desc d = ring_random_desc(in, 8);
        if (entry)
            memcpy(entry, &d, sizeof(d));
        return true;
    }
    case 4: {
        uint64_t gpa = guest_address(in);
        guest_write(r->guest, gpa, in, 1 + below(in, 48));
        return true;
    }
    case 5: { /* any word of the avail ring: flags, index, heads, used_event */
        uint64_t n = below(in, 3 + r->size);
        uint16_t value = (uint16_t)take(in, 2);
        (&ring_avail(r)->flags)[n] = value;
        r->avail = ring_avail(r)->idx;
        return true;
    }
    case 6: ring_flood(r, in); return true;
    default: return false;
    }
}

#endif
