/* virtio-blk requests. */
#include "blk.h"

enum { CONFIG_CAPACITY = 0, CONFIG_SEG_MAX = 12, CONFIG_NUM_QUEUES = 34 };
#define F_BLK_SEG_MAX (1ull << 2)
#define WANTED                                                                                               \
    (F_BLK_SEG_MAX | F_BLK_RO | F_BLK_FLUSH | F_BLK_MQ | F_BLK_DISCARD | F_BLK_WRITE_ZEROES)
#define STATUS_UNSET 0xff
#define MAX_DATA_SEGMENTS 64u

static struct virtio_device *disk_choose(u32 *disk)
{
    const char *named = word("disk");
    struct virtio_device *d;
    *disk = (u32)word_u64("disk", 0);
    for (; (d = virtio_find(VIRTIO_BLOCK, *disk)); ++*disk) {
        if (pci_claim(d->pci))
            return d;
        if (named)
            die("disk=%u is driven by another task", *disk);
    }
    die("no virtio-blk device for disk=%u", *disk);
}

static u64 features_wanted(void)
{
    u64 wanted = WANTED;
    if (word_flag("indirect", true))
        wanted |= F_RING_INDIRECT_DESC;
    if (word_flag("event_idx", true))
        wanted |= F_RING_EVENT_IDX;
    return wanted;
}

struct blk *blk_open(bool polled)
{
    struct blk *blk = memory_alloc(sizeof(*blk), 64);
    struct virtio_device *d = blk->device = disk_choose(&blk->disk);
    virtio_negotiate(d, features_wanted());
    blk->sectors = virtio_config_read(d, CONFIG_CAPACITY, 4) | (u64)virtio_config_read(d, CONFIG_CAPACITY + 4, 4) << 32;
    u32 segments = d->features & F_BLK_SEG_MAX ? virtio_config_read(d, CONFIG_SEG_MAX, 4) : 1;
    u32 offered = d->features & F_BLK_MQ ? virtio_config_read(d, CONFIG_NUM_QUEUES, 2) : 1;
    if (segments > MAX_DATA_SEGMENTS)
        segments = MAX_DATA_SEGMENTS;
    blk->queue_count = (u32)word_u64("queues", 1);
    if (!blk->queue_count || blk->queue_count > offered || blk->queue_count > BLK_MAX_QUEUES)
        die("queues=%u, disk %u offers %u", blk->queue_count, blk->disk, offered);
    blk->segment_bytes = (u32)word_u64("seg", 16384);
    for (u32 i = 0; i < blk->queue_count; i++)
        blk->queues[i] = virtio_queue(d, (u16)i, segments + 2, !polled);
    if (!(d->features & F_RING_INDIRECT_DESC) && segments + 2u > blk->queues[0]->size)
        segments = blk->queues[0]->size - 2u;
    blk->max_bytes = segments * blk->segment_bytes;
    virtio_start(d);
    say("blk open disk=%u slot=%u sectors=%lu features=0x%lx queues=%u size=%u irq=%u", blk->disk,
        d->pci->slot >> 3, blk->sectors, d->features, blk->queue_count, blk->queues[0]->size, !polled);
    return blk;
}

void blk_prepare(struct blk_request *request, u32 slot, u32 bytes)
{
    request->slot = slot;
    request->data = memory_alloc(bytes, 4096);
}

const char *blk_op_name(enum blk_op op)
{
    switch (op) {
    case BLK_READ:
        return "read";
    case BLK_WRITE:
        return "write";
    case BLK_FLUSH:
        return "flush";
    case BLK_GET_ID:
        return "get-id";
    case BLK_DISCARD:
        return "discard";
    case BLK_WRITE_ZEROES:
        return "write-zeroes";
    }
    return "?";
}

