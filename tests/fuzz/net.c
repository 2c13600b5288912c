/*
 * The network worker's thread under a hostile driver and a hostile wire. A socket of datagrams stands in for the TAP; where
 * the thread would wait, driver, wire and VMM make their next move.
 *
 * Must hold: chains come back in the order in which they were taken; a broken queue stays so; pages that change are logged.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>

static int others_move(struct pollfd *fds, nfds_t count, int timeout);
static int no_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument);

#define poll others_move
#define pthread_create no_thread
#define pthread_join(thread, result) ((void)(thread), (void)(result))
#include "net_worker/net.c"
#undef poll

#include "guest_ring.h"

enum { RX, TX, CTRL, RINGS };
#define MAX_TURNS 128

static struct input in;
static struct guest guest;
static struct ring rings[RINGS];
static struct net_device *device;
static struct vring_memory *memory;
static uint8_t before[GUEST_BYTES], *log_bits, flags;
static bool logging;
static void *(*pair_main)(void *);
static void *pair_argument;
static int wire = -1, tap = -1;
static uint32_t turns;

static int no_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument)
{
    (void)attributes;
    memset(thread, 0, sizeof(*thread));
    pair_main = main;
    pair_argument = argument;
    return 0;
}

static void check(void)
{
    for (uint32_t i = 0; i < RINGS; i++) {
        const struct net_queue *q = i == CTRL ? &device->ctrl.queue : i == TX ? &device->pair[0]->tx : &device->pair[0]->rx;
        if (q->running)
            MUST(q->vring.used_idx == q->vring.used_next);
    }
    if (logging)
        guest_must_be_logged(&guest, before, log_bits);
}

static void start(uint32_t index)
{
    struct vring_setup setup = ring_setup(&rings[index], index, flags);
    int result = net_start(device, &setup);
    MUST(!result || result == -EBUSY);
}

static void drain(int fd)
{
    static uint8_t packet[1 << 17];
    while (recv(fd, packet, sizeof(packet), MSG_DONTWAIT) >= 0)
        ;
}

static void command(void)
{
    uint8_t *out = malloc(64); /* exactly what the worker gives it: see net_worker/backend.py */
    int got = net_ctrl_take(device, out, 64);
    MUST(got <= 64);
    free(out);
    if (got > 0)
        net_ctrl_answer(device, (uint32_t)take(&in, 1));
}

static void arrive(void)
{
    static uint8_t packet[1 << 17];
    /* A TAP gives a vnet header with every packet. */
    size_t size = NET_HEADER + (below(&in, 4) ? below(&in, 2000) : NET_MAX_PACKET - 80 + below(&in, 80));
    memset(packet, 0x5a, 64);
    for (size_t i = 0; i < 12; i++)
        packet[i] = (uint8_t)take(&in, 1);
    if (send(wire, packet, size, MSG_DONTWAIT) < 0)
        drain(tap);
}

/* The VMM's and the wire's moves. The thread holds no lock while it waits, so the API may be called from here. */
static void other_op(uint8_t op)
{
    switch (op) {
    case 8:
        logging = !logging;
        net_set_log(device, logging ? (uintptr_t)log_bits : 0, GUEST_LOG_BYTES);
        break;
    case 9: arrive(); break;
    case 10: drain(wire); break;
    case 11: command(); break;
    case 12: net_set_attached(device, 0, (uint32_t)take(&in, 1) & 1); break;
    case 13: net_stop(device, (uint32_t)below(&in, RINGS)); break;
    case 14: start((uint32_t)below(&in, RINGS)); break;
    case 15: net_set_memory(device, memory->region, memory->count); break;
    default: break;
    }
}

static int others_move(struct pollfd *fds, nfds_t count, int timeout)
{
    uint32_t at = RX;
    struct pollfd quick[NET_FDS];
    check();
    memset(log_bits, 0, GUEST_LOG_BYTES);
    if (timeout && !in.left)
        device->pair[0]->closing = true;
    guest_save(&guest, before);
    while (timeout && in.left) {
        uint8_t op = (uint8_t)(take(&in, 1) % 18);
        if (op == 7)
            break;
        if (op >= 16)
            at = (uint32_t)below(&in, RINGS);
        else if (!ring_step(&rings[at], &in, op))
            other_op(op);
        /* What the guest writes itself is KVM's to log, and a command's answer is checked at once. */
        if (logging && op == 11)
            guest_must_be_logged(&guest, before, log_bits);
        memset(log_bits, 0, GUEST_LOG_BYTES);
        guest_save(&guest, before);
    }
    memcpy(quick, fds, count * sizeof(*fds));
    int ready = poll(quick, count, 0);
    memcpy(fds, quick, count * sizeof(*fds));
    for (nfds_t i = NET_ON_TX; timeout && i <= NET_ON_RX; i++) /* every turn of the driver's ends with a kick */
        fds[i].revents = fds[i].fd >= 0 ? POLLIN : 0;
    return ready < 0 || turns++ > MAX_TURNS ? (device->pair[0]->closing = true, 0) : 1;
}

static void make_wire(void)
{
    int pair[2], bytes = 1 << 20;
    MUST(!socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair));
    wire = pair[0];
    tap = pair[1];
    setsockopt(wire, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    setsockopt(tap, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (wire < 0)
        make_wire();
    in = (struct input){data, size};
    flags = (uint8_t)take(&in, 1);
    guest_make(&guest);
    log_bits = calloc(1, GUEST_LOG_BYTES);
    memory = ring_memory(&guest);
    logging = false;
    turns = 0;
    device = net_create(1, &tap);
    MUST(device && !net_set_memory(device, memory->region, memory->count));
    MUST(!net_set_format(device, flags & 8 ? NET_LEGACY_HEADER : NET_HEADER, !(flags & 8) && flags & 16));
    for (uint32_t i = 0; i < RINGS; i++) {
        rings[i] = (struct ring){&guest, i * RING_BYTES, (uint16_t)(1u << below(&in, RING_MAX_ORDER + 1)), 0, false};
        rings[i].edge = i == (uint32_t)(flags >> 5) % 4;
        rings[i].avail = ring_avail(&rings[i])->idx = ring_used(&rings[i])->idx = (uint16_t)take(&in, 2);
        start(i);
    }
    guest_save(&guest, before);
    pair_main(pair_argument);
    check();
    net_destroy(device);
    drain(wire);
    drain(tap);
    free(memory);
    free(log_bits);
    guest_free(&guest);
    return 0;
}
