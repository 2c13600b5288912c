/*
 * TAP to guest. Part of net.c; see net.h. The pair's lock is held.
 *
 * A packet's length is known only when it has been read. So buffers for the longest one are taken ahead (the window) and
 * readv fills as many as it needs, with the bounce buffer behind them:
 *
 *   not mergeable    window of one chain; what overflows into the bounce buffer did not fit, and is dropped
 *   mergeable        window of NET_MAX_PACKET bytes: always fits. A shorter window (the guest is slow to refill): read into
 *                    the bounce buffer, copy what fits, else hold the packet until the guest has refilled
 */
#ifndef FLOTILLA_NET_RX_H
#define FLOTILLA_NET_RX_H

#include "net_device.h"

/* Give all buffers of the window back, untouched. */
static void net_forget(struct net_pair *p)
{
    struct net_window *w = &p->window;
    if (p->rx.running)
        vring_unpop(&p->rx.vring, (uint16_t)w->heads);
    w->first = w->heads = w->at = w->iovs = 0;
    w->bytes = 0;
    w->full = false;
}

static void net_append(struct net_window *w, uint16_t head, const struct vring_chain *chain)
{
    uint32_t n = chain->writable;
    if (w->at + w->iovs + n > 2 * NET_MAX_IOV) {
        memmove(w->iov, w->iov + w->at, w->iovs * sizeof(w->iov[0]));
        memmove(w->gpa, w->gpa + w->at, w->iovs * sizeof(w->gpa[0]));
        w->at = 0;
    }
    uint32_t end = w->at + w->iovs;
    memcpy(w->iov + end, chain->iov, n * sizeof(w->iov[0]));
    memcpy(w->gpa + end, chain->gpa, n * sizeof(w->gpa[0]));
    w->buffer[(w->first + w->heads) % NET_WINDOW_HEADS] = (struct net_buffer){head, (uint16_t)n, chain->writable_bytes};
    w->heads++;
    w->iovs += n;
    w->bytes += chain->writable_bytes;
}

/* Take buffers until the window has `need` bytes, or there are no more. false: the queue is broken. */
static bool net_fill(struct net_pair *p, uint64_t need)
{
    struct net_window *w = &p->window;
    struct vring *v = &p->rx.vring;
    uint32_t most = p->device->mergeable ? NET_WINDOW_HEADS : 1;
    uint16_t head;
    while (w->bytes < need && !w->full) {
        if (w->heads == most) {
            w->full = true;
            break;
        }
        int popped = vring_pop(v, &head);
        if (!popped)
            break;
        enum vring_error error = popped < 0 ? (enum vring_error)-popped : vring_parse(v, head, &p->chain);
        if (!error && (p->chain.readable || p->chain.writable_bytes < p->device->header))
            error = VRING_BAD_REQUEST;
        if (!error && p->chain.writable > NET_MAX_IOV)
            error = VRING_TOO_LONG;
        if (error) {
            if (popped > 0)
                vring_unpop(v, 1);
            net_break(p->device, &p->rx, error);
            return false;
        }
        if (w->iovs + p->chain.writable > NET_MAX_IOV) {
            vring_unpop(v, 1);
            w->full = true;
            break;
        }
        net_append(w, head, &p->chain);
    }
    w->full |= w->heads == v->size; /* the ring holds no more */
    return true;
}

static void net_mark(struct net_pair *p, uint64_t bytes)
{
    struct net_window *w = &p->window;
    for (uint32_t i = w->at; bytes && i < w->at + w->iovs; i++) {
        uint64_t n = w->iov[i].iov_len < bytes ? w->iov[i].iov_len : bytes;
        vring_mark(&p->rx.vring, w->gpa[i], n);
        bytes -= n;
    }
}

/* Copy from the bounce buffer into the window, whose bytes suffice. */
static void net_scatter(struct net_window *w, const uint8_t *from, uint64_t bytes)
{
    for (uint32_t i = w->at; bytes; i++) {
        uint64_t n = w->iov[i].iov_len < bytes ? w->iov[i].iov_len : bytes;
        memcpy(w->iov[i].iov_base, from, n);
        from += n;
        bytes -= n;
    }
}

static void net_put_num_buffers(struct net_window *w, uint16_t count)
{
    uint8_t bytes[2] = {(uint8_t)count, (uint8_t)(count >> 8)};
    uint64_t skip = NET_NUM_BUFFERS_AT;
    uint32_t i = w->at;
    for (uint32_t n = 0; n < sizeof(bytes); n++) {
        while (skip >= w->iov[i].iov_len)
            skip -= w->iov[i++].iov_len;
        ((volatile uint8_t *)w->iov[i].iov_base)[skip++] = bytes[n];
    }
}