static u32 cut(const struct blk *blk, struct segment *segments, u8 *data, u32 bytes)
{
    u32 count = 0;
    for (u32 done = 0; done < bytes; done += segments[count++].length) {
        u32 left = bytes - done;
        segments[count].data = data + done;
        segments[count].length = left < blk->segment_bytes ? left : blk->segment_bytes;
    }
    return count;
}

bool blk_submit(struct blk *blk, struct blk_request *r)
{
    struct segment segments[MAX_DATA_SEGMENTS + 2];
    u32 out = 1, in = 0;
    bool ranged = r->op == BLK_DISCARD || r->op == BLK_WRITE_ZEROES;
    struct virtqueue *queue = blk->queues[blk->next_queue];
    blk->next_queue = (blk->next_queue + 1) % blk->queue_count;
    r->header.type = r->op;
    r->header.sector = r->op == BLK_READ || r->op == BLK_WRITE ? r->sector : 0;
    r->status = STATUS_UNSET;
    segments[0] = (struct segment){&r->header, sizeof(r->header)};
    if (ranged) {
        r->range.sector = r->sector;
        r->range.sectors = r->bytes / SECTOR;
        r->range.flags = 0;
        segments[out++] = (struct segment){&r->range, sizeof(r->range)};
    } else if (r->op == BLK_WRITE) {
        out += cut(blk, segments + out, r->data, r->bytes);
    } else if (r->op == BLK_READ || r->op == BLK_GET_ID) {
        in = cut(blk, segments + out, r->data, r->bytes);
    }
    segments[out + in++] = (struct segment){(void *)&r->status, 1};
    if (!virtqueue_add(queue, segments, out, in, r))
        return false;
    r->busy = true;
    r->overdue = false;
    r->submitted_ns = now_ns();
    r->submitted_ticks = this_cpu()->irq_count[VECTOR_TIMER];
    return true;
}

void blk_kick(struct blk *blk)
{
    for (u32 i = 0; i < blk->queue_count; i++)
        virtqueue_kick(blk->queues[i]);
}

static void check(struct blk *blk, struct blk_request *r, u32 length)
{
    u32 expected = 1 + (r->op == BLK_READ ? r->bytes : 0);
    u64 took = now_ns() - r->submitted_ns;
    if (took > blk->longest_ns)
        blk->longest_ns = took;
    if (took > blk->recent_ns)
        blk->recent_ns = took;
    if (r->status) {
        blk->errors++;
        bad("blk BAD status disk=%u op=%s sector=%lu status=%u", blk->disk, blk_op_name(r->op), r->sector,
            r->status);
    } else if (r->op != BLK_GET_ID && length != expected) {
        bad("blk BAD used-length disk=%u op=%s sector=%lu got=%u want=%u", blk->disk, blk_op_name(r->op),
            r->sector, length, expected);
    }
    if (r->overdue)
        say("blk late disk=%u op=%s sector=%lu", blk->disk, blk_op_name(r->op), r->sector);
}

struct blk_request *blk_poll(struct blk *blk)
{
    for (u32 i = 0; i < blk->queue_count; i++) {
        u32 length;
        struct blk_request *r = virtqueue_get(blk->queues[i], &length);
        if (!r)
            continue;
        r->busy = false;
        check(blk, r, length);
        return r;
    }
    return NULL;
}

bool blk_idle(struct blk *blk)
{
    bool idle = true;
    for (u32 i = 0; i < blk->queue_count; i++)
        idle &= virtqueue_arm(blk->queues[i]);
    return idle;
}

void blk_watch(struct blk_request *r, u32 deadline_ticks)
{
    if (!r->busy || r->overdue || this_cpu()->irq_count[VECTOR_TIMER] - r->submitted_ticks < deadline_ticks)
        return;
    r->overdue = true;
    bad("blk BAD lost op=%s sector=%lu bytes=%u ms=%lu", blk_op_name(r->op), r->sector, r->bytes,
        (now_ns() - r->submitted_ns) / NS_PER_MS);
}
