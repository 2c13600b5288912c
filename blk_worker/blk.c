/* Queues, ring threads and the pool of I/O threads; see blk.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "blk.h"

static void blk_complete(struct blk_request *request, const struct vring_chain *chain, uint32_t len,
                         const struct blk_outcome *outcome, bool publish);

#include "blk_io.h"

#define BLK_STACK_BYTES (1u << 20) /* reserved, not touched: a scratch takes 40 KiB of it when chains are long */

static uint64_t blk_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void blk_signal(int fd)
{
    uint64_t one = 1;
    /* EAGAIN means that it is signalled as often as it can be. */
    if (fd >= 0 && write(fd, &one, sizeof(one)) < 0)
        return;
}

/* Whether the eventfd (non-blocking) was signalled. */
static bool blk_drain(int fd)
{
    uint64_t count;
    return read(fd, &count, sizeof(count)) == sizeof(count);
}

/* ------------------------------------------------------------------ returning requests */

static void blk_account(struct blk_queue *q, const struct blk_request *request, const struct blk_outcome *o)
{
    struct blk_op_counters *op = &q->counters.op[o->kind];
    uint64_t us = (blk_now_ns() - request->began_ns) / 1000;
    if (o->malformed) {
        q->counters.malformed++;
        q->counters.last_malformed = o->malformed;
        blk_signal(q->device->event_fd);
        return;
    }
    if (o->status != BLK_S_OK) {
        q->counters.errors += o->status == BLK_S_IOERR;
        q->counters.unsupported += o->status == BLK_S_UNSUPP;
        if (o->error) {
            q->counters.io_errno = (uint64_t)o->error;
            blk_signal(q->device->event_fd);
        }
        return;
    }
    op->ops++;
    op->bytes += o->bytes;
    op->latency_sum_us += us;
    if (us < op->latency_min_us)
        op->latency_min_us = us;
    if (us > op->latency_max_us)
        op->latency_max_us = us;
}

/* Show the driver what was added, notify it, and only then let go: "drained" promises that no notification follows. */
static void blk_publish_locked(struct blk_queue *q)
{
    uint16_t count = vring_publish(&q->vring);
    if (!count)
        return;
    if (vring_should_notify(&q->vring)) {
        q->counters.calls++;
        blk_signal(q->call_fd);
    }
    q->inflight -= count;
    q->counters.inflight = q->inflight;
    if (!q->inflight && q->ring_done) {
        pthread_cond_signal(&q->drained);
        blk_signal(q->device->event_fd);
    }
}

/* Answer a request. `chain`: what the device may have written to; NULL if nothing. */
static void blk_complete(struct blk_request *request, const struct vring_chain *chain, uint32_t len,
                         const struct blk_outcome *outcome, bool publish)
{
    struct blk_queue *q = request->queue;
    pthread_mutex_lock(&q->lock);
    vring_reached(&q->vring, VRING_STEP_DONE);
    /* Under the lock, which blk_set_log takes: a write that saw no log is over before the log begins. */
    if (chain)
        for (uint32_t i = chain->readable; i < chain->readable + chain->writable; i++)
            vring_mark(&q->vring, chain->gpa[i], chain->len[i]);
    blk_account(q, request, outcome);
    request->busy = false;
    vring_add_used(&q->vring, request->head, len);
    if (publish)
        blk_publish_locked(q);
    pthread_mutex_unlock(&q->lock);
}

/* ------------------------------------------------------------------ pool */

