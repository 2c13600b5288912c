/* What native loops with threads have in common: starting a thread, eventfds. */
#ifndef FLOTILLA_LOOP_H
#define FLOTILLA_LOOP_H

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

#define LOOP_STACK_BYTES (1u << 20) /* reserved, not touched: a scratch takes 40 KiB of it when chains are long */

static inline int loop_spawn(pthread_t *thread, void *(*main)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, LOOP_STACK_BYTES);
    sigfillset(&all); /* signals are for the main thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, &attributes, main, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

static inline void loop_signal(int fd)
{
    uint64_t one = 1;
    /* EAGAIN means that it is signalled as often as it can be. */
    if (fd >= 0 && write(fd, &one, sizeof(one)) < 0)
        return;
}

/* A rehearsed fault of notifications: so many are kept back, then so many are sent twice. */
struct loop_calls {
    uint32_t withhold, repeat;
};

static inline void loop_call(int fd, struct loop_calls *fault)
{
    if (__builtin_expect(fault->withhold, 0)) {
        fault->withhold--;
        return;
    }
    loop_signal(fd);
    if (__builtin_expect(fault->repeat, 0)) {
        fault->repeat--;
        loop_signal(fd);
    }
}

/* Whether the eventfd (non-blocking) was signalled. */
static inline bool loop_drain(int fd)
{
    uint64_t count;
    return read(fd, &count, sizeof(count)) == sizeof(count);
}

#endif
