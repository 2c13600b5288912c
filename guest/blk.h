/* virtio-blk driver. Virtio 1.2 §5.2. */
#ifndef BLK_H
#define BLK_H

#include "virtio.h"

#define SECTOR 512u
#define BLK_MAX_QUEUES 16

enum blk_op { BLK_READ = 0, BLK_WRITE = 1, BLK_FLUSH = 4, BLK_GET_ID = 8, BLK_DISCARD = 11, BLK_WRITE_ZEROES = 13 };

#define F_BLK_RO (1ull << 5)
#define F_BLK_FLUSH (1ull << 9)
#define F_BLK_MQ (1ull << 12)
#define F_BLK_DISCARD (1ull << 13)
#define F_BLK_WRITE_ZEROES (1ull << 14)
#define BLK_ID_BYTES 20u

struct blk_request {
    struct {
        u32 type, reserved;
        u64 sector;
    } header;
    struct {
        u64 sector;
        u32 sectors, flags;
    } range; /* DISCARD, WRITE_ZEROES */
    u64 sector;
    enum blk_op op;
    u32 bytes;
    void *data;
    u64 submitted_ns;
    u32 submitted_ticks;
    u32 slot; /* the caller's */
    bool busy, overdue;
    volatile u8 status;
};

struct blk {
    struct virtio_device *device;
    u32 disk;
    u64 sectors;
    u32 queue_count, next_queue;
    struct virtqueue *queues[BLK_MAX_QUEUES];
    u32 segment_bytes; /* data is cut into segments of this size */
    u32 max_bytes;     /* of one request */
    u64 longest_ns, recent_ns; /* of the requests since the start; since whoever reports has set it to 0 */
    u64 errors;
};

/* The disk that the word `disk` names, or the first unclaimed one. Words: disk queues indirect event_idx seg ring. */
struct blk *blk_open(bool polled);
void blk_prepare(struct blk_request *request, u32 slot, u32 bytes);
/* op, sector and bytes are set; false when the queue is full. */
bool blk_submit(struct blk *blk, struct blk_request *request);
void blk_kick(struct blk *blk);
struct blk_request *blk_poll(struct blk *blk); /* a finished request, whatever its status */
bool blk_idle(struct blk *blk);                /* interrupts asked for and nothing finished: the CPU may halt */
const char *blk_op_name(enum blk_op op);
void blk_watch(struct blk_request *request, u32 deadline_ticks); /* BAD lost, once */

#endif