static int blk_spawn(pthread_t *thread, void *(*main)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, BLK_STACK_BYTES);
    sigfillset(&all); /* signals are for the main thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, &attributes, main, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

static void *blk_io_main(void *argument)
{
    struct blk_device *d = argument;
    struct blk_pool *pool = &d->pool;
    struct blk_scratch scratch;
    scratch.bounce = NULL;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->head && !pool->closing) {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        }
        struct blk_request *request = pool->head;
        if (!request)
            break;
        pool->head = request->next;
        if (!pool->head)
            pool->tail = &pool->head;
        pool->queued--;
        pthread_mutex_unlock(&pool->lock);
        blk_execute(request, &scratch, BLK_MAY_BLOCK);
        pthread_mutex_lock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    free(scratch.bounce);
    return NULL;
}

/* false: there is no thread and none can be had. */
static bool blk_submit(struct blk_device *d, struct blk_request *request)
{
    struct blk_pool *pool = &d->pool;
    pthread_mutex_lock(&pool->lock);
    if (pool->queued + 1 > pool->idle && pool->threads < pool->limit
        && !blk_spawn(&pool->thread[pool->threads], blk_io_main, d))
        pool->threads++;
    bool taken = pool->threads;
    if (taken) {
        request->next = NULL;
        *pool->tail = request;
        pool->tail = &request->next;
        pool->queued++;
        pthread_cond_signal(&pool->work);
    }
    pthread_mutex_unlock(&pool->lock);
    return taken;
}

/* ------------------------------------------------------------------ ring thread */

/* Take up to BLK_BATCH requests. The queue's lock is held. */
static uint32_t blk_pop(struct blk_queue *q, struct blk_request **batch)
{
    uint32_t count = 0;
    uint64_t now = 0;
    while (count < BLK_BATCH && !q->counters.broken) {
        uint16_t head;
        int popped = vring_pop(&q->vring, &head);
        if (!popped)
            break;
        if (popped > 0 && q->request[head].busy)
            popped = -VRING_HEAD_IN_USE;
        if (popped < 0) {
            q->counters.broken = (uint64_t)-popped;
            blk_signal(q->device->event_fd);
            break;
        }
        if (!now)
            now = blk_now_ns();
        q->request[head].busy = true;
        q->request[head].began_ns = now;
        batch[count++] = &q->request[head];
    }
    q->inflight += count;
    q->counters.inflight = q->inflight;
    return count;
}

static void blk_dispatch(struct blk_queue *q, struct blk_request **batch, uint32_t count, bool alone,
                         struct blk_scratch *scratch)
{
    /* Nothing else in flight: a hand-over would cost more than it could win, and nobody waits behind it yet. */
    if (alone) {
        blk_execute(batch[0], scratch, BLK_MAY_BLOCK);
        return;
    }
    for (uint32_t i = 0; i < count; i++)
        if (!blk_execute(batch[i], scratch, BLK_CACHED_ONLY) && !blk_submit(q->device, batch[i]))
            blk_execute(batch[i], scratch, BLK_MAY_BLOCK);
    pthread_mutex_lock(&q->lock);
    blk_publish_locked(q);
    pthread_mutex_unlock(&q->lock);
}

/* What a predecessor had taken and not returned, oldest first. Marked in the inflight region already. */
static void blk_resubmit(struct blk_queue *q, struct blk_scratch *scratch)
{
    uint64_t now = blk_now_ns();
    pthread_mutex_lock(&q->lock);
    for (uint32_t i = 0; i < q->resubmits; i++) {
        q->request[q->resubmit[i].head].busy = true;
        q->request[q->resubmit[i].head].began_ns = now;
    }
    q->inflight = q->resubmits;
    q->counters.inflight = q->inflight;
    q->counters.resubmitted += q->resubmits;
    pthread_mutex_unlock(&q->lock);
    for (uint32_t i = 0; i < q->resubmits; i++)
        if (!blk_submit(q->device, &q->request[q->resubmit[i].head]))
            blk_execute(&q->request[q->resubmit[i].head], scratch, BLK_MAY_BLOCK);
    /* The predecessor may have died between its index and its notification. */
    blk_signal(q->call_fd);
}

