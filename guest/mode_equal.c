/* The workload of CH's live-migration document: the checksum of a whole disk, again and again. */
#include "blk.h"

struct equal {
    struct blk *blk;
    struct blk_request *requests;
    u32 depth, chunk_bytes;
    u64 bytes;      /* of the disk that are read */
    u64 chunks;     /* of one pass */
    u64 submitted;  /* chunks asked for in this pass */
    u64 consumed;   /* chunks summed up in this pass */
    u32 *reference; /* first pass: crc of every chunk, tells where a difference is */
    u32 crc, first_crc;
    u64 passes;
    u64 pass_start;
    u64 differs_at;
};
#define NOWHERE (~0ull)

static void start(struct task *task)
{
    struct equal *e = task->state = memory_alloc(sizeof(*e), 64);
    e->blk = blk_open(task->polled);
    e->chunk_bytes = (u32)word_u64("bs", 128 << 10) & -SECTOR;
    if (!e->chunk_bytes || e->chunk_bytes > e->blk->max_bytes)
        e->chunk_bytes = e->blk->max_bytes;
    e->depth = (u32)word_u64("depth", 4);
    e->bytes = e->blk->sectors * SECTOR;
    u64 span = word_u64("span", e->bytes);
    if (span && span < e->bytes)
        e->bytes = span & -(u64)SECTOR;
    e->chunks = (e->bytes + e->chunk_bytes - 1) / e->chunk_bytes;
    e->reference = memory_alloc(e->chunks * 4 + 4, 64);
    e->requests = memory_alloc(sizeof(*e->requests) * e->depth, 64);
    for (u32 i = 0; i < e->depth; i++)
        blk_prepare(&e->requests[i], i, e->chunk_bytes);
    e->differs_at = NOWHERE;
    e->pass_start = now_ns();
    if (!e->chunks || !e->depth)
        die("equal: an empty disk, or depth=0");
}

static u32 chunk_size(const struct equal *e, u64 chunk)
{
    u64 left = e->bytes - chunk * e->chunk_bytes;
    return left < e->chunk_bytes ? (u32)left : e->chunk_bytes;
}

static void fill_queue(struct equal *e)
{
    while (e->submitted < e->chunks && e->submitted - e->consumed < e->depth) {
        struct blk_request *r = &e->requests[e->submitted % e->depth];
        r->op = BLK_READ;
        r->sector = e->submitted * (e->chunk_bytes / SECTOR);
        r->bytes = chunk_size(e, e->submitted);
        if (!blk_submit(e->blk, r))
            break;
        e->submitted++;
    }
    blk_kick(e->blk);
}

static void pass_finish(struct task *task, struct equal *e)
{
    u64 now = now_ns(), ms = (now - e->pass_start) / NS_PER_MS;
    if (!e->passes)
        e->first_crc = e->crc;
    e->passes++;
    if (e->crc != e->first_crc || e->differs_at != NOWHERE)
        bad("not equal %lu crc32=%08x want=%08x offset=%lu", e->passes, e->crc, e->first_crc,
            e->differs_at * e->chunk_bytes);
    else if (e->passes == task->passes || report_due(task))
        say("equal %lu crc32=%08x bytes=%lu ms=%lu", e->passes, e->crc, e->bytes, ms);
    e->submitted = e->consumed = 0;
    e->crc = 0;
    e->differs_at = NOWHERE;
    e->pass_start = now;
}

static void consume(struct equal *e, const struct blk_request *r)
{
    u32 crc = crc32(0, r->data, r->bytes);
    if (!e->passes)
        e->reference[e->consumed] = crc;
    else if (e->reference[e->consumed] != crc && e->differs_at == NOWHERE)
        e->differs_at = e->consumed;
    e->crc = crc32(e->crc, r->data, r->bytes);
    e->consumed++;
}

static enum progress step(struct task *task)
{
    struct equal *e = task->state;
    bool moved = false;
    while (blk_poll(e->blk))
        ;
    while (e->consumed < e->submitted && !e->requests[e->consumed % e->depth].busy) {
        consume(e, &e->requests[e->consumed % e->depth]);
        fill_queue(e);
        moved = true;
    }
    if (e->consumed == e->chunks) {
        pass_finish(task, e);
        if (task->passes && e->passes >= task->passes)
            return DONE;
    }
    fill_queue(e);
    for (u32 i = 0; i < e->depth; i++)
        blk_watch(&e->requests[i], 600);
    return moved || !blk_idle(e->blk) ? BUSY : IDLE;
}

const struct mode mode_equal = {"equal", start, step};
