/* Returning requests, the pool of I/O threads, and the ring threads. Part of blk.c; see blk.h. */
#ifndef FLOTILLA_BLK_RING_H
#define FLOTILLA_BLK_RING_H

#include <poll.h>

#include "blk_io.h"

static uint64_t blk_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ------------------------------------------------------------------ returning requests */

static uint32_t blk_bucket_of(uint64_t us)
{
    uint32_t bits = us ? 64 - (uint32_t)__builtin_clzll(us) : 0;
    uint32_t bucket = bits > BLK_LATENCY_SHIFT ? bits - BLK_LATENCY_SHIFT : 0;
    return bucket < BLK_LATENCY_BUCKETS ? bucket : BLK_LATENCY_BUCKETS - 1;
}

static void blk_account(struct blk_queue *q, const struct blk_request *request, const struct blk_outcome *o)
{
    struct blk_op_counters *op = &q->counters.op[o->kind];
    uint64_t us = (blk_now_ns() - request->began_ns) / 1000;
    if (o->malformed) {
        q->counters.malformed++;
        q->counters.last_malformed = o->malformed;
        loop_signal(q->device->event_fd);
        return;
    }
    q->counters.syncs += o->synced;
    q->counters.bounced += o->bounced;
    if (o->status != BLK_S_OK) {
        q->counters.errors += o->status == BLK_S_IOERR;
        q->counters.unsupported += o->status == BLK_S_UNSUPP;
        if (o->error) {
            q->counters.io_errno = (uint64_t)o->error;
            loop_signal(q->device->event_fd);
        }
        return;
    }
    op->ops++;
    op->bytes += o->bytes;
    op->latency_sum_us += us;
    op->latency_bucket[blk_bucket_of(us)]++;
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
        loop_call(q->call_fd, &q->calls_fault);
    }
    q->inflight -= count;
    q->counters.inflight = q->inflight;
    if (!q->inflight && q->ring_done) {
        pthread_cond_signal(&q->drained);
        loop_signal(q->device->event_fd);
    }
}

static void blk_complete(struct blk_request *request, const struct vring_chain *chain, uint32_t len,
                         const struct blk_outcome *outcome, bool publish)
{
    struct blk_queue *q = request->queue;
    pthread_mutex_lock(&q->lock);
    vring_reached(&q->vring, VRING_STEP_DONE);
    /* Under the lock, which blk_set_log takes: a write that saw no log is over before the log begins. */
    for (uint32_t i = chain->readable; i < chain->readable + chain->writable; i++)
        vring_mark(&q->vring, chain->gpa[i], chain->len[i]);
    blk_account(q, request, outcome);
    request->busy = false;
    vring_add_used(&q->vring, request->head, len);
    if (publish)
        blk_publish_locked(q);
    pthread_mutex_unlock(&q->lock);
}

/* With BLK_TRIAL, suspects about or not, whatever else is carried out keeps out of their trials. */
static bool blk_enter(struct blk_device *d)
{
    bool trial = d->config.flags & BLK_TRIAL;
    if (trial) {
        blk_held(true); /* a trial lasts as long as the disk likes */
        pthread_rwlock_rdlock(&d->trial);
        blk_held(false);
    }
    return trial;
}

static void blk_leave(struct blk_device *d, bool trial)
{
    if (trial)
        pthread_rwlock_unlock(&d->trial);
}

static void blk_run(struct blk_request *request, struct blk_scratch *scratch)
{
    struct blk_outcome outcome;
    uint32_t len;
    bool trial = blk_enter(request->queue->device);
    blk_execute(request, scratch, BLK_MAY_BLOCK, &outcome, &len);
    blk_leave(request->queue->device, trial);
    blk_complete(request, &scratch->chain, len, &outcome, true);
}

/* A request that may have killed the worker before, with nothing else under way on this disk. */
static void blk_run_suspect(struct blk_request *request, struct blk_scratch *scratch)
{
    struct blk_queue *q = request->queue;
    uint8_t attempts = vring_attempts(&q->vring, request->head);
    struct blk_outcome outcome;
    uint32_t len;
    blk_held(true);
    pthread_rwlock_wrlock(&q->device->trial);
    blk_held(false);
    vring_try(&q->vring, request->head);
    if (attempts < VRING_POISON)
        blk_execute(request, scratch, BLK_MAY_BLOCK, &outcome, &len);
    else
        blk_refuse(request, scratch, attempts > VRING_POISON, &outcome, &len);
    blk_complete(request, &scratch->chain, len, &outcome, true);
    pthread_rwlock_unlock(&q->device->trial);
    if (attempts >= VRING_POISON)
        loop_signal(q->device->event_fd);
}