/* Wait for a kick or a control event. */
static void blk_wait(struct blk_queue *q)
{
    struct pollfd fds[2] = {{q->control_fd, POLLIN, 0}, {q->kick_fd, POLLIN, 0}};
    if (q->counters.broken)
        fds[1].fd = -1;
    if (poll(fds, 2, -1) <= 0)
        return;
    if (fds[0].revents)
        blk_drain(q->control_fd);
    if (fds[1].revents && blk_drain(q->kick_fd))
        q->counters.kicks++;
}

static void *blk_ring_main(void *argument)
{
    struct blk_queue *q = argument;
    struct blk_request *batch[BLK_BATCH];
    struct blk_scratch scratch;
    scratch.bounce = NULL;
    blk_resubmit(q, &scratch);
    while (!__atomic_load_n(&q->stopping, __ATOMIC_ACQUIRE)) {
        pthread_mutex_lock(&q->lock);
        q->counters.epoch++;
        vring_disable_notify(&q->vring);
        uint32_t count = blk_pop(q, batch);
        bool alone = count == 1 && q->inflight == 1;
        bool more = count || (!q->counters.broken && vring_enable_notify(&q->vring));
        pthread_mutex_unlock(&q->lock);
        if (count)
            blk_dispatch(q, batch, count, alone, &scratch);
        else if (!more)
            blk_wait(q);
    }
    free(scratch.bounce);
    pthread_mutex_lock(&q->lock);
    q->ring_done = true;
    pthread_cond_signal(&q->drained);
    if (!q->inflight)
        blk_signal(q->device->event_fd);
    pthread_mutex_unlock(&q->lock);
    return NULL;
}

/* ------------------------------------------------------------------ API: device */

static void blk_free(struct blk_device *d)
{
    while (d->memory) {
        struct blk_memory *former = d->memory->former;
        free(d->memory);
        d->memory = former;
    }
    for (uint32_t i = 0; i < d->config.num_queues; i++) {
        free(d->queue[i].request);
        free(d->queue[i].resubmit);
        if (d->queue[i].control_fd >= 0)
            close(d->queue[i].control_fd);
    }
    if (d->event_fd >= 0)
        close(d->event_fd);
    free(d->pool.thread);
    free(d);
}

static bool blk_power_of_two(uint32_t value)
{
    return value && !(value & (value - 1));
}

struct blk_device *blk_create(const struct blk_config *config)
{
    struct blk_device *d = NULL;
    errno = EINVAL;
    if (!config->num_queues || config->num_queues > BLK_MAX_QUEUES || config->io_threads > BLK_MAX_THREADS)
        return NULL;
    if (!blk_power_of_two(config->memory_align) || !blk_power_of_two(config->offset_align)
        || config->memory_align > 4096 || config->offset_align > BLK_BOUNCE_BYTES)
        return NULL;
    errno = ENOMEM;
    d = calloc(1, sizeof(*d) + config->num_queues * sizeof(d->queue[0]));
    if (!d)
        return NULL;
    d->config = *config;
    d->writeback = config->writeback;
    d->pool.tail = &d->pool.head;
    d->pool.limit = config->io_threads;
    pthread_mutex_init(&d->pool.lock, NULL);
    pthread_cond_init(&d->pool.work, NULL);
    pthread_mutex_init(&d->fault_lock, NULL);
    pthread_cond_init(&d->fault_changed, NULL);
    d->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d->pool.thread = calloc(config->io_threads + 1, sizeof(pthread_t));
    d->memory = calloc(1, sizeof(*d->memory));
    bool complete = d->event_fd >= 0 && d->pool.thread && d->memory;
    for (uint32_t i = 0; i < config->num_queues; i++) {
        struct blk_queue *q = &d->queue[i];
        q->device = d;
        q->index = i;
        q->kick_fd = q->call_fd = -1;
        q->control_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        complete = complete && q->control_fd >= 0;
        pthread_mutex_init(&q->lock, NULL);
        pthread_cond_init(&q->drained, NULL);
        for (int kind = 0; kind < BLK_KINDS; kind++)
            q->counters.op[kind].latency_min_us = UINT64_MAX;
    }
    if (!complete) {
        int error = errno;
        blk_free(d);
        errno = error;
        return NULL;
    }
    return d;
}

