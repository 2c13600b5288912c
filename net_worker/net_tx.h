/* Guest to TAP. Part of net.c; see net.h. The pair's lock is held. */
#ifndef FLOTILLA_NET_TX_H
#define FLOTILLA_NET_TX_H

#include "net_trial.h"

/* Send the chain at hand. false: the TAP is full. Any other refusal costs the packet: the guest can't do anything. */
static bool net_send(struct net_pair *p)
{
    struct net_queue *q = &p->tx;
    ssize_t sent;
    if (__builtin_expect(p->device->lethal, 0) && net_is_lethal(p))
        abort();
    do
        sent = writev(p->tap, p->chain.iov, (int)p->chain.readable);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0) {
        q->counters.frames++;
        q->counters.bytes += p->chain.readable_bytes - p->device->header;
        return true;
    }
    if (errno == EAGAIN) {
        q->counters.stalls++;
        return false;
    }
    q->counters.tap_errno = (uint64_t)errno;
    q->counters.dropped++;
    return true;
}

/* Send up to NET_BATCH packets. true: there may be more at once. */
static bool net_transmit(struct net_pair *p)
{
    struct net_queue *q = &p->tx;
    struct vring *v = &q->vring;
    uint32_t count = 0, limit = q->record ? 1 : NET_BATCH;
    uint16_t head;
    if (!q->running || q->counters.broken || p->tx_blocked)
        return false;
    vring_disable_notify(v);
    for (; count < limit; count++) {
        int popped = vring_pop(v, &head);
        if (!popped)
            break;
        if (popped > 0 && q->record && !net_try(p->device, q)) {
            vring_add_used(v, head, 0);
            continue;
        }
        enum vring_error error = popped < 0 ? (enum vring_error)-popped : vring_parse(v, head, &p->chain);
        if (!error && (p->chain.writable || p->chain.readable_bytes < p->device->header))
            error = VRING_BAD_REQUEST;
        if (!error && p->chain.readable > NET_MAX_IOV)
            error = VRING_TOO_LONG;
        if (error || !net_send(p)) {
            if (popped > 0)
                vring_unpop(v, 1);
            if (error)
                net_break(p->device, q, error);
            else
                p->tx_blocked = true;
            break;
        }
        vring_reached(v, VRING_STEP_DONE);
        vring_add_used(v, head, 0);
    }
    net_publish(q);
    if (q->record)
        net_tried(q, count);
    if (q->counters.broken || p->tx_blocked)
        return false;
    return count == limit || vring_enable_notify(v);
}

#endif