/* Only if it need not wait for the disk, though perhaps for a trial; blk_publish_locked is to follow. */
static bool blk_run_cached(struct blk_request *request, struct blk_scratch *scratch)
{
    struct blk_outcome outcome;
    uint32_t len;
    bool trial = blk_enter(request->queue->device);
    bool done = blk_execute(request, scratch, BLK_CACHED_ONLY, &outcome, &len);
    blk_leave(request->queue->device, trial);
    if (!done)
        return false;
    blk_complete(request, &scratch->chain, len, &outcome, false);
    return true;
}

/* ------------------------------------------------------------------ pool */

static void *blk_io_main(void *argument)
{
    struct blk_device *d = argument;
    struct blk_pool *pool = &d->pool;
    struct blk_scratch scratch;
    scratch.bounce = NULL;
    pthread_mutex_lock(&pool->lock);
    /* Whoever made this thread has counted it before letting go of the lock. */
    uint32_t number = 0;
    while (!pthread_equal(pool->thread[number], pthread_self()))
        number++;
    struct blk_pulse *pulse = blk_pulse = &pool->pulse[number];
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
        __atomic_store_n(&pulse->turns, pulse->turns + 1, __ATOMIC_RELAXED);
        __atomic_store_n(&pulse->busy, 1, __ATOMIC_RELAXED);
        blk_run(request, &scratch);
        __atomic_store_n(&pulse->busy, 0, __ATOMIC_RELAXED);
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
        && !loop_spawn(&pool->thread[pool->threads], blk_io_main, d))
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
            loop_signal(q->device->event_fd);
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
        blk_run(batch[0], scratch);
        return;
    }
    for (uint32_t i = 0; i < count; i++)
        if (!blk_run_cached(batch[i], scratch) && !blk_submit(q->device, batch[i]))
            blk_run(batch[i], scratch);
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
    bool trial = q->device->config.flags & BLK_TRIAL;
    if (trial && q->resubmits)
        vring_blame(&q->vring, q->resubmit, q->resubmits, q->device->config.flags & BLK_BLAME);
    for (uint32_t i = 0; i < q->resubmits; i++) {
        struct blk_request *request = &q->request[q->resubmit[i].head];
        __atomic_store_n(&q->pulse.turns, q->pulse.turns + 1, __ATOMIC_RELAXED);
        if (trial && vring_attempts(&q->vring, request->head))
            blk_run_suspect(request, scratch);
        else if (!blk_submit(q->device, request))
            blk_run(request, scratch);
    }
    /* The predecessor may have died between its index and its notification. */
    loop_signal(q->call_fd);
}

/* Wait for a kick or a control event, a heartbeat or a stop: either repairs a notification that got lost. */
static void blk_wait(struct blk_queue *q)
{
    struct pollfd fds[2] = {{q->control_fd, POLLIN, 0}, {q->kick_fd, POLLIN, 0}};
    if (q->counters.broken)
        fds[1].fd = -1;
    if (poll(fds, 2, -1) <= 0)
        return;
    if (fds[0].revents && loop_drain(q->control_fd)) {
        pthread_mutex_lock(&q->lock);
        if (vring_remind(&q->vring))
            loop_signal(q->call_fd);
        pthread_mutex_unlock(&q->lock);
    }
    if (fds[1].revents && loop_drain(q->kick_fd))
        q->counters.kicks++;
}

static void *blk_ring_main(void *argument)
{
    struct blk_queue *q = argument;
    struct blk_request *batch[BLK_BATCH];
    struct blk_scratch scratch;
    scratch.bounce = NULL;
    blk_pulse = &q->pulse;
    blk_resubmit(q, &scratch);
    while (!__atomic_load_n(&q->stopping, __ATOMIC_ACQUIRE)) {
        if (__builtin_expect(__atomic_load_n(&q->device->armed, __ATOMIC_RELAXED), 0))
            blk_freeze(q->device);
        pthread_mutex_lock(&q->lock);
        q->counters.epoch++;
        __atomic_store_n(&q->pulse.turns, q->pulse.turns + 1, __ATOMIC_RELAXED);
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
        loop_signal(q->device->event_fd);
    pthread_mutex_unlock(&q->lock);
    return NULL;
}

#endif
