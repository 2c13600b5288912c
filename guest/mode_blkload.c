/* Several requests in flight on self-describing blocks, each verified when it is read back.
 *
 * Every sector carries its own address, the generation of its block's write and the run's seed, so a mismatch says
 * what happened: stale (an old generation: a write was lost, or an old one came again later), torn (sectors of two
 * writes), misplaced, zero, foreign or corrupt. A block has at most one request in flight; blocks are read back by
 * a scan that visits all of them over and over, so a late replay is found too. */
#include "blk.h"
#include "pattern.h"

#define SECTOR_MAGIC 0x314b4c42544f4c46ul /* "FLOTBLK1" */
#define SECTOR_WORDS (SECTOR / 8)
#define HEADER_WORDS 4 /* magic, sector, generation, seed */
#define MAX_DEPTH 128
#define LOST_AFTER_TICKS 600 /* timer ticks, not time: a paused guest must not call its requests lost */
#define MAX_RANGE 8          /* blocks of one DISCARD or WRITE_ZEROES */

enum content { UNKNOWN, WRITTEN, ZERO };

struct block {
    u32 generation; /* of the last write that was submitted */
    u8 content;     /* enum content */
    u8 busy;
};

struct load {
    struct blk *blk;
    struct blk_request *requests;
    struct block *blocks;
    u32 depth, block_bytes, sectors_per_block;
    u64 first_sector, count, scan;
    u64 seed, random;
    bool trim, writes, stopping;
    u32 in_flight;
    u64 ops, verified, written, flushed, trimmed, scans;
    char id[BLK_ID_BYTES];
    bool id_known;
};

static u64 sector_key(const struct load *l, u64 sector, u64 generation)
{
    return mix64(l->seed ^ mix64(sector ^ mix64(generation)));
}

static void sector_fill(const struct load *l, u64 *words, u64 sector, u64 generation)
{
    words[0] = SECTOR_MAGIC;
    words[1] = sector;
    words[2] = generation;
    words[3] = l->seed;
    pattern_fill(words + HEADER_WORDS, SECTOR_WORDS - HEADER_WORDS, sector_key(l, sector, generation));
}

static bool all_zero(const u64 *words, u32 count)
{
    u64 any = 0;
    for (u32 i = 0; i < count; i++)
        any |= words[i];
    return !any;
}

/* What one sector is, compared with what it should be; NULL when right. */
static const char *sector_judge(const struct load *l, const u64 *words, u64 sector, const struct block *block)
{
    bool zero = all_zero(words, SECTOR_WORDS);
    if (block->content == ZERO)
        return zero ? NULL : words[0] == SECTOR_MAGIC && words[3] == l->seed ? "stale" : "not-zero";
    if (zero)
        return "zero";
    if (words[0] != SECTOR_MAGIC)
        return "corrupt";
    if (words[3] != l->seed)
        return "foreign";
    if (words[1] != sector)
        return "misplaced";
    if (pattern_check(words + HEADER_WORDS, SECTOR_WORDS - HEADER_WORDS, sector_key(l, sector, words[2])) !=
        SECTOR_WORDS - HEADER_WORDS)
        return "corrupt";
    if (words[2] != block->generation)
        return words[2] < block->generation ? "stale" : "future";
    return NULL;
}

/* Sectors that disagree among themselves come from different writes. */
static bool is_torn(const struct load *l, const u64 *words, u32 wrong)
{
    if (wrong < l->sectors_per_block)
        return true;
    for (u32 i = 1; i < l->sectors_per_block; i++) {
        const u64 *other = words + i * SECTOR_WORDS;
        if (other[0] != words[0] || (words[0] == SECTOR_MAGIC && other[2] != words[2]))
            return true;
    }
    return false;
}

