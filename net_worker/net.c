/* The device's API for ctypes; see net.h. */
#define _GNU_SOURCE
#include <sys/eventfd.h>

#include "net_pair.h"

static void net_free(struct net_device *d)
{
    for (uint32_t i = 0; i < d->pairs && d->pair[i]; i++) {
        if (d->pair[i]->control_fd >= 0)
            close(d->pair[i]->control_fd);
        free(d->pair[i]);
    }
    if (d->event_fd >= 0)
        close(d->event_fd);
    free(d->memory);
    free(d);
}

static struct net_pair *net_new_pair(struct net_device *d, int tap)
{
    struct net_pair *p = calloc(1, sizeof(*p));
    if (!p)
        return NULL;
    p->device = d;
    p->tap = tap;
    p->attached = true;
    p->rx.kick_fd = p->rx.call_fd = p->tx.kick_fd = p->tx.call_fd = -1;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->turn, NULL);
    p->control_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return p;
}

struct net_device *net_create(uint32_t pairs, const int32_t *taps)
{
    errno = EINVAL;
    if (!pairs || pairs > NET_MAX_PAIRS)
        return NULL;
    errno = ENOMEM;
    struct net_device *d = calloc(1, sizeof(*d) + pairs * sizeof(d->pair[0]));
    if (!d)
        return NULL;
    d->pairs = pairs;
    d->header = NET_HEADER;
    d->ctrl.queue.kick_fd = d->ctrl.queue.call_fd = -1;
    d->memory = calloc(1, sizeof(*d->memory));
    d->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    bool complete = d->memory && d->event_fd >= 0;
    for (uint32_t i = 0; i < pairs && complete; i++) {
        d->pair[i] = net_new_pair(d, taps[i]);
        complete = d->pair[i] && d->pair[i]->control_fd >= 0;
    }
    if (!complete) {
        int error = errno;
        net_free(d);
        errno = error;
        return NULL;
    }
    return d;
}

void net_destroy(struct net_device *d)
{
    for (uint32_t i = 0; i < d->pairs; i++) {
        struct net_pair *p = d->pair[i];
        net_enter(p);
        p->closing = true;
        net_leave(p);
        if (p->alive)
            pthread_join(p->thread, NULL);
    }
    net_free(d);
}

static void net_enter_all(struct net_device *d)
{
    for (uint32_t i = 0; i < d->pairs; i++)
        net_enter(d->pair[i]);
}

static void net_leave_all(struct net_device *d)
{
    for (uint32_t i = 0; i < d->pairs; i++)
        net_leave(d->pair[i]);
}

/* Every queue of the device, the control queue last; NULL behind it. */
static struct net_queue *net_queue_at(struct net_device *d, uint32_t index)
{
    if (index >= 2 * d->pairs)
        return index == 2 * d->pairs ? &d->ctrl.queue : NULL;
    struct net_pair *p = d->pair[index / 2];
    return index % 2 ? &p->tx : &p->rx;
}

int net_set_memory(struct net_device *d, const struct vring_region *regions, uint32_t count)
{
    struct vring_memory *former = d->memory, *memory = malloc(sizeof(*memory) + count * sizeof(*regions));
    struct net_queue *q;
    if (!memory)
        return -ENOMEM;
    memory->count = count;
    if (count)
        memcpy(memory->region, regions, count * sizeof(*regions));
    net_enter_all(d);
    d->memory = memory;
    d->ctrl.taken = false; /* its buffers are addresses of the former table: it is taken anew */
    for (uint32_t i = 0; (q = net_queue_at(d, i)); i++)
        q->vring.memory = memory;
    net_leave_all(d);
    free(former);
    return 0;
}

void net_set_log(struct net_device *d, uint64_t address, uint64_t size)
{
    struct net_queue *q;
    net_enter_all(d);
    d->log = (uint8_t *)(uintptr_t)address;
    d->log_size = address ? size : 0;
    for (uint32_t i = 0; (q = net_queue_at(d, i)); i++) {
        q->vring.log = d->log;
        q->vring.log_size = d->log_size;
    }
    net_leave_all(d);
}

int net_set_format(struct net_device *d, uint32_t header, uint32_t mergeable)
{
    if (header != NET_HEADER && (header != NET_LEGACY_HEADER || mergeable))
        return -EINVAL;
    net_enter_all(d);
    for (uint32_t i = 0; i < d->pairs; i++)
        if (header != d->header)
            d->pair[i]->held = 0;
    d->header = header;
    d->mergeable = mergeable;
    net_leave_all(d);
    return 0;
}

int net_set_attached(struct net_device *d, uint32_t pair, uint32_t attached)
{
    if (pair >= d->pairs)
        return -EINVAL;
    net_enter(d->pair[pair]);
    d->pair[pair]->attached = attached;
    net_leave(d->pair[pair]);
    return 0;
}

