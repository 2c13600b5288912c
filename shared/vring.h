/*
 * The split virtqueue, seen from the device: for every native loop of Flotilla.
 *
 * Sources: virtio 1.2 section 2.7 (split virtqueues); vhost-user.rst, "Inflight I/O tracking" and "Migration".
 *
 * The guest is hostile and writes to all of this while we read it, so:
 *   - a descriptor, an avail entry and an index are each loaded once, into a local, and only the local is used;
 *   - every guest address is looked up in the region table, whole range, before it becomes a pointer;
 *   - nothing the guest can write bounds a loop: chains end after VRING_MAX_CHAIN descriptors, whatever they say.
 *
 * vring_parse may run in any thread; everything else needs the queue's lock, vring_pop too: between vring_publish's index
 * and its clearing of the inflight flags the driver may offer the same head again, and its new mark would be lost.
 *
 *   vring_pop ──▶ vring_parse ──▶ the device's work ──▶ vring_mark ──▶ vring_add_used ──▶ vring_publish ──▶ notify
 *      marks the inflight region       writes guest RAM    dirty log       used element       index, log, inflight
 */
#ifndef FLOTILLA_VRING_H
#define FLOTILLA_VRING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define VRING_DESC_F_NEXT 1
#define VRING_DESC_F_WRITE 2
#define VRING_DESC_F_INDIRECT 4
#define VRING_AVAIL_F_NO_INTERRUPT 1
#define VRING_USED_F_NO_NOTIFY 1

#define VRING_MAX_SIZE 32768
/* Longest chain: what QEMU and Linux's vhost accept too (UIO_MAXIOV). A chain through the table is also bounded by its size. */
#define VRING_MAX_CHAIN 1024
/* Buffers of one chain: a descriptor that spans adjacent regions becomes several. */
#define VRING_MAX_BUFFERS (VRING_MAX_CHAIN + 8)
#define VRING_PAGE_SHIFT 12
#define VRING_INFLIGHT_VERSION 1

struct vring_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct vring_avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[]; /* [size] is used_event */
};

struct vring_used_elem {
    uint32_t id;
    uint32_t len;
};

struct vring_used {
    uint16_t flags;
    uint16_t idx;
    struct vring_used_elem ring[]; /* behind the last one: avail_event */
};

/*
 * vhost-user.rst: DescStateSplit and QueueRegionSplit. Shared with the front end, survives us. The first byte of its
 * padding is ours: see vring_blame.
 */
struct vring_inflight_desc {
    uint8_t inflight;
    uint8_t attempts;
    uint8_t padding[4];
    uint16_t next;
    uint64_t counter;
};

struct vring_inflight {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct vring_inflight_desc desc[];
};

/* `size` bytes of guest memory at guest address `gpa` are mapped here at `host`. */
struct vring_region {
    uint64_t gpa;
    uint64_t size;
    uint64_t host;
};

/* Never changed once a ring has it: another set of regions is another table. */
struct vring_memory {
    uint32_t count;
    struct vring_region region[];
};

/* What can be wrong. Codes from VRING_BAD_INDEX on break the queue, the others cost one request. */
enum vring_error {
    VRING_OK = 0,
    VRING_TOO_LONG = 1,       /* more descriptors than allowed, which is how a loop ends */
    VRING_BAD_NEXT = 2,       /* next outside the table */
    VRING_BAD_ADDRESS = 3,    /* not guest memory */
    VRING_BAD_INDIRECT = 4,   /* not negotiated, nested, with NEXT, or a size that is no table's */
    VRING_BAD_ORDER = 5,      /* readable after writable */
    VRING_ZERO_LENGTH = 6,    /* an empty buffer */
    VRING_BAD_REQUEST = 7,    /* well-formed chain, but not a request of this device (set by the device) */
    VRING_BAD_INDEX = 16,     /* avail.idx is further ahead than the ring is long */
    VRING_BAD_HEAD = 17,      /* a head outside the table */
    VRING_HEAD_IN_USE = 18,   /* a head offered again before it was returned (found by the device) */
    VRING_BAD_SETUP = 19,     /* size, alignment or inflight region unusable */
};