void blk_destroy(struct blk_device *d)
{
    for (uint32_t i = 0; i < d->config.num_queues; i++)
        blk_stop_request(d, i);
    for (uint32_t i = 0; i < d->config.num_queues; i++)
        blk_stop_wait(d, i);
    pthread_mutex_lock(&d->pool.lock);
    d->pool.closing = true;
    pthread_cond_broadcast(&d->pool.work);
    pthread_mutex_unlock(&d->pool.lock);
    for (uint32_t i = 0; i < d->pool.threads; i++)
        pthread_join(d->pool.thread[i], NULL);
    blk_free(d);
}

int blk_set_memory(struct blk_device *d, const struct vring_region *regions, uint32_t count)
{
    struct blk_memory *memory = malloc(sizeof(*memory) + count * sizeof(*regions));
    bool running = false;
    if (!memory)
        return -ENOMEM;
    memory->table.count = count;
    if (count)
        memcpy(memory->table.region, regions, count * sizeof(*regions));
    memory->former = d->memory;
    d->memory = memory;
    for (uint32_t i = 0; i < d->config.num_queues; i++) {
        running |= d->queue[i].running;
        pthread_mutex_lock(&d->queue[i].lock);
        __atomic_store_n(&d->queue[i].vring.memory, &memory->table, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&d->queue[i].lock);
    }
    /* A request that is being parsed may read a former table: they go when no request can exist. */
    for (struct blk_memory *former = running ? NULL : memory->former; former;) {
        struct blk_memory *next = former->former;
        memory->former = NULL;
        free(former);
        former = next;
    }
    return 0;
}

void blk_set_log(struct blk_device *d, uint64_t address, uint64_t size)
{
    d->log = (uint8_t *)(uintptr_t)address;
    d->log_size = address ? size : 0;
    for (uint32_t i = 0; i < d->config.num_queues; i++) {
        pthread_mutex_lock(&d->queue[i].lock);
        d->queue[i].vring.log = d->log;
        d->queue[i].vring.log_size = d->log_size;
        pthread_mutex_unlock(&d->queue[i].lock);
    }
}

void blk_set_writeback(struct blk_device *d, uint32_t writeback)
{
    __atomic_store_n(&d->writeback, writeback != 0, __ATOMIC_RELAXED);
}

void blk_nudge(struct blk_device *d)
{
    for (uint32_t i = 0; i < d->config.num_queues; i++)
        if (d->queue[i].running)
            blk_signal(d->queue[i].control_fd);
}

int blk_event_fd(struct blk_device *d)
{
    return d->event_fd;
}

const struct blk_counters *blk_counters(struct blk_device *d, uint32_t index)
{
    return index < d->config.num_queues ? &d->queue[index].counters : NULL;
}

void blk_set_fault(struct blk_device *d, const struct blk_fault *fault)
{
    pthread_mutex_lock(&d->fault_lock);
    d->fault = *fault;
    __atomic_store_n(&d->armed, fault->kinds != 0, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&d->fault_changed);
    pthread_mutex_unlock(&d->fault_lock);
    for (uint32_t i = 0; i < d->config.num_queues; i++) {
        pthread_mutex_lock(&d->queue[i].lock);
        d->queue[i].vring.die_at = (uint16_t)fault->die_at;
        d->queue[i].vring.die_after = fault->die_after;
        pthread_mutex_unlock(&d->queue[i].lock);
    }
}

uint32_t blk_abi_size(uint32_t which)
{
    static const uint32_t sizes[] = {
        sizeof(struct blk_config), sizeof(struct blk_queue_config), sizeof(struct blk_op_counters),
        sizeof(struct blk_counters), sizeof(struct blk_fault), sizeof(struct vring_region),
    };
    return which < sizeof(sizes) / sizeof(sizes[0]) ? sizes[which] : 0;
}

