/*
 * The block worker's native loop: one ring thread per queue, one pool of I/O threads per device. blk.c is the API,
 * blk_ring.h the threads, blk_io.h a request's work.
 *
 *   kick ─▶ ring thread: pop ─┬─▶ cached read, or the only request in flight: done here
 *                             └─▶ pool ─▶ I/O thread: parse, pread/pwrite ─▶ used ring ─▶ call
 *
 * Threads and not io_uring: docs/adr/0002-block-io-threads.md.
 *
 * Structs marked "ABI" are mirrored in blk_worker/native.py, those of shared/ in shared/native_ring.py; tests compare
 * their sizes (blk_abi_size).
 */
#ifndef FLOTILLA_BLK_H
#define FLOTILLA_BLK_H

#include "loop.h"
#include "vring_setup.h"

#define BLK_API __attribute__((visibility("default")))
#define BLK_SECTOR_SHIFT 9
#define BLK_ID_BYTES 20
#define BLK_BATCH 64
#define BLK_MAX_QUEUES 256
#define BLK_MAX_THREADS 64
#define BLK_BOUNCE_BYTES (256u << 10)
/* Reads up to this size are tried from the page cache by the ring thread itself. */
#define BLK_INLINE_BYTES (128u << 10)

/* virtio 1.2, 5.2.6 */
enum { BLK_T_IN = 0, BLK_T_OUT = 1, BLK_T_FLUSH = 4, BLK_T_GET_ID = 8, BLK_T_DISCARD = 11, BLK_T_WRITE_ZEROES = 13 };
enum { BLK_S_OK = 0, BLK_S_IOERR = 1, BLK_S_UNSUPP = 2 };
#define BLK_WRITE_ZEROES_F_UNMAP 1u

struct blk_request_header {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
};

struct blk_range { /* virtio_blk_discard_write_zeroes */
    uint64_t sector;
    uint32_t num_sectors;
    uint32_t flags;
};

enum {
    BLK_READONLY = 1,     /* writes are refused */
    BLK_DIRECT = 2,       /* fd is O_DIRECT: align, or bounce */
    BLK_BLOCK_DEVICE = 4, /* fd is a block device: BLKDISCARD, BLKZEROOUT */
    BLK_CAN_DISCARD = 8,  /* offered */
    BLK_CAN_ZERO = 16,    /* offered */
    BLK_TRIAL = 32,       /* a worker of this disk died of itself lately: try what it left one by one */
    BLK_BLAME = 64,       /* … the last one did */
};

/* ABI. What a device is made of; stays constant but for `writeback`. */
struct blk_config {
    uint64_t sectors;       /* capacity in units of 512 bytes */
    int32_t fd;             /* borrowed: the caller closes it after blk_destroy */
    uint32_t flags;         /* BLK_READONLY … */
    uint32_t num_queues;
    uint32_t io_threads;    /* most threads in the pool; they start when needed */
    uint32_t memory_align;  /* O_DIRECT: alignment of buffers, bytes */
    uint32_t offset_align;  /* O_DIRECT: alignment of offset and length, bytes */
    char id[BLK_ID_BYTES];  /* GET_ID, zero padded */
    uint32_t writeback;
};

enum blk_kind { BLK_READ, BLK_WRITE, BLK_FLUSH, BLK_DISCARD, BLK_ZERO, BLK_OTHER, BLK_KINDS };

/* Bucket 0 counts latencies below 2^BLK_LATENCY_SHIFT µs, each of the others up to twice the one before, the last all
 * that are longer. shared/latency.py says the same. */
#define BLK_LATENCY_SHIFT 4
#define BLK_LATENCY_BUCKETS 20

/* ABI. Per operation; latency from pop to completion, the wait in the pool included. */
struct blk_op_counters {
    uint64_t ops;
    uint64_t bytes;
    uint64_t latency_min_us; /* UINT64_MAX before the first */
    uint64_t latency_max_us;
    uint64_t latency_sum_us;
    uint64_t latency_bucket[BLK_LATENCY_BUCKETS]; /* not cumulative; they add up to ops */
};

/* ABI. One queue's counters, written under its lock, read by anybody (each word whole). */
struct blk_counters {
    uint64_t epoch; /* turns of the ring thread: proof of life, see blk_nudge */
    uint64_t kicks;
    uint64_t calls;
    uint64_t inflight;
    uint64_t resubmitted;
    uint64_t syncs;       /* fdatasync calls */
    uint64_t bounced;     /* O_DIRECT through a buffer of ours */
    uint64_t errors;      /* requests answered with IOERR */
    uint64_t unsupported; /* … with UNSUPP */
    uint64_t malformed;   /* chains that were no request */
    uint64_t last_malformed; /* enum vring_error */
    uint64_t broken;      /* enum vring_error that stopped the queue, 0 while it works */
    uint64_t io_errno;    /* errno of the last failed system call */
    uint64_t poisoned;    /* of `errors`: requests failed because each had killed its worker time and again */
    uint64_t poisoned_sector; /* … the last one's sector; UINT64_MAX: its header could not be read */
    struct blk_op_counters op[BLK_KINDS];
};

enum blk_shape { BLK_FIXED, BLK_UNIFORM, BLK_NORMAL };

/*
 * ABI. A rehearsed fault. Applies to requests whose kind is in `kinds` (bit per enum blk_kind) and which touch one of the
 * sectors, once `after` of them have passed, `count` times (0: always).
 */
