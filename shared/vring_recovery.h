/*
 * How a ring begins, at first and after its last back end died. Part of vring.h, which includes it.
 *
 * Source: vhost-user.rst, "Inflight I/O tracking". The inflight region is the front end's and outlives every back end.
 */
#ifndef FLOTILLA_VRING_RECOVERY_H
#define FLOTILLA_VRING_RECOVERY_H

static inline int vring_by_counter(const void *a, const void *b)
{
    uint64_t x = ((const struct vring_resubmit *)a)->counter, y = ((const struct vring_resubmit *)b)->counter;
    return (x > y) - (x < y);
}

/*
 * Read a predecessor's inflight region: settle a crash between publish and clear, and list in `out` (room for `size`)
 * what it had taken and not returned, oldest first. A region of version 0 is fresh and gets initialised.
 */
static inline uint32_t vring_recover(struct vring *v, struct vring_resubmit *out)
{
    struct vring_inflight *inflight = v->inflight;
    uint16_t missed = (uint16_t)(v->used_idx - inflight->used_idx);
    uint32_t n = 0;
    if (inflight->version != VRING_INFLIGHT_VERSION || missed > v->size) {
        /* No batch is longer than the ring: the region is fresh, or speaks of a ring before the last device reset. */
        for (uint32_t i = 0; i < v->size; i++)
            inflight->desc[i] = (struct vring_inflight_desc){0};
        inflight->last_batch_head = 0;
        inflight->desc_num = v->size;
    } else {
        vring_clear_batch(inflight, v->size, missed);
    }
    __atomic_store_n(&inflight->used_idx, v->used_idx, __ATOMIC_RELEASE);
    __atomic_store_n(&inflight->version, VRING_INFLIGHT_VERSION, __ATOMIC_RELEASE);
    v->counter = 0;
    for (uint32_t i = 0; i < v->size; i++) {
        if (inflight->desc[i].inflight != 1)
            continue;
        out[n] = (struct vring_resubmit){inflight->desc[i].counter, (uint16_t)i};
        if (out[n].counter >= v->counter)
            v->counter = out[n].counter + 1;
        n++;
    }
    qsort(out, n, sizeof(*out), vring_by_counter);
    return n;
}

/*
 * Which of the requests that were taken over may have killed their worker. An attempts byte counts deaths:
 *
 *     taken ──worker dies──▶ 1 ──tried alone, dies──▶ 2 ──tried alone, dies──▶ 3: to be failed
 *                            └──────── done ─────────┴─▶ (taken again: 0)
 *
 * The first death blames all that were in flight; from then on the suspects are tried alone (vring_try), so that only the
 * one that is being tried is blamed for the next. `died` is false when somebody else ended the worker.
 */
enum { VRING_TRIED = 0x80, VRING_ATTEMPTS = 0x7f, VRING_POISON = 3 };

static inline void vring_blame(struct vring *v, const struct vring_resubmit *list, uint32_t count, bool died)
{
    bool tried = false;
    for (uint32_t i = 0; i < count; i++)
        tried |= v->inflight->desc[list[i].head].attempts & VRING_TRIED;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *attempts = &v->inflight->desc[list[i].head].attempts, n = *attempts & VRING_ATTEMPTS;
        if (died && (*attempts & VRING_TRIED) && n < VRING_ATTEMPTS)
            n++;
        else if (died && !tried && !n)
            n = 1;
        __atomic_store_n(attempts, n, __ATOMIC_RELEASE);
    }
}

/* The deaths that a request is blamed for. */
static inline uint8_t vring_attempts(const struct vring *v, uint16_t head)
{
    return v->inflight ? v->inflight->desc[head].attempts & VRING_ATTEMPTS : 0;
}

/* It is tried now, and nothing else is. */
static inline void vring_try(struct vring *v, uint16_t head)
{
    __atomic_fetch_or(&v->inflight->desc[head].attempts, VRING_TRIED, __ATOMIC_SEQ_CST);
}

/*
 * Begin at avail index `base`. desc, avail, used, size, memory, log, used_gpa, inflight and the feature flags are set by the
 * caller; ring addresses are the caller's to check against guest memory. *resubmit is the number of entries in `out`.
 *
 * With an inflight region the base follows from it: every request that was taken is returned (counted in used.idx) or
 * listed, so base = used.idx + listed. A front end that lost its back end could only guess.
 */
static inline enum vring_error vring_start(struct vring *v, uint16_t base, struct vring_resubmit *out, uint32_t *resubmit)
{
    *resubmit = 0;
    if (!v->size || v->size > VRING_MAX_SIZE || (v->size & (v->size - 1)))
        return VRING_BAD_SETUP;
    if (((uintptr_t)v->desc & 15) || ((uintptr_t)v->avail & 1) || ((uintptr_t)v->used & 3) || ((uintptr_t)v->inflight & 7))
        return VRING_BAD_SETUP;
    v->used_idx = v->used_next = __atomic_load_n(&v->used->idx, __ATOMIC_ACQUIRE);
    v->signalled_valid = false;
    v->use_notify_flag = false;
    if (v->inflight) {
        *resubmit = vring_recover(v, out);
        base = (uint16_t)(v->used_idx + *resubmit);
    }
    v->last_avail = v->avail_seen = base;
    if (!v->event_idx)
        vring_store16(&v->used->flags, 0);
    vring_mark_used_ring(v);
    return VRING_OK;
}

#endif
