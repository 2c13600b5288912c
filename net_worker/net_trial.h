/*
 * A frame of the guest's that kills its worker. Part of net.c; see net.h.
 *
 * Frames come back in order, so after a death the guilty one is among the batch at used.idx. The successor sends those one
 * by one and notes which it is at in the first entry of the ring's inflight region, which outlives it and serves nothing else
 * here: `next` is the frame's used index, `attempts` counts its deaths as vring_recovery.h has it.
 */
#ifndef FLOTILLA_NET_TRIAL_H
#define FLOTILLA_NET_TRIAL_H

#include "net_device.h"

/* At a ring's start. `died`: the last worker died of its own work. */
static void net_begin_trial(struct net_queue *q, const struct vring_setup *setup, bool died)
{
    struct vring_inflight *region = (void *)(uintptr_t)setup->inflight;
    q->record = NULL;
    if (!region)
        return;
    struct vring_inflight_desc *record = &region->desc[0];
    bool tried = record->attempts & VRING_TRIED;
    uint8_t n = record->next == q->vring.used_idx ? record->attempts & VRING_ATTEMPTS : 0;
    if (died && (tried || !n) && n < VRING_ATTEMPTS)
        n++;
    record->next = q->vring.used_idx;
    __atomic_store_n(&record->attempts, n, __ATOMIC_RELEASE);
    if (!n)
        return;
    q->record = record;
    q->suspects = NET_BATCH;
}

/* Before the frame at used.idx is looked at. false: it has killed often enough, and is to be dropped. */
static bool net_try(struct net_device *d, struct net_queue *q)
{
    struct vring_inflight_desc *record = q->record;
    if ((record->attempts & VRING_ATTEMPTS) >= VRING_POISON) {
        q->counters.poisoned++;
        q->counters.dropped++;
        loop_signal(d->event_fd);
        return false;
    }
    __atomic_fetch_or(&record->attempts, VRING_TRIED, __ATOMIC_SEQ_CST);
    return true;
}

/* It has been returned (`done`), or waits for the TAP. */
static void net_tried(struct net_queue *q, bool done)
{
    struct vring_inflight_desc *record = q->record;
    if (!done) {
        __atomic_fetch_and(&record->attempts, (uint8_t)VRING_ATTEMPTS, __ATOMIC_SEQ_CST);
        return;
    }
    q->suspects--;
    __atomic_store_n(&record->attempts, 0, __ATOMIC_RELEASE); /* a kill here forgets the first death, which is harmless */
    record->next = q->vring.used_idx;
    if (q->suspects)
        __atomic_store_n(&record->attempts, 1, __ATOMIC_RELEASE); /* the first death is the rest's as well */
    else
        q->record = NULL;
}

/* For tests: whether the frame at hand has the EtherType that is to kill. */
static bool net_is_lethal(const struct net_pair *p)
{
    uint32_t at = p->device->header + 12, found = 0;
    for (uint32_t i = 0; i < p->chain.readable && found < 2; i++) {
        const struct iovec *iov = &p->chain.iov[i];
        for (; found < 2 && at < iov->iov_len; at++, found++)
            if (((const uint8_t *)iov->iov_base)[at] != (uint8_t)(p->device->lethal >> (8 * (1 - found))))
                return false;
        at -= at < iov->iov_len ? 0 : (uint32_t)iov->iov_len;
    }
    return found == 2;
}

#endif