/* Instants at which tests let the process die (vring.die_at). */
enum vring_step {
    VRING_STEP_NONE = 0,
    VRING_STEP_POPPED,    /* head read, inflight region untouched */
    VRING_STEP_COUNTED,   /* counter written, flag not */
    VRING_STEP_MARKED,    /* flag written, work not begun */
    VRING_STEP_DONE,      /* the device's work done, used ring untouched (reached in the device) */
    VRING_STEP_LINKED,    /* in the last-batch list */
    VRING_STEP_FILLED,    /* used element written, index not */
    VRING_STEP_PUBLISHED, /* index written, flags not cleared */
    VRING_STEP_CLEARED,   /* flags cleared, the region's used_idx not */
    VRING_STEP_SETTLED,   /* all written, the guest not notified */
    VRING_STEP_COUNT,
};

struct vring {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    struct vring_inflight *inflight; /* NULL: none */
    const struct vring_memory *memory; /* atomic: may be replaced while requests are parsed */
    uint8_t *log; /* NULL: off */
    uint64_t log_size;
    uint64_t used_gpa;
    uint64_t counter;     /* next value for inflight.desc[].counter */
    uint16_t size;
    uint16_t last_avail;  /* next avail entry to take */
    uint16_t avail_seen;  /* avail.idx as last loaded */
    uint16_t used_next;   /* next used slot to fill */
    uint16_t used_idx;    /* published */
    uint16_t signalled;   /* used_idx at the last notification decision */
    bool signalled_valid;
    bool event_idx;
    bool indirect;
    bool use_notify_flag; /* notifications are off by VRING_USED_F_NO_NOTIFY */
    uint16_t reminded;    /* used index that vring_remind has answered for */
    uint16_t die_at;      /* enum vring_step, tests only */
    uint32_t die_after;   /* … at its n-th occurrence */
};

/* One request's buffers in order, `readable` ones first. The device may shorten `iov`; `gpa` and `len` stay for the log. */
struct vring_chain {
    uint32_t readable;
    uint32_t writable;
    uint64_t readable_bytes;
    uint64_t writable_bytes;
    struct iovec iov[VRING_MAX_BUFFERS];
    uint64_t gpa[VRING_MAX_BUFFERS];
    uint32_t len[VRING_MAX_BUFFERS];
};

struct vring_resubmit {
    uint64_t counter;
    uint16_t head;
};