/* ------------------------------------------------------------------ API: queues */

/* Room for one entry per head, kept from the last start if the size is the same. */
static bool blk_make_room(struct blk_queue *q, uint16_t size)
{
    free(q->request);
    free(q->resubmit);
    q->request = calloc(size, sizeof(*q->request));
    q->resubmit = calloc(size, sizeof(*q->resubmit));
    if (!q->request || !q->resubmit)
        return false;
    for (uint32_t i = 0; i < size; i++) {
        q->request[i].queue = q;
        q->request[i].head = (uint16_t)i;
    }
    return true;
}

static int blk_set_up_ring(struct blk_queue *q, const struct blk_queue_config *config)
{
    struct vring *v = &q->vring;
    uint16_t die_at = v->die_at;
    uint32_t die_after = v->die_after;
    *v = (struct vring){
        .desc = (void *)(uintptr_t)config->desc,
        .avail = (void *)(uintptr_t)config->avail,
        .used = (void *)(uintptr_t)config->used,
        .inflight = (void *)(uintptr_t)config->inflight,
        .memory = &q->device->memory->table,
        .log = q->device->log,
        .log_size = q->device->log_size,
        .used_gpa = config->used_gpa,
        .size = config->size,
        .event_idx = config->event_idx,
        .indirect = config->indirect,
        .die_at = die_at,
        .die_after = die_after,
    };
    if (v->used_gpa == UINT64_MAX)
        v->used_gpa = vring_gpa_of(v->memory, config->used);
    return vring_start(v, config->base, q->resubmit, &q->resubmits);
}

int blk_start(struct blk_device *d, const struct blk_queue_config *config)
{
    if (config->index >= d->config.num_queues || !blk_power_of_two(config->size) || config->size > VRING_MAX_SIZE)
        return -EINVAL;
    if (config->inflight && config->inflight_desc_num < config->size)
        return -EINVAL;
    struct blk_queue *q = &d->queue[config->index];
    if (q->running)
        return -EBUSY;
    if (!blk_make_room(q, config->size))
        return -ENOMEM;
    q->kick_fd = config->kick_fd;
    q->call_fd = config->call_fd;
    q->inflight = 0;
    q->ring_done = false;
    q->stopping = false;
    q->counters.broken = 0;
    q->counters.inflight = 0;
    blk_drain(q->control_fd);
    if (blk_set_up_ring(q, config))
        return -EINVAL;
    int error = blk_spawn(&q->thread, blk_ring_main, q);
    q->running = !error;
    return -error;
}

int blk_stop_request(struct blk_device *d, uint32_t index)
{
    if (index >= d->config.num_queues)
        return -EINVAL;
    if (!d->queue[index].running)
        return 0;
    __atomic_store_n(&d->queue[index].stopping, true, __ATOMIC_RELEASE);
    blk_signal(d->queue[index].control_fd);
    return 0;
}

int blk_stopped(struct blk_device *d, uint32_t index)
{
    if (index >= d->config.num_queues)
        return -EINVAL;
    struct blk_queue *q = &d->queue[index];
    pthread_mutex_lock(&q->lock);
    bool stopped = !q->running || (q->ring_done && !q->inflight);
    pthread_mutex_unlock(&q->lock);
    return stopped;
}

int blk_stop_wait(struct blk_device *d, uint32_t index)
{
    if (index >= d->config.num_queues)
        return -EINVAL;
    struct blk_queue *q = &d->queue[index];
    if (!q->running)
        return vring_last_avail(&q->vring);
    blk_stop_request(d, index);
    pthread_join(q->thread, NULL);
    pthread_mutex_lock(&q->lock);
    while (q->inflight)
        pthread_cond_wait(&q->drained, &q->lock);
    pthread_mutex_unlock(&q->lock);
    q->running = false;
    return vring_last_avail(&q->vring);
}
