/* The device's API for ctypes; see blk.h. */
#define _GNU_SOURCE
#include <sys/eventfd.h>

#include "blk_ring.h"

static void blk_free_tables(struct blk_memory *memory)
{
    while (memory) {
        struct blk_memory *former = memory->former;
        free(memory);
        memory = former;
    }
}

static void blk_free(struct blk_device *d)
{
    blk_free_tables(d->memory);
    for (uint32_t i = 0; i < d->config.num_queues; i++) {
        free(d->queue[i].request);
        free(d->queue[i].resubmit);
        if (d->queue[i].control_fd >= 0)
            close(d->queue[i].control_fd);
    }
    if (d->event_fd >= 0)
        close(d->event_fd);
    free(d->pool.thread);
    free(d->pool.pulse);
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
    pthread_rwlockattr_t fair; /* else a busy queue keeps another's suspect waiting for ever */
    pthread_rwlockattr_init(&fair);
    pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&d->trial, &fair);
    pthread_rwlockattr_destroy(&fair);
    pthread_cond_init(&d->fault_changed, NULL);
    d->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d->pool.thread = calloc(config->io_threads + 1, sizeof(pthread_t));
    d->pool.pulse = calloc(config->io_threads + 1, sizeof(struct blk_pulse));
    d->memory = calloc(1, sizeof(*d->memory));
    bool complete = d->event_fd >= 0 && d->pool.thread && d->pool.pulse && d->memory;
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
    if (!running) {
        blk_free_tables(memory->former);
        memory->former = NULL;
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
            loop_signal(d->queue[i].control_fd);
}

static bool blk_moved(struct blk_pulse *pulse)
{
    uint64_t turns = __atomic_load_n(&pulse->turns, __ATOMIC_RELAXED);
    bool moved = turns != pulse->seen || __atomic_load_n(&pulse->held, __ATOMIC_RELAXED);
    pulse->seen = turns;
    return moved;
}

int blk_alive(struct blk_device *d)
{
    bool alive = true;
    for (uint32_t i = 0; i < d->config.num_queues; i++)
        if (d->queue[i].running && !blk_moved(&d->queue[i].pulse))
            alive = false;
    pthread_mutex_lock(&d->pool.lock);
    uint32_t threads = d->pool.threads;
    pthread_mutex_unlock(&d->pool.lock);
    for (uint32_t i = 0; i < threads; i++)
        if (!blk_moved(&d->pool.pulse[i]) && __atomic_load_n(&d->pool.pulse[i].busy, __ATOMIC_RELAXED))
            alive = false;
    return alive;
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
    __atomic_store_n(&d->armed, fault->kinds || fault->freeze || fault->die_on_sector, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&d->fault_changed);
    pthread_mutex_unlock(&d->fault_lock);
    for (uint32_t i = 0; i < d->config.num_queues; i++) {
        pthread_mutex_lock(&d->queue[i].lock);
        d->queue[i].vring.die_at = (uint16_t)fault->die_at;
        d->queue[i].vring.die_after = fault->die_after;
        d->queue[i].calls_fault = (struct loop_calls){fault->withhold, fault->repeat};
        pthread_mutex_unlock(&d->queue[i].lock);
    }
}

uint32_t blk_abi_size(uint32_t which)
{
    static const uint32_t sizes[] = {
        sizeof(struct blk_config), sizeof(struct vring_setup), sizeof(struct blk_op_counters),
        sizeof(struct blk_counters), sizeof(struct blk_fault), sizeof(struct vring_region),
    };
    return which < sizeof(sizes) / sizeof(sizes[0]) ? sizes[which] : 0;
}

/* ------------------------------------------------------------------ queues */

/* One entry per head. */
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

int blk_start(struct blk_device *d, const struct vring_setup *setup)
{
    if (setup->index >= d->config.num_queues || !vring_setup_valid(setup))
        return -EINVAL;
    struct blk_queue *q = &d->queue[setup->index];
    if (q->running)
        return -EBUSY;
    if (!blk_make_room(q, setup->size))
        return -ENOMEM;
    q->kick_fd = setup->kick_fd;
    q->call_fd = setup->call_fd;
    q->inflight = 0;
    q->ring_done = false;
    q->stopping = false;
    q->counters.broken = 0;
    q->counters.inflight = 0;
    loop_drain(q->control_fd);
    if (vring_set_up(&q->vring, setup, &d->memory->table, d->log, d->log_size, q->resubmit, &q->resubmits))
        return -EINVAL;
    int error = loop_spawn(&q->thread, blk_ring_main, q);
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
    loop_signal(d->queue[index].control_fd);
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