static void block_verify(struct load *l, const struct blk_request *r, struct block *block)
{
    const u64 *words = r->data;
    const char *verdict = NULL;
    u32 wrong = 0, at = 0;
    for (u32 i = l->sectors_per_block; i-- > 0;) {
        const char *judged = sector_judge(l, words + i * SECTOR_WORDS, r->sector + i, block);
        if (judged)
            wrong++, at = i, verdict = judged;
    }
    l->verified++;
    if (!wrong)
        return;
    const u64 *first = words + at * SECTOR_WORDS;
    bad("blk BAD %s disk=%u sector=%lu want_gen=%u got_gen=%lu got_sector=%lu wrong=%u/%u was=%s",
        is_torn(l, words, wrong) ? "torn" : verdict, l->blk->disk, r->sector + at, block->generation, first[2],
        first[1], wrong, l->sectors_per_block, verdict);
    block->content = UNKNOWN; /* written anew next time, so one accident is reported once */
}

static struct block *block_of(struct load *l, const struct blk_request *r)
{
    return &l->blocks[(r->sector - l->first_sector) / l->sectors_per_block];
}

static void start(struct task *task)
{
    struct load *l = task->state = memory_alloc(sizeof(*l), 64);
    l->blk = blk_open(task->polled);
    l->block_bytes = (u32)word_u64("bs", 4096);
    l->depth = (u32)word_u64("depth", 8);
    l->seed = word_u64("seed", 1);
    l->random = l->seed;
    l->trim = word_flag("trim", true);
    l->writes = !(l->blk->device->features & F_BLK_RO);
    if (!l->block_bytes || l->block_bytes % SECTOR || l->block_bytes > l->blk->max_bytes)
        die("blkload: bs=%u (a multiple of 512, at most %u)", l->block_bytes, l->blk->max_bytes);
    if (!l->depth || l->depth > MAX_DEPTH || !l->writes)
        die("blkload: depth=%u (1 to %u) on a writable disk", l->depth, MAX_DEPTH);
    l->sectors_per_block = l->block_bytes / SECTOR;
    /* CH refuses writes to sector 0 of an image whose type it had to guess. */
    l->first_sector = word_u64("start", l->block_bytes) / SECTOR;
    u64 span = word_u64("span", 64 << 20) / SECTOR;
    if (l->first_sector >= l->blk->sectors)
        die("blkload: start=%lu is behind the end of the disk", l->first_sector * SECTOR);
    if (span > l->blk->sectors - l->first_sector)
        span = l->blk->sectors - l->first_sector;
    l->count = span / l->sectors_per_block;
    if (l->count < l->depth + MAX_RANGE)
        die("blkload: %lu blocks are too few for depth=%u", l->count, l->depth);
    l->blocks = memory_alloc(l->count * sizeof(*l->blocks), 64);
    l->requests = memory_alloc(sizeof(*l->requests) * l->depth, 64);
    for (u32 i = 0; i < l->depth; i++)
        blk_prepare(&l->requests[i], i, l->block_bytes);
    say("blk load disk=%u first=%lu blocks=%lu bs=%u depth=%u seed=%lu", l->blk->disk, l->first_sector, l->count,
        l->block_bytes, l->depth, l->seed);
}

static void choose_write(struct load *l, struct blk_request *r, u64 index)
{
    struct block *block = &l->blocks[index];
    r->op = BLK_WRITE;
    block->generation++;
    block->content = WRITTEN;
    block->busy = 1;
    for (u32 i = 0; i < l->sectors_per_block; i++)
        sector_fill(l, (u64 *)r->data + i * SECTOR_WORDS, r->sector + i, block->generation);
}

/* A run of idle blocks from `index`, as the range of a DISCARD or WRITE_ZEROES. */
static bool choose_range(struct load *l, struct blk_request *r, u64 index, enum blk_op op)
{
    u64 want = 1 + random64(&l->random) % MAX_RANGE, n = 0;
    while (n < want && index + n < l->count && !l->blocks[index + n].busy)
        n++;
    if (!n)
        return false;
    for (u64 i = 0; i < n; i++) {
        l->blocks[index + i].busy = 1;
        l->blocks[index + i].content = op == BLK_DISCARD ? UNKNOWN : ZERO;
        l->blocks[index + i].generation++;
    }
    r->op = op;
    r->bytes = (u32)n * l->block_bytes;
    return true;
}

