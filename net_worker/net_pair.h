/* A pair's thread, and how others get in. Part of net.c; see net.h. */
#ifndef FLOTILLA_NET_PAIR_H
#define FLOTILLA_NET_PAIR_H

#include <poll.h>
#include <time.h>

#include "net_rx.h"
#include "net_tx.h"

/*
 * Take the lock from a thread that gives it up and takes it again without end: a plain mutex lets it starve us. It sees
 * `wanted` at its next turn and waits for net_leave. Everything that it keeps between turns is given back here.
 */
static void net_enter(struct net_pair *p)
{
    __atomic_fetch_add(&p->wanted, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&p->lock);
    net_forget(p);
    p->tx_blocked = p->rx_starved = p->gone = false;
}

static void net_leave(struct net_pair *p)
{
    __atomic_fetch_sub(&p->wanted, 1, __ATOMIC_SEQ_CST);
    pthread_cond_signal(&p->turn);
    pthread_mutex_unlock(&p->lock);
    loop_signal(p->control_fd);
}

enum { NET_ON_CONTROL, NET_ON_TX, NET_ON_RX, NET_ON_TAP, NET_FDS };

static void net_watch(const struct net_pair *p, struct pollfd *fds)
{
    bool receiving = p->rx.running && !p->rx.counters.broken && !p->rx_starved;
    bool sending = p->tx.running && !p->tx.counters.broken;
    short events = (short)((receiving && p->attached ? POLLIN : 0) | (sending && p->tx_blocked ? POLLOUT : 0));
    fds[NET_ON_CONTROL] = (struct pollfd){p->control_fd, POLLIN, 0};
    fds[NET_ON_TX] = (struct pollfd){sending ? p->tx.kick_fd : -1, POLLIN, 0};
    fds[NET_ON_RX] = (struct pollfd){p->rx.running && !p->rx.counters.broken ? p->rx.kick_fd : -1, POLLIN, 0};
    /* Even asked for nothing, poll reports the POLLERR of a TAP that is gone. */
    fds[NET_ON_TAP] = (struct pollfd){events && !p->gone ? p->tap : -1, events, 0};
}

static bool net_was_kicked(struct net_queue *q, const struct pollfd *fd)
{
    if (!fd->revents || !q->running || fd->fd != q->kick_fd || !loop_drain(q->kick_fd))
        return false;
    q->counters.kicks++;
    return true;
}

/* At a heartbeat: a notification that got lost is sent after all. */
static void net_remind(struct net_queue *q)
{
    if (q->running && vring_remind(&q->vring))
        loop_signal(q->call_fd);
}

/* As told by a rehearsed fault: wait before this turn, or hang until the fault is cleared. The lock is given up meanwhile. */
static void net_suffer(struct net_pair *p)
{
    struct timespec rest = {p->device->fault.delay_ms / 1000, (long)(p->device->fault.delay_ms % 1000) * 1000000};
    while (p->device->fault.freeze && !p->closing)
        pthread_cond_wait(&p->turn, &p->lock);
    if (rest.tv_sec || rest.tv_nsec) {
        pthread_mutex_unlock(&p->lock);
        nanosleep(&rest, NULL);
        pthread_mutex_lock(&p->lock);
    }
}

static void net_take_events(struct net_pair *p, const struct pollfd *fds)
{
    if (fds[NET_ON_CONTROL].revents && loop_drain(p->control_fd)) {
        net_remind(&p->tx);
        net_remind(&p->rx);
    }
    net_was_kicked(&p->tx, &fds[NET_ON_TX]);
    if (net_was_kicked(&p->rx, &fds[NET_ON_RX]))
        p->rx_starved = false;
    if (fds[NET_ON_TAP].revents & POLLOUT)
        p->tx_blocked = false;
    if (fds[NET_ON_TAP].revents & (POLLERR | POLLNVAL) && p->attached) {
        p->tx_blocked = false; /* what is sent now is refused, and dropped */
        p->gone = true;
        p->rx.counters.tap_gone++;
        loop_signal(p->device->event_fd);
    }
}

static void *net_pair_main(void *argument)
{
    struct net_pair *p = argument;
    struct pollfd fds[NET_FDS] = {{-1, 0, 0}, {-1, 0, 0}, {-1, 0, 0}, {-1, 0, 0}};
    pthread_mutex_lock(&p->lock);
    while (!p->closing) {
        if (__builtin_expect(p->device->fault.freeze || p->device->fault.delay_ms, 0))
            net_suffer(p);
        net_take_events(p, fds);
        p->rx.counters.epoch++;
        p->tx.counters.epoch++;
        bool more = net_transmit(p);
        more |= net_receive(p);
        net_watch(p, fds);
        pthread_mutex_unlock(&p->lock);
        /* Also with work at hand: a turn of a nudge, and the kicks that came meanwhile, are taken at once. */
        if (poll(fds, NET_FDS, more ? 0 : -1) < 0)
            fds[0].revents = fds[1].revents = fds[2].revents = fds[3].revents = 0;
        pthread_mutex_lock(&p->lock);
        while (__atomic_load_n(&p->wanted, __ATOMIC_SEQ_CST))
            pthread_cond_wait(&p->turn, &p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

#endif
