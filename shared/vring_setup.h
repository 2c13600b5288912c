/* A ring as the vhost-user server hands it to a native loop: shared/native_ring.py mirrors the struct. */
#ifndef FLOTILLA_VRING_SETUP_H
#define FLOTILLA_VRING_SETUP_H

#include "vring.h"

/* ABI. One queue at its start; addresses are this process's. */
struct vring_setup {
    uint64_t desc;
    uint64_t avail;
    uint64_t used;
    uint64_t used_gpa;   /* UINT64_MAX: derive it from `used` */
    uint64_t inflight;   /* 0: none */
    uint32_t index;
    uint16_t size;
    uint16_t base;
    int32_t kick_fd;     /* borrowed, non-blocking */
    int32_t call_fd;     /* borrowed, non-blocking; its owner may put another eventfd under it by dup2 */
    uint16_t inflight_desc_num;
    uint8_t event_idx;
    uint8_t indirect;
};

static inline bool vring_setup_valid(const struct vring_setup *setup)
{
    uint32_t size = setup->size;
    return size && size <= VRING_MAX_SIZE && !(size & (size - 1))
           && (!setup->inflight || setup->inflight_desc_num >= size);
}

/* Begin. Keeps die_at and die_after of *v; the rest is new. See vring_start for `out` and *resubmit. */
static inline enum vring_error vring_set_up(struct vring *v, const struct vring_setup *setup,
                                            const struct vring_memory *memory, uint8_t *log, uint64_t log_size,
                                            struct vring_resubmit *out, uint32_t *resubmit)
{
    uint16_t die_at = v->die_at;
    uint32_t die_after = v->die_after;
    *v = (struct vring){
        .desc = (void *)(uintptr_t)setup->desc,
        .avail = (void *)(uintptr_t)setup->avail,
        .used = (void *)(uintptr_t)setup->used,
        .inflight = (void *)(uintptr_t)setup->inflight,
        .memory = memory,
        .log = log,
        .log_size = log_size,
        .used_gpa = setup->used_gpa,
        .size = setup->size,
        .event_idx = setup->event_idx,
        .indirect = setup->indirect,
        .die_at = die_at,
        .die_after = die_after,
    };
    if (v->used_gpa == UINT64_MAX)
        v->used_gpa = vring_gpa_of(memory, setup->used);
    return vring_start(v, setup->base, out, resubmit);
}

#endif
