/* What a device is made of. Part of net.c; see net.h. */
#ifndef FLOTILLA_NET_DEVICE_H
#define FLOTILLA_NET_DEVICE_H

#include "net.h"

struct net_queue {
    struct vring vring;
    int kick_fd;
    int call_fd;
    bool running;
    struct loop_calls calls_fault;
    struct vring_inflight_desc *record; /* tx only, while frames are tried one by one: net_trial.h */
    uint32_t suspects;                  /* … so many are left */
    struct net_counters counters;
};

struct net_buffer { /* a chain for the guest to receive into, taken and parsed */
    uint16_t head;
    uint16_t iovs;
    uint64_t bytes;
};

/* Buffers taken ahead, oldest first, so that one readv can fill several. Given back whole by net_forget. */
struct net_window {
    uint32_t first, heads; /* in buffer[], which wraps */
    uint32_t at, iovs;     /* in iov[] and gpa[], which does not */
    uint64_t bytes;
    bool full;             /* a further chain did not fit */
    struct net_buffer buffer[NET_WINDOW_HEADS];
    struct iovec iov[2 * NET_MAX_IOV + 1];
    uint64_t gpa[2 * NET_MAX_IOV];
};

struct net_pair {
    struct net_device *device;
    pthread_mutex_t lock; /* everything below but `wanted` */
    pthread_cond_t turn;
    uint32_t wanted; /* atomic: callers of net_enter */
    pthread_t thread;
    bool alive;      /* the thread exists; the API's thread only */
    bool closing;
    int control_fd;  /* eventfd: take a turn */
    int tap;
    bool attached;
    bool gone;       /* the TAP answers with errors: left alone until it is attached or a queue started */
    bool tx_blocked; /* until POLLOUT */
    bool rx_starved; /* until the rx kick */
    uint32_t held;   /* bytes of a packet in `bounce` that waits for buffers, 0: none */
    struct net_queue rx, tx;
    struct net_window window;
    struct vring_chain chain; /* of the moment */
    uint8_t bounce[NET_MAX_PACKET + 64];
};

struct net_ctrl {
    struct net_queue queue;
    bool taken; /* `chain` waits for its answer, its head is `head` */
    uint16_t head;
    struct vring_chain chain;
};

struct net_device {
    uint32_t pairs;
    uint32_t header;
    bool mergeable;
    bool trial, blame; /* net_set_trial */
    uint32_t lethal;   /* for tests: an EtherType that kills, 0: none */
    int event_fd;
    struct vring_memory *memory;
    uint8_t *log;
    uint64_t log_size;
    struct net_ctrl ctrl;
    struct net_fault fault;
    struct net_pair *pair[];
};

static void net_break(struct net_device *d, struct net_queue *q, enum vring_error error)
{
    q->counters.malformed++;
    q->counters.last_malformed = q->counters.broken = (uint64_t)error;
    loop_signal(d->event_fd);
}

static void net_publish(struct net_queue *q)
{
    if (vring_publish(&q->vring) && vring_should_notify(&q->vring)) {
        q->counters.calls++;
        loop_call(q->call_fd, &q->calls_fault);
    }
}

#endif