static inline uint16_t vring_load16(const uint16_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline void vring_store16(uint16_t *p, uint16_t value)
{
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
}

static inline void vring_reached(struct vring *v, enum vring_step step)
{
    if (__builtin_expect(v->die_at == step, 0) && --v->die_after == 0)
        _exit(137);
}

/* ------------------------------------------------------------------ guest memory */

static inline const struct vring_region *vring_find(const struct vring_memory *memory, uint64_t gpa)
{
    for (uint32_t i = 0; i < memory->count; i++)
        if (gpa - memory->region[i].gpa < memory->region[i].size)
            return &memory->region[i];
    return NULL;
}

/* Host pointer for a range that lies within one region; NULL if it doesn't. */
static inline void *vring_translate(const struct vring_memory *memory, uint64_t gpa, uint64_t len)
{
    const struct vring_region *r = vring_find(memory, gpa);
    if (!r || len > r->size - (gpa - r->gpa))
        return NULL;
    return (void *)(uintptr_t)(r->host + (gpa - r->gpa));
}

/* Guest address of a host address, for the used ring's dirty marks; UINT64_MAX if no region holds it. */
static inline uint64_t vring_gpa_of(const struct vring_memory *memory, uint64_t host)
{
    for (uint32_t i = 0; i < memory->count; i++)
        if (host - memory->region[i].host < memory->region[i].size)
            return memory->region[i].gpa + (host - memory->region[i].host);
    return UINT64_MAX;
}

/*
 * Mark pages dirty, after they were written. Always the atomic OR, never a test before it: a bit seen as set may be
 * harvested, and its page copied, while our data still sits in the store buffer; the locked operation drains it first.
 */
static inline void vring_mark(const struct vring *v, uint64_t gpa, uint64_t len)
{
    if (!v->log || !len || gpa + (len - 1) < gpa)
        return;
    uint64_t first = gpa >> VRING_PAGE_SHIFT, last = (gpa + len - 1) >> VRING_PAGE_SHIFT;
    for (uint64_t byte = first / 8; byte <= last / 8 && byte < v->log_size; byte++) {
        uint8_t mask = 0xff;
        if (byte == first / 8)
            mask &= (uint8_t)(0xffu << (first & 7));
        if (byte == last / 8)
            mask &= (uint8_t)(0xffu >> (7 - (last & 7)));
        __atomic_fetch_or(&v->log[byte], mask, __ATOMIC_SEQ_CST);
    }
}

static inline void vring_mark_used(const struct vring *v, uint64_t offset, uint64_t len)
{
    if (v->used_gpa != UINT64_MAX)
        vring_mark(v, v->used_gpa + offset, len);
}

/* The whole used ring: at start, for what a predecessor wrote and had no time to mark. */
static inline void vring_mark_used_ring(const struct vring *v)
{
    vring_mark_used(v, 0, sizeof(struct vring_used) + v->size * sizeof(struct vring_used_elem) + 2);
}

/* ------------------------------------------------------------------ parsing */

/* One descriptor in two loads. Indirect tables need not be aligned, hence the packed type. */
static inline struct vring_desc vring_fetch(const void *from)
{
    struct __attribute__((packed, may_alias)) word { uint64_t value; };
    const volatile struct word *words = from;
    uint64_t addr = words[0].value, rest = words[1].value;
    return (struct vring_desc){
        .addr = addr, .len = (uint32_t)rest, .flags = (uint16_t)(rest >> 32), .next = (uint16_t)(rest >> 48),
    };
}

static inline enum vring_error vring_add_buffer(const struct vring_memory *memory, struct vring_chain *c,
                                                const struct vring_desc *d)
{
    bool writable = d->flags & VRING_DESC_F_WRITE;
    uint64_t gpa = d->addr, left = d->len;
    if (!left)
        return VRING_ZERO_LENGTH;
    if (!writable && c->writable)
        return VRING_BAD_ORDER;
    while (left) {
        const struct vring_region *r = vring_find(memory, gpa);
        uint32_t n = c->readable + c->writable;
        if (!r)
            return VRING_BAD_ADDRESS;
        if (n == VRING_MAX_BUFFERS)
            return VRING_TOO_LONG;
        uint64_t room = r->size - (gpa - r->gpa), len = left < room ? left : room;
        c->iov[n] = (struct iovec){(void *)(uintptr_t)(r->host + (gpa - r->gpa)), len};
        c->gpa[n] = gpa;
        c->len[n] = (uint32_t)len;
        if (writable) {
            c->writable++;
            c->writable_bytes += len;
        } else {
            c->readable++;
            c->readable_bytes += len;
        }
        gpa += len;
        left -= len;
    }
    return VRING_OK;
}

/* Walk an indirect table, which ends the chain. `used` descriptors have been taken already. */
static inline enum vring_error vring_parse_indirect(const struct vring *v, const struct vring_memory *memory,
                                                    struct vring_chain *c, const struct vring_desc *table,
                                                    uint32_t used)
{
    uint32_t count = table->len / sizeof(struct vring_desc), i = 0;
    if (!v->indirect || (table->flags & VRING_DESC_F_NEXT) || !count || table->len % sizeof(struct vring_desc))
        return VRING_BAD_INDIRECT;
    for (; used < VRING_MAX_CHAIN; used++) {
        /* Entry by entry: a table may cross from one region into the next. */
        uint64_t gpa = table->addr + (uint64_t)i * sizeof(struct vring_desc);
        const void *entry = vring_translate(memory, gpa, sizeof(struct vring_desc));
        if (!entry)
            return VRING_BAD_ADDRESS;
        struct vring_desc d = vring_fetch(entry);
        if (d.flags & VRING_DESC_F_INDIRECT)
            return VRING_BAD_INDIRECT;
        enum vring_error error = vring_add_buffer(memory, c, &d);
        if (error || !(d.flags & VRING_DESC_F_NEXT))
            return error;
        if (d.next >= count)
            return VRING_BAD_NEXT;
        i = d.next;
    }
    return VRING_TOO_LONG;
}

/* Collect the buffers of the chain that begins at `head` (< size). On an error the chain is unusable. */
static inline enum vring_error vring_parse(const struct vring *v, uint16_t head, struct vring_chain *c)
{
    uint32_t limit = v->size < VRING_MAX_CHAIN ? v->size : VRING_MAX_CHAIN;
    const struct vring_memory *memory = __atomic_load_n(&v->memory, __ATOMIC_ACQUIRE);
    uint16_t i = head;
    c->readable = c->writable = 0;
    c->readable_bytes = c->writable_bytes = 0;
    for (uint32_t used = 0; used < limit; used++) {
        struct vring_desc d = vring_fetch(&v->desc[i]);
        if (d.flags & VRING_DESC_F_INDIRECT)
            return vring_parse_indirect(v, memory, c, &d, used);
        enum vring_error error = vring_add_buffer(memory, c, &d);
        if (error || !(d.flags & VRING_DESC_F_NEXT))
            return error;
        if (d.next >= v->size)
            return VRING_BAD_NEXT;
        i = d.next;
    }
    return VRING_TOO_LONG;
}

/* ------------------------------------------------------------------ taking requests */

/*
 * Take the next head, noting it in the inflight region. 1: taken; 0: none; -enum vring_error: the queue is broken, and
 * stays so, since there is no telling which requests the driver meant.
 */
static inline int vring_pop(struct vring *v, uint16_t *head)
{
    if (v->avail_seen == v->last_avail) {
        /* Acquire: what the driver wrote before the index must be seen after it. */
        v->avail_seen = __atomic_load_n(&v->avail->idx, __ATOMIC_ACQUIRE);
        if (v->avail_seen == v->last_avail)
            return 0;
    }
    if ((uint16_t)(v->avail_seen - v->last_avail) > v->size)
        return -VRING_BAD_INDEX;
    uint16_t i = vring_load16(&v->avail->ring[v->last_avail & (v->size - 1)]);
    if (i >= v->size)
        return -VRING_BAD_HEAD;
    v->last_avail++;
    vring_reached(v, VRING_STEP_POPPED);
    if (v->inflight) {
        struct vring_inflight_desc *state = &v->inflight->desc[i];
        __atomic_store_n(&state->attempts, 0, __ATOMIC_RELEASE);
        __atomic_store_n(&state->counter, v->counter++, __ATOMIC_RELEASE);
        vring_reached(v, VRING_STEP_COUNTED);
        __atomic_store_n(&state->inflight, 1, __ATOMIC_RELEASE);
    }
    vring_reached(v, VRING_STEP_MARKED);
    *head = i;
    return 1;
}

/* Give the last `count` heads that were taken back, none of them returned yet. Only without an inflight region. */
static inline void vring_unpop(struct vring *v, uint16_t count)
{
    v->last_avail = (uint16_t)(v->last_avail - count);
}

/* Ask for kicks. true: requests have come in meanwhile, don't wait. */
static inline bool vring_enable_notify(struct vring *v)
{
    if (v->event_idx) {
        uint16_t *avail_event = (uint16_t *)(void *)&v->used->ring[v->size];
        vring_store16(avail_event, v->last_avail);
        vring_mark_used(v, sizeof(struct vring_used) + v->size * sizeof(struct vring_used_elem), 2);
    } else if (v->use_notify_flag) {
        vring_store16(&v->used->flags, 0);
        vring_mark_used(v, 0, 2);
        v->use_notify_flag = false;
    }
    /* Our store before our load, theirs before theirs: else both sides miss each other and the ring sleeps. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(&v->avail->idx, __ATOMIC_ACQUIRE) != v->last_avail;
}

/* Spare the driver its kicks while we are at it. With EVENT_IDX the stale avail_event does that. */
static inline void vring_disable_notify(struct vring *v)
{
    if (!v->event_idx && !v->use_notify_flag) {
        vring_store16(&v->used->flags, VRING_USED_F_NO_NOTIFY);
        vring_mark_used(v, 0, 2);
        v->use_notify_flag = true;
    }
}

/* ------------------------------------------------------------------ returning requests */

/* Fill a used element (head < size), not yet visible. The pages that the device wrote are marked before this. */
static inline void vring_add_used(struct vring *v, uint16_t head, uint32_t len)
{
    uint16_t slot = v->used_next & (v->size - 1);
    if (v->inflight) {
        v->inflight->desc[head].next = v->inflight->last_batch_head;
        __atomic_store_n(&v->inflight->last_batch_head, head, __ATOMIC_RELEASE);
    }
    vring_reached(v, VRING_STEP_LINKED);
    __atomic_store_n(&v->used->ring[slot].id, head, __ATOMIC_RELAXED);
    __atomic_store_n(&v->used->ring[slot].len, len, __ATOMIC_RELAXED);
    vring_mark_used(v, sizeof(struct vring_used) + slot * sizeof(struct vring_used_elem),
                    sizeof(struct vring_used_elem));
    v->used_next++;
    vring_reached(v, VRING_STEP_FILLED);
}

/* Clear the flags of the last `count` entries that were linked. */
static inline void vring_clear_batch(struct vring_inflight *inflight, uint16_t size, uint16_t count)
{
    uint16_t i = inflight->last_batch_head;
    for (; count && i < size; count--) {
        __atomic_store_n(&inflight->desc[i].inflight, 0, __ATOMIC_RELEASE);
        i = vring_load16(&inflight->desc[i].next);
    }
}

/* Show everything added so far to the driver. The number of requests returned by it. */
static inline uint16_t vring_publish(struct vring *v)
{
    uint16_t count = (uint16_t)(v->used_next - v->used_idx);
    if (!count)
        return 0;
    v->used_idx = v->used_next;
    __atomic_store_n(&v->used->idx, v->used_idx, __ATOMIC_RELEASE);
    vring_reached(v, VRING_STEP_PUBLISHED);
    vring_mark_used(v, 0, sizeof(struct vring_used));
    if (v->inflight) {
        vring_clear_batch(v->inflight, v->size, count);
        vring_reached(v, VRING_STEP_CLEARED);
        __atomic_store_n(&v->inflight->used_idx, v->used_idx, __ATOMIC_RELEASE);
    }
    vring_reached(v, VRING_STEP_SETTLED);
    return count;
}

/* After vring_publish: whether the driver wants to be interrupted (virtio 1.2, 2.7.7.2 and 2.7.10). */
static inline bool vring_should_notify(struct vring *v)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the index before the driver's wish: see vring_enable_notify */
    if (!v->event_idx)
        return !(vring_load16(&v->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    uint16_t old = v->signalled, event = vring_load16(&v->avail->ring[v->size]);
    bool valid = v->signalled_valid;
    v->signalled = v->used_idx;
    v->signalled_valid = true;
    return !valid || (uint16_t)(v->used_idx - event - 1) < (uint16_t)(v->used_idx - old);
}

/*
 * Whether the driver may be waiting for a notification of what it has been shown: one that got lost. It may also be busy
 * fetching, so this is asked at a heartbeat and answers once per used index: an interrupt too many does no harm.
 */
static inline bool vring_remind(struct vring *v)
{
    if (v->reminded == v->used_idx)
        return false;
    v->reminded = v->used_idx;
    if (!v->event_idx)
        return !(vring_load16(&v->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    return vring_load16(&v->avail->ring[v->size]) != v->used_idx;
}

/* Where to go on: the base for the next vring_start. */
static inline uint16_t vring_last_avail(const struct vring *v)
{
    return v->last_avail;
}

#include "vring_recovery.h"

#endif
