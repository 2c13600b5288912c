/* A heartbeat for a reader outside: one byte 0x80..0xff every tick_us, and the largest gap the guest itself saw. */
#include "probe.h"

struct tick {
    u64 period, next, count;
    u64 last_ns, last_tsc;
    u64 gap_ns, gap_tsc;  /* since the last line */
    u64 worst_ns;         /* since the start */
    bool bytes, spin;
};

static void start(struct task *task)
{
    struct tick *t = task->state = memory_alloc(sizeof(*t), 64);
    u64 us = word_u64("tick_us", 1000);
    t->period = us * 1000;
    t->bytes = word_flag("bytes", true);
    t->spin = word_flag("spin", true);
    if (!us)
        die("tick: tick_us=0");
    if (!t->spin)
        lapic_timer((u32)(1000000 / us));
    t->last_ns = now_ns();
    t->last_tsc = rdtsc();
    t->next = t->last_ns + t->period;
}

static void beat(struct tick *t, u64 now)
{
    t->count++;
    t->next += t->period;
    if (t->next <= now) /* missed beats are not made up for: the outside reader sees the hole */
        t->next = now + t->period;
    if (!t->bytes)
        return;
    lock_take(&uart_lock);
    uart_put((u8)(0x80 | (t->count & 0x7f)));
    lock_drop(&uart_lock);
}

static enum progress step(struct task *task)
{
    struct tick *t = task->state;
    u64 now = now_ns(), tsc = rdtsc();
    if (now - t->last_ns > t->gap_ns)
        t->gap_ns = now - t->last_ns;
    if (tsc - t->last_tsc > t->gap_tsc && tsc > t->last_tsc)
        t->gap_tsc = tsc - t->last_tsc;
    t->last_ns = now;
    t->last_tsc = tsc;
    if (now >= t->next)
        beat(t, now);
    bool last = task->passes && t->count >= task->passes;
    if (last || report_due(task)) {
        if (t->gap_ns > t->worst_ns)
            t->worst_ns = t->gap_ns;
        say("tick %lu gap_us=%lu worst_us=%lu gap_tsc=%lu back_us=%lu ns=%lu", t->count, t->gap_ns / 1000,
            t->worst_ns / 1000, t->gap_tsc, task->cpu->back_ns / 1000, now);
        t->gap_ns = t->gap_tsc = 0;
        t->last_ns = now_ns(); /* the line itself is no gap */
        t->last_tsc = rdtsc();
    }
    return last ? DONE : t->spin ? BUSY : IDLE;
}

const struct mode mode_tick = {"tick", start, step};