struct blk_fault {
    uint64_t first_sector, last_sector; /* of reads and writes; last 0: all */
    uint64_t seed;                      /* of the delays and of what fails */
    uint32_t kinds;
    uint32_t after;
    uint32_t count;
    uint32_t delay_ms;  /* UINT32_MAX: hang until the fault is cleared */
    uint32_t spread_ms; /* uniform: most deviation; normal: standard deviation */
    uint32_t shape;     /* enum blk_shape */
    uint32_t fail;      /* IOERR without doing it, for so many of a million */
    uint32_t die_at;    /* enum vring_step, at the `die_after`-th occurrence per queue */
    uint32_t die_after;
    uint32_t freeze;    /* ring threads take no turns */
    uint32_t withhold, repeat; /* notifications, per queue: see struct loop_calls */
    uint32_t die_on_sector;
    uint64_t sector;      /* with die_on_sector: a request for it aborts the process */
};

/* A native thread's sign of life. `held`: in a system call, which may last as long as the disk likes. */
struct blk_pulse {
    uint64_t turns;
    uint64_t seen; /* blk_alive's */
    uint32_t busy;
    uint32_t held;
};

struct blk_device;
struct blk_queue;

struct blk_request {
    struct blk_queue *queue;
    struct blk_request *next;
    uint64_t began_ns;
    uint16_t head;
    bool busy; /* taken and not returned */
};

struct blk_queue {
    struct blk_device *device;
    pthread_mutex_t lock; /* vring, request[].busy, counters, inflight, ring_done */
    pthread_cond_t drained;
    struct vring vring;
    struct blk_request *request; /* one per head */
    struct vring_resubmit *resubmit;
    uint32_t resubmits;
    uint32_t inflight; /* taken, and not yet returned to the driver with the notification sent */
    uint32_t index;
    int kick_fd;
    int call_fd;
    int control_fd; /* eventfd: look at `stopping`, or just take a turn */
    bool running;   /* between blk_start and blk_stop_wait; the API's thread only */
    bool stopping;  /* atomic */
    bool ring_done; /* the ring thread takes no further request */
    struct loop_calls calls_fault;
    pthread_t thread;
    struct blk_pulse pulse;
    struct blk_counters counters;
};

struct blk_pool {
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct blk_request *head, **tail;
    uint32_t queued, idle, threads, limit;
    bool closing;
    pthread_t *thread;
    struct blk_pulse *pulse; /* of each thread */
};

/* A region table and the one it replaced, which a request may still be reading. */
struct blk_memory {
    struct blk_memory *former;
    struct vring_memory table;
};

struct blk_device {
    struct blk_config config;
    struct blk_pool pool;
    struct blk_memory *memory;
    uint8_t *log;
    uint64_t log_size;
    int event_fd;
    bool writeback;   /* atomic */
    bool no_nowait;   /* atomic, like the next two: this file system does not know … RWF_NOWAIT */
    bool no_punch;    /* … FALLOC_FL_PUNCH_HOLE, BLKDISCARD */
    bool no_zero;     /* … FALLOC_FL_ZERO_RANGE, BLKZEROOUT */
    bool armed;       /* atomic: a fault is set */
    pthread_rwlock_t trial; /* BLK_TRIAL: written while a suspect is tried, read by whatever else is carried out */
    pthread_mutex_t fault_lock;
    pthread_cond_t fault_changed;
    struct blk_fault fault;
    struct blk_queue queue[];
};

/* Per thread: a request's parse belongs to the thread that carries it out, and is too big for every queue entry. */
struct blk_scratch {
    struct vring_chain chain;
    void *bounce;
};

/* ---- API for ctypes, all from one thread (the reactor's). Results are 0 or a value, -errno on failure. */

/* NULL: errno. No thread is started before the first queue. */
BLK_API struct blk_device *blk_create(const struct blk_config *config);
/* Stops every queue, as blk_stop_wait does. */
BLK_API void blk_destroy(struct blk_device *device);
/* Running queues go on with the new table, which must hold all that the old one held; else stop them before. */
BLK_API int blk_set_memory(struct blk_device *device, const struct vring_region *regions, uint32_t count);
/* When it returns, no thread uses the old bitmap, and what is written from now on is marked in the new. 0, 0: off. */
BLK_API void blk_set_log(struct blk_device *device, uint64_t address, uint64_t size);
BLK_API void blk_set_writeback(struct blk_device *device, uint32_t writeback);
BLK_API int blk_start(struct blk_device *device, const struct vring_setup *setup);
/* Take no more requests. Returns at once; event_fd is signalled when the queue has drained (see blk_stopped). */
BLK_API int blk_stop_request(struct blk_device *device, uint32_t index);
BLK_API int blk_stopped(struct blk_device *device, uint32_t index);
/*
 * The fence: waits for everything in flight, then nothing of this queue touches guest memory, disk or eventfds any more.
 * Returns the next avail index. It waits as long as the disk takes.
 */
BLK_API int blk_stop_wait(struct blk_device *device, uint32_t index);
/* Make each ring thread take a turn, so that its epoch moves though the guest is idle. */
BLK_API void blk_nudge(struct blk_device *device);
/*
 * Whether since the last call each thread that has something to do took a turn or is in a system call. Ring threads have
 * something to do if blk_nudge came after that call.
 */
BLK_API int blk_alive(struct blk_device *device);
/*
 * Signalled when there is something to look at: a drained or broken queue, a request that was malformed or poisoned or
 * whose system call failed.
 */
BLK_API int blk_event_fd(struct blk_device *device);
BLK_API const struct blk_counters *blk_counters(struct blk_device *device, uint32_t index);
BLK_API void blk_set_fault(struct blk_device *device, const struct blk_fault *fault);
/* sizeof of the n-th ABI struct, in the order of this file; 0 behind the last. */
BLK_API uint32_t blk_abi_size(uint32_t which);

#endif