static int net_start_ring(struct net_device *d, struct net_queue *q, const struct vring_setup *setup)
{
    struct vring_setup plain = *setup;
    struct vring_resubmit nothing;
    uint32_t none;
    plain.inflight = 0;
    if (vring_set_up(&q->vring, &plain, d->memory, d->log, d->log_size, &nothing, &none))
        return -EINVAL;
    q->vring.last_avail = q->vring.avail_seen = q->vring.used_idx;
    q->kick_fd = setup->kick_fd;
    q->call_fd = setup->call_fd;
    q->counters.broken = 0;
    if (d->trial && setup->index % 2 && q != &d->ctrl.queue)
        net_begin_trial(q, setup, d->blame);
    q->running = true;
    /* The predecessor may have died between its index and its notification. */
    loop_signal(q->call_fd);
    return 0;
}

int net_start(struct net_device *d, const struct vring_setup *setup)
{
    struct net_queue *q = net_queue_at(d, setup->index);
    if (!q || !vring_setup_valid(setup))
        return -EINVAL;
    if (q->running)
        return -EBUSY;
    if (q == &d->ctrl.queue) {
        d->ctrl.taken = false;
        return net_start_ring(d, q, setup);
    }
    struct net_pair *p = d->pair[setup->index / 2];
    if (!p->alive) {
        int error = loop_spawn(&p->thread, net_pair_main, p);
        if (error)
            return -error;
        p->alive = true;
    }
    net_enter(p);
    int result = net_start_ring(d, q, setup);
    net_leave(p);
    return result;
}

int net_stop(struct net_device *d, uint32_t index)
{
    struct net_queue *q = net_queue_at(d, index);
    if (!q)
        return -EINVAL;
    if (q == &d->ctrl.queue) {
        q->running = false;
        return q->vring.used_idx;
    }
    net_enter(d->pair[index / 2]);
    q->running = false;
    q->record = NULL; /* the region may be unmapped now */
    net_leave(d->pair[index / 2]);
    return q->vring.used_idx;
}

void net_nudge(struct net_device *d)
{
    for (uint32_t i = 0; i < d->pairs; i++)
        loop_signal(d->pair[i]->control_fd);
}

int net_event_fd(struct net_device *d)
{
    return d->event_fd;
}

const struct net_counters *net_counters(struct net_device *d, uint32_t index)
{
    struct net_queue *q = net_queue_at(d, index);
    return q ? &q->counters : NULL;
}

void net_set_trial(struct net_device *d, uint32_t blame)
{
    d->trial = true;
    d->blame = blame;
}

void net_set_lethal(struct net_device *d, uint32_t ethertype)
{
    net_enter_all(d);
    d->lethal = ethertype;
    net_leave_all(d);
}

void net_set_fault(struct net_device *d, const struct net_fault *fault)
{
    struct net_queue *q;
    net_enter_all(d);
    d->fault = *fault;
    for (uint32_t i = 0; (q = net_queue_at(d, i)); i++) {
        q->vring.die_at = (uint16_t)fault->die_at;
        q->vring.die_after = fault->die_after;
        q->calls_fault = (struct loop_calls){fault->withhold, fault->repeat};
    }
    net_leave_all(d);
}

uint32_t net_abi_size(uint32_t which)
{
    static const uint32_t sizes[] = {
        sizeof(struct net_counters), sizeof(struct vring_setup), sizeof(struct net_fault), sizeof(struct vring_region),
    };
    return which < sizeof(sizes) / sizeof(sizes[0]) ? sizes[which] : 0;
}

/* ------------------------------------------------------------------ the control queue */

static int net_ctrl_pop(struct net_ctrl *c)
{
    struct vring *v = &c->queue.vring;
    do {
        vring_disable_notify(v);
        int popped = vring_pop(v, &c->head);
        if (popped < 0)
            return popped;
        if (popped) {
            vring_unpop(v, 1); /* until it is answered */
            enum vring_error error = vring_parse(v, c->head, &c->chain);
            if (!error && (c->chain.readable_bytes < 2 || !c->chain.writable_bytes))
                error = VRING_BAD_REQUEST;
            return error ? -(int)error : 1;
        }
    } while (vring_enable_notify(v));
    return 0;
}

int net_ctrl_take(struct net_device *d, uint8_t *out, uint32_t room)
{
    struct net_ctrl *c = &d->ctrl;
    uint32_t done = 0;
    if (!c->queue.running || c->queue.counters.broken)
        return 0;
    c->taken = false;
    int popped = net_ctrl_pop(c);
    if (popped < 0)
        net_break(d, &c->queue, (enum vring_error)-popped);
    if (popped <= 0)
        return popped;
    c->taken = true;
    for (uint32_t i = 0; i < c->chain.readable && done < room; i++) {
        size_t n = c->chain.iov[i].iov_len < room - done ? c->chain.iov[i].iov_len : room - done;
        memcpy(out + done, c->chain.iov[i].iov_base, n);
        done += (uint32_t)n;
    }
    return (int)done;
}

void net_ctrl_answer(struct net_device *d, uint32_t ack)
{
    struct net_ctrl *c = &d->ctrl;
    struct vring *v = &c->queue.vring;
    if (!c->taken || !c->queue.running)
        return;
    c->taken = false;
    *(volatile uint8_t *)c->chain.iov[c->chain.readable].iov_base = (uint8_t)ack;
    vring_reached(v, VRING_STEP_DONE);
    vring_mark(v, c->chain.gpa[c->chain.readable], 1);
    v->last_avail++;
    c->queue.counters.frames++;
    vring_add_used(v, c->head, 1);
    net_publish(&c->queue);
}
