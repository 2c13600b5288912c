/* Byte-stream devices: virtio-rng and virtio-console. */
#include "virtio.h"

#define RNG_BYTES 64
#define CONSOLE_BUFFERS 16
#define CONSOLE_BYTES 128

struct rng {
    struct virtqueue *queue;
    u8 *buffer, previous[RNG_BYTES];
    u64 ok, bytes, next_ns, interval;
    bool busy;
};

static void rng_start(struct task *task)
{
    struct rng *rng = task->state = memory_alloc(sizeof(*rng), 64);
    struct virtio_device *d = virtio_find(VIRTIO_RNG, 0);
    if (!d || !pci_claim(d->pci))
        die("rng: no virtio-rng device, or another task drives it");
    virtio_negotiate(d, F_RING_EVENT_IDX);
    rng->queue = virtio_queue(d, 0, 1, !task->polled);
    rng->buffer = memory_alloc(RNG_BYTES, 64);
    rng->interval = word_u64("every_ms", 0) * NS_PER_MS;
    virtio_start(d);
}

static void rng_check(struct task *task, struct rng *rng, u32 length)
{
    rng->busy = false;
    if (!length || length > RNG_BYTES) {
        bad("rng BAD length=%u", length);
        return;
    }
    /* 8 equal bytes in a row happen by chance once in 2^64 requests. */
    if (length >= 8 && !memcmp(rng->buffer, rng->previous, 8))
        bad("rng BAD repeated after %lu requests", rng->ok);
    memcpy(rng->previous, rng->buffer, RNG_BYTES);
    rng->ok++;
    rng->bytes += length;
    if (rng->ok == task->passes || report_due(task)) {
        line_add("rng ok %lu bytes=%lu sample=", rng->ok, rng->bytes);
        line_hex(rng->buffer, 16);
        line_end();
    }
}

static enum progress rng_step(struct task *task)
{
    struct rng *rng = task->state;
    u32 length;
    if (virtqueue_get(rng->queue, &length))
        rng_check(task, rng, length);
    if (task->passes && rng->ok >= task->passes)
        return DONE;
    if (!rng->busy && (!rng->interval || now_ns() >= rng->next_ns)) {
        struct segment s = {rng->buffer, RNG_BYTES};
        memset(rng->buffer, 0, RNG_BYTES);
        virtqueue_add(rng->queue, &s, 0, 1, rng);
        rng->busy = true;
        rng->next_ns = now_ns() + rng->interval;
        virtqueue_kick(rng->queue);
    }
    return virtqueue_arm(rng->queue) ? IDLE : BUSY;
}

struct console {
    struct virtqueue *rx, *tx;
    u8 *tx_buffers[CONSOLE_BUFFERS];
    u32 tx_busy; /* bit per buffer */
    u64 lines, received, sent;
};

static void console_receive_into(struct console *c, u8 *buffer)
{
    struct segment s = {buffer, CONSOLE_BYTES};
    virtqueue_add(c->rx, &s, 0, 1, buffer);
}

static void console_start(struct task *task)
{
    struct console *c = task->state = memory_alloc(sizeof(*c), 64);
    struct virtio_device *d = virtio_find(VIRTIO_CONSOLE, 0);
    if (!d || !pci_claim(d->pci))
        die("console: no virtio-console device, or another task drives it");
    virtio_negotiate(d, F_RING_EVENT_IDX);
    c->rx = virtio_queue(d, 0, 1, !task->polled);
    c->tx = virtio_queue(d, 1, 1, !task->polled);
    for (u32 i = 0; i < CONSOLE_BUFFERS; i++) {
        console_receive_into(c, memory_alloc(CONSOLE_BYTES, 64));
        c->tx_buffers[i] = memory_alloc(CONSOLE_BYTES, 64);
    }
    virtio_start(d);
    virtqueue_kick(c->rx);
}

/* False when every transmit buffer is on its way. */
static bool console_send(struct console *c, const void *data, u32 length)
{
    u32 i = (u32)__builtin_ctz(~c->tx_busy | 1u << CONSOLE_BUFFERS);
    if (i == CONSOLE_BUFFERS)
        return false;
    struct segment s = {c->tx_buffers[i], length};
    memcpy(c->tx_buffers[i], data, length);
    c->tx_busy |= 1u << i;
    virtqueue_add(c->tx, &s, 1, 0, c->tx_buffers[i]);
    virtqueue_kick(c->tx);
    c->sent += length;
    return true;
}

static void console_line(struct console *c)
{
    char text[] = "console line 00000000\r\n";
    u64 n = c->lines;
    for (u32 i = 20; i > 12; i--, n /= 10)
        text[i] = (char)('0' + n % 10);
    if (console_send(c, text, sizeof(text) - 1))
        c->lines++;
}

static enum progress console_step(struct task *task)
{
    struct console *c = task->state;
    u32 length;
    u8 *buffer;
    while ((buffer = virtqueue_get(c->tx, &length)))
        for (u32 i = 0; i < CONSOLE_BUFFERS; i++)
            if (c->tx_buffers[i] == buffer)
                c->tx_busy &= ~(1u << i);
    while (c->tx_busy != (1u << CONSOLE_BUFFERS) - 1 && (buffer = virtqueue_get(c->rx, &length))) {
        if (!length || length > CONSOLE_BYTES)
            bad("console BAD length=%u", length);
        else if (console_send(c, buffer, length))
            c->received += length;
        console_receive_into(c, buffer);
        virtqueue_kick(c->rx);
    }
    if (report_due(task)) {
        console_line(c);
        say("console ok %lu rx=%lu tx=%lu", c->lines, c->received, c->sent);
        if (task->passes && c->lines >= task->passes)
            return DONE;
    }
    bool idle = virtqueue_arm(c->rx);
    return virtqueue_arm(c->tx) && idle ? IDLE : BUSY;
}

const struct mode mode_rng = {"rng", rng_start, rng_step};
const struct mode mode_console = {"console", console_start, console_step};