/* The window's first `bytes` bytes are a packet: return their chains, unpublished. */
static void net_deliver(struct net_pair *p, uint64_t bytes)
{
    struct net_window *w = &p->window;
    struct vring *v = &p->rx.vring;
    uint64_t room = 0;
    uint16_t count = 0;
    while (room < bytes)
        room += w->buffer[(w->first + count++) % NET_WINDOW_HEADS].bytes;
    if (p->device->header == NET_HEADER)
        net_put_num_buffers(w, count);
    vring_reached(v, VRING_STEP_DONE);
    net_mark(p, bytes);
    p->rx.counters.frames++;
    p->rx.counters.bytes += bytes - p->device->header;
    for (; count; count--) {
        const struct net_buffer *buffer = &w->buffer[w->first];
        uint64_t part = buffer->bytes < bytes ? buffer->bytes : bytes;
        vring_add_used(v, buffer->head, (uint32_t)part);
        bytes -= part;
        w->bytes -= buffer->bytes;
        w->iovs -= buffer->iovs;
        w->at += buffer->iovs;
        w->heads--;
        w->first = (w->first + 1) % NET_WINDOW_HEADS;
    }
    w->full = false;
}

/* A packet from the TAP, into the window or, if that may be too short, into the bounce buffer. */
static ssize_t net_read(struct net_pair *p, bool direct)
{
    struct net_window *w = &p->window;
    struct iovec *iov = w->iov + w->at, bounce = {p->bounce, sizeof(p->bounce)};
    ssize_t got;
    if (direct)
        iov[w->iovs] = bounce;
    do
        got = direct ? readv(p->tap, iov, (int)w->iovs + 1) : read(p->tap, p->bounce, sizeof(p->bounce));
    while (got < 0 && errno == EINTR);
    if (got < 0 && errno != EAGAIN) {
        p->rx.counters.tap_errno = (uint64_t)errno;
        p->rx.counters.tap_gone++;
        p->gone = true;
        loop_signal(p->device->event_fd);
    }
    return got;
}

/* The held packet. false: it has to wait for buffers (*starved), or the queue broke. */
static bool net_deliver_held(struct net_pair *p, bool *starved)
{
    struct net_window *w = &p->window;
    if (!net_fill(p, p->held))
        return false;
    if (w->bytes >= p->held) {
        net_scatter(w, p->bounce, p->held);
        net_deliver(p, p->held);
    } else if (w->full) {
        p->rx.counters.dropped++; /* no number of refills makes room for it */
    } else {
        *starved = true;
        return false;
    }
    p->held = 0;
    return true;
}

/* One packet. false: none came, or none can be taken: the TAP is dry or gone, the guest has no buffers, the queue broke. */
static bool net_receive_one(struct net_pair *p, bool *starved)
{
    struct net_window *w = &p->window;
    if (p->held)
        return net_deliver_held(p, starved);
    if (!net_fill(p, p->device->mergeable ? NET_MAX_PACKET : 1))
        return false;
    if (!w->heads) {
        *starved = true;
        return false;
    }
    bool direct = !p->device->mergeable || w->bytes >= NET_MAX_PACKET;
    ssize_t got = net_read(p, direct);
    if (got < (ssize_t)p->device->header)
        return false;
    if (!direct) {
        p->held = (uint32_t)got;
        return net_deliver_held(p, starved);
    }
    if ((uint64_t)got > w->bytes) {
        net_mark(p, w->bytes); /* written to, though not returned */
        p->rx.counters.dropped++;
        return true;
    }
    net_deliver(p, (uint64_t)got);
    return true;
}

/* Receive up to NET_BATCH packets. true: there may be more at once. */
static bool net_receive(struct net_pair *p)
{
    struct net_queue *q = &p->rx;
    uint32_t count = 0;
    bool starved = false;
    if (!q->running || q->counters.broken || p->rx_starved || p->gone || !p->attached)
        return false;
    vring_disable_notify(&q->vring);
    while (count < NET_BATCH && net_receive_one(p, &starved))
        count++;
    net_publish(q);
    if (q->counters.broken)
        return false;
    if (starved) {
        q->counters.stalls++;
        p->rx_starved = !vring_enable_notify(&q->vring);
        return !p->rx_starved;
    }
    return count == NET_BATCH;
}

#endif