static bool choose_special(struct load *l, struct blk_request *r, u64 dice, u64 index)
{
    u64 features = l->blk->device->features;
    if (dice < 1 && features & F_BLK_FLUSH) {
        r->op = BLK_FLUSH;
        r->bytes = 0;
        return true;
    }
    if (dice == 1) {
        r->op = BLK_GET_ID;
        r->bytes = BLK_ID_BYTES;
        memset(r->data, 0, BLK_ID_BYTES); /* a device may write no more than the NUL */
        return true;
    }
    if (dice == 2 && l->trim && features & F_BLK_DISCARD)
        return choose_range(l, r, index, BLK_DISCARD);
    if (dice == 3 && l->trim && features & F_BLK_WRITE_ZEROES)
        return choose_range(l, r, index, BLK_WRITE_ZEROES);
    return false;
}

/* Of 128 requests: 4 special ones, 60 writes anywhere, the rest visits of the scan, which reads a block or, if its
 * content is unknown, writes it. */
static bool choose(struct load *l, struct blk_request *r)
{
    u64 dice = random64(&l->random) & 127;
    u64 index = random64(&l->random) % l->count;
    r->sector = l->first_sector + index * l->sectors_per_block;
    r->bytes = l->block_bytes;
    if (dice < 4 && choose_special(l, r, dice, index))
        return true;
    r->bytes = l->block_bytes;
    bool write = dice < 64;
    if (!write) {
        index = l->scan++ % l->count;
        if (index == l->count - 1)
            l->scans++;
        r->sector = l->first_sector + index * l->sectors_per_block;
    }
    if (l->blocks[index].busy)
        return false;
    if (write || l->blocks[index].content == UNKNOWN) {
        choose_write(l, r, index);
    } else {
        r->op = BLK_READ;
        memset(r->data, 0xa5, l->block_bytes);
        l->blocks[index].busy = 1;
    }
    return true;
}

static void complete(struct load *l, struct blk_request *r)
{
    struct block *block = block_of(l, r);
    l->in_flight--;
    l->ops++;
    if (r->op == BLK_FLUSH) {
        l->flushed++;
        return;
    }
    if (r->op == BLK_GET_ID) {
        if (l->id_known && memcmp(l->id, r->data, BLK_ID_BYTES))
            bad("blk BAD id disk=%u: GET_ID answers something else than before", l->blk->disk);
        memcpy(l->id, r->data, BLK_ID_BYTES);
        l->id_known = true;
        return;
    }
    for (u32 i = 0; i < r->bytes / l->block_bytes; i++) {
        block[i].busy = 0;
        if (r->status)
            block[i].content = UNKNOWN;
    }
    if (r->status)
        return;
    if (r->op == BLK_READ)
        block_verify(l, r, block);
    else if (r->op == BLK_WRITE)
        l->written++;
    else
        l->trimmed++;
}

static void report(const struct load *l, const char *what)
{
    say("blk %s %lu written=%lu flushed=%lu trimmed=%lu ops=%lu scans=%lu longest_us=%lu recent_us=%lu kicks=%lu irqs=%u",
        what, l->verified, l->written, l->flushed, l->trimmed, l->ops, l->scans, l->blk->longest_ns / 1000,
        l->blk->recent_ns / 1000, l->blk->queues[0]->kicks, this_cpu()->irq_count[l->blk->queues[0]->vector]);
    l->blk->recent_ns = 0;
}

static enum progress step(struct task *task)
{
    struct load *l = task->state;
    struct blk_request *r;
    bool moved = false;
    for (u32 i = 0; i < l->depth && (r = blk_poll(l->blk)); i++) {
        complete(l, r);
        moved = true;
    }
    l->stopping |= task->passes && l->scans >= task->passes;
    for (u32 i = 0; i < l->depth; i++) {
        r = &l->requests[i];
        if (r->busy)
            blk_watch(r, LOST_AFTER_TICKS);
        else if (!l->stopping && choose(l, r)) {
            if (!blk_submit(l->blk, r))
                die("blkload: depth=%u does not fit into the rings", l->depth);
            l->in_flight++;
        }
    }
    blk_kick(l->blk);
    if (l->stopping && !l->in_flight) {
        report(l, "ok");
        return DONE;
    }
    if (report_due(task) && l->verified)
        report(l, "ok");
    return moved || !blk_idle(l->blk) ? BUSY : IDLE;
}

const struct mode mode_blkload = {"blkload", start, step};
