/*
 * The block worker's ring thread under a hostile driver, on a real file. Where it would wait for a kick, the driver makes
 * its next move; so all of it is one thread. No I/O threads: the ring thread carries out every request itself.
 *
 * Must hold: the file keeps its size and what lies behind the disk's end; every request is returned once; a broken queue
 * touches nothing; every page that changes is in the dirty log.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>

static int driver_moves(struct pollfd *fds, nfds_t count, int timeout);
static int no_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument);
static int no_sync(int fd);

#define fdatasync no_sync /* a hundredth of a second each on a real disk, and nothing here cuts the power */
#define poll driver_moves
#define pthread_create no_thread
#define pthread_join(thread, result) ((void)(thread), (void)(result))
#include "blk_worker/blk.c"
#undef poll

#include "guest_ring.h"

#define SECTORS 24
#define GUARD 4096

static struct input in;
static struct guest guest;
static struct ring ring;
static struct blk_device *device;
static uint8_t before[GUEST_BYTES], *log_bits;
static bool logging;
static void *(*ring_main)(void *);
static void *ring_argument;
static uint32_t turns;

static int no_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument)
{
    (void)attributes;
    memset(thread, 0, sizeof(*thread));
    ring_main = main;
    ring_argument = argument;
    return 0;
}

static int no_sync(int fd)
{
    return fcntl(fd, F_GETFD) < 0 ? -1 : 0;
}

static void check(void)
{
    const struct blk_counters *c = blk_counters(device, 0);
    const struct blk_queue *q = &device->queue[0];
    MUST(!c->inflight && q->vring.used_idx == q->vring.used_next);
    if (logging)
        guest_must_be_logged(&guest, before, log_bits);
}

/* A whole request: header, data, status. Its sector is near the disk's end. */
static void good_request(void)
{
    static const uint32_t types[] = {BLK_T_IN, BLK_T_OUT, BLK_T_OUT, BLK_T_FLUSH, BLK_T_GET_ID, BLK_T_DISCARD,
                                     BLK_T_WRITE_ZEROES, BLK_T_WRITE_ZEROES};
    uint8_t kind = (uint8_t)take(&in, 1);
    uint16_t head = (uint16_t)below(&in, ring.size), second = (uint16_t)((head + 1) % ring.size);
    uint16_t third = (uint16_t)((head + 2) % ring.size);
    uint64_t sector = SECTORS - 4 + below(&in, 8), at = guest_gpa[2];
    struct blk_request_header header = {types[kind & 7], 0, sector};
    struct blk_range range = {sector, (uint32_t)(kind >> 3 & 7), kind >> 6 & 1};
    bool reads = header.type == BLK_T_IN || header.type == BLK_T_GET_ID, ranged = header.type >= BLK_T_DISCARD;
    memcpy(guest_at(&guest, at, sizeof(header)), &header, sizeof(header));
    memcpy(guest_at(&guest, at + 64, sizeof(range)), &range, sizeof(range));
    ring_desc(&ring)[head] = (struct vring_desc){at, sizeof(header), VRING_DESC_F_NEXT, second};
    ring_desc(&ring)[second] = (struct vring_desc){at + 64, ranged ? (uint32_t)sizeof(range) : 512u * (kind >> 3 & 7),
                                                   VRING_DESC_F_NEXT | (reads ? VRING_DESC_F_WRITE : 0), third};
    ring_desc(&ring)[third] = (struct vring_desc){at + 0x1fff, 1, VRING_DESC_F_WRITE, 0};
    ring_offer(&ring, head);
}

static void device_op(uint8_t op)
{
    if (op == 8) {
        logging = !logging;
        blk_set_log(device, logging ? (uintptr_t)log_bits : 0, GUEST_LOG_BYTES);
    } else if (op == 9) {
        blk_set_writeback(device, (uint32_t)take(&in, 1) & 1);
    } else if (op == 11) {
        good_request();
    } else if (op == 10) { /* a request's header and, by chance, its chain */
        uint16_t head = (uint16_t)below(&in, ring.size);
        struct blk_request_header header = {(uint32_t)take(&in, 1) % 15, 0, take(&in, 1) % (SECTORS + 2)};
        uint64_t at = guest_gpa[2] + below(&in, 64) * 16;
        memcpy(guest_at(&guest, at, sizeof(header)), &header, sizeof(header));
        ring_chain(&ring, &in, head);
        ring_desc(&ring)[head].addr = at;
        ring_desc(&ring)[head].len = (uint32_t)sizeof(header);
        ring_desc(&ring)[head].flags &= (uint16_t)~VRING_DESC_F_WRITE;
        ring_offer(&ring, head);
    }
}

static int driver_moves(struct pollfd *fds, nfds_t count, int timeout)
{
    (void)timeout;
    check();
    for (nfds_t i = 0; i < count; i++)
        fds[i].revents = 0;
    memset(log_bits, 0, GUEST_LOG_BYTES);
    while (in.left) {
        uint8_t op = (uint8_t)(take(&in, 1) % 12);
        if (op == 7)
            break;
        if (!ring_step(&ring, &in, op))
            device_op(op);
    }
    guest_save(&guest, before);
    if (!in.left && turns++)
        blk_stop_request(device, 0);
    return 0;
}

static int disk(void)
{
    static uint8_t guard[GUARD];
    char path[] = "/tmp/flotilla-fuzz-XXXXXX";
    int fd = mkstemp(path);
    MUST(fd >= 0 && !unlink(path));
    memset(guard, 0xa5, sizeof(guard));
    MUST(!ftruncate(fd, SECTORS * 512));
    MUST(pwrite(fd, guard, GUARD, SECTORS * 512) == GUARD);
    return fd;
}

static void check_disk(int fd)
{
    static uint8_t guard[GUARD + 1];
    MUST(pread(fd, guard, sizeof(guard), SECTORS * 512) == GUARD);
    for (int i = 0; i < GUARD; i++)
        MUST(guard[i] == 0xa5);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1;
    if (fd < 0)
        fd = disk();
    in = (struct input){data, size};
    uint8_t flags = (uint8_t)take(&in, 1), kind = (uint8_t)take(&in, 1);
    guest_make(&guest);
    ring = (struct ring){&guest, below(&in, 4) * RING_BYTES, (uint16_t)(1u << below(&in, RING_MAX_ORDER + 1)), 0, flags & 16};
    log_bits = calloc(1, GUEST_LOG_BYTES);
    logging = false;
    turns = 0;
    struct blk_config config = {
        .sectors = SECTORS, .fd = fd, .flags = (kind & 1 ? BLK_READONLY : 0) | (kind & 2 ? BLK_CAN_DISCARD : 0)
        | (kind & 4 ? BLK_CAN_ZERO : 0) | (kind & 8 ? BLK_DIRECT : 0),
        .num_queues = 1, .memory_align = 512, .offset_align = 512, .id = "fuzzed", .writeback = kind >> 4 & 1,
    };
    device = blk_create(&config);
    MUST(device);
    struct vring_memory *memory = ring_memory(&guest);
    MUST(!blk_set_memory(device, memory->region, memory->count));
    struct vring_setup setup = ring_setup(&ring, 0, flags);
    setup.base = ring.avail = ring_avail(&ring)->idx = (uint16_t)take(&in, 2);
    ring_used(&ring)->idx = (uint16_t)take(&in, 2);
    guest_save(&guest, before);
    MUST(!blk_start(device, &setup));
    ring_main(ring_argument);
    check();
    blk_stop_wait(device, 0);
    blk_destroy(device);
    check_disk(fd);
    free(memory);
    free(log_bits);
    guest_free(&guest);
    return 0;
}
