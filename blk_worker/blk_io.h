/*
 * Carrying out one request: parse, check, read or write, write its status. Part of blk.c.
 *
 * Any thread may run any request. What comes from the guest is copied once and checked in the copy. Requests in flight
 * have no order among them (virtio 1.2, 5.2.6.4): a FLUSH covers what had completed before it was sent.
 */
#ifndef FLOTILLA_BLK_IO_H
#define FLOTILLA_BLK_IO_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <time.h>

#include "blk.h"

enum blk_mode {
    BLK_MAY_BLOCK,
    BLK_CACHED_ONLY, /* decline what might wait for the disk */
};

struct blk_outcome {
    enum blk_kind kind;
    uint8_t status;
    enum vring_error malformed;
    int error;   /* errno behind an IOERR, 0 if the request itself was wrong */
    bool synced; /* fdatasync was called */
    bool bounced;
    uint64_t bytes;
};

/* The calling thread's. */
static _Thread_local struct blk_pulse *blk_pulse;

static void blk_held(bool held)
{
    if (blk_pulse)
        __atomic_store_n(&blk_pulse->held, held, __ATOMIC_RELAXED);
}

/* Part of a chain, consumed from the front. */
struct blk_span {
    struct iovec *iov;
    uint32_t count;
    uint64_t bytes;
};

static void blk_skip(struct blk_span *span, uint64_t bytes)
{
    span->bytes -= bytes;
    while (span->count && bytes >= span->iov->iov_len) {
        bytes -= span->iov->iov_len;
        span->iov++;
        span->count--;
    }
    if (bytes) {
        span->iov->iov_base = (char *)span->iov->iov_base + bytes;
        span->iov->iov_len -= bytes;
    }
}

/* Move `bytes` (at most span->bytes) between the span's front and a buffer of ours. */
static void blk_copy(struct blk_span *span, void *ours, uint64_t bytes, bool to_guest)
{
    char *at = ours;
    while (bytes) {
        uint64_t part = span->iov->iov_len < bytes ? span->iov->iov_len : bytes;
        if (to_guest)
            memcpy(span->iov->iov_base, at, part);
        else
            memcpy(at, span->iov->iov_base, part);
        at += part;
        bytes -= part;
        blk_skip(span, part);
    }
    /* The copy is what gets checked and used: the compiler must not go back to the guest's version. */
    __asm__ volatile("" ::: "memory");
}

static ssize_t blk_read_or_write(const struct blk_device *d, bool write, const struct iovec *iov, uint32_t count,
                                 uint64_t offset, int flags)
{
    ssize_t done;
    blk_held(true);
    do {
        int n = count < IOV_MAX ? (int)count : IOV_MAX;
        if (write)
            done = pwritev2(d->config.fd, iov, n, (off_t)offset, flags);
        else
            done = preadv2(d->config.fd, iov, n, (off_t)offset, flags);
    } while (done < 0 && errno == EINTR);
    blk_held(false);
    return done;
}

/* All of the span, at `offset`. 0 or errno; EAGAIN only if `cached`: it would have to wait for the disk. */
static int blk_transfer(struct blk_device *d, bool write, struct blk_span *span, uint64_t offset, bool cached)
{
    while (span->bytes) {
        ssize_t done = blk_read_or_write(d, write, span->iov, span->count, offset, cached ? RWF_NOWAIT : 0);
        if (done < 0 && cached && errno == EOPNOTSUPP) {
            __atomic_store_n(&d->no_nowait, true, __ATOMIC_RELAXED);
            return EAGAIN;
        }
        if (done <= 0)
            return done < 0 ? errno : EIO; /* 0: the file has become shorter than the disk */
        offset += (uint64_t)done;
        blk_skip(span, (uint64_t)done);
    }
    return 0;
}

static void blk_sync(const struct blk_device *d, struct blk_outcome *o)
{
    o->synced = true;
    blk_held(true);
    o->error = fdatasync(d->config.fd) ? errno : 0;
    blk_held(false);
}

/* After a write has succeeded: without a write-back cache it must be durable before it is reported. */
static void blk_write_through(const struct blk_device *d, struct blk_outcome *o)
{
    if (!o->error && !__atomic_load_n(&d->writeback, __ATOMIC_RELAXED))
        blk_sync(d, o);
}

static void *blk_bounce(struct blk_scratch *scratch)
{
    if (!scratch->bounce && posix_memalign(&scratch->bounce, 4096, BLK_BOUNCE_BYTES))
        scratch->bounce = NULL;
    return scratch->bounce;
}

/* O_DIRECT with guest buffers that the disk can't take: through a buffer of ours, piece by piece. */
static int blk_transfer_bounced(struct blk_device *d, struct blk_scratch *scratch, bool write, struct blk_span *span,
                                uint64_t offset)
{
    void *bounce = blk_bounce(scratch);
    if (!bounce)
        return ENOMEM;
    while (span->bytes) {
        uint64_t part = span->bytes < BLK_BOUNCE_BYTES ? span->bytes : BLK_BOUNCE_BYTES;
        struct iovec iov = {bounce, part};
        struct blk_span ours = {&iov, 1, part};
        if (write)
            blk_copy(span, bounce, part, false);
        int error = blk_transfer(d, write, &ours, offset, false);
        if (error)
            return error;
        if (!write)
            blk_copy(span, bounce, part, true);
        offset += part;
    }
    return 0;
}

static bool blk_aligned(const struct blk_device *d, const struct blk_span *span)
{
    uintptr_t bits = 0;
    for (uint32_t i = 0; i < span->count; i++)
        bits |= (uintptr_t)span->iov[i].iov_base | span->iov[i].iov_len;
    return !(bits & (d->config.memory_align - 1));
}

/* Whether [sector, sector + bytes) lies on the disk and can be addressed there. */
static bool blk_in_range(const struct blk_device *d, uint64_t sector, uint64_t bytes)
{
    if (bytes & ((1u << BLK_SECTOR_SHIFT) - 1))
        return false;
    if (sector > d->config.sectors || bytes >> BLK_SECTOR_SHIFT > d->config.sectors - sector)
        return false;
    if (!(d->config.flags & BLK_DIRECT))
        return true;
    return !(((sector << BLK_SECTOR_SHIFT) | bytes) & (d->config.offset_align - 1));
}

static void blk_do_data(struct blk_device *d, struct blk_scratch *scratch, uint64_t sector, struct blk_span *span,
                        bool cached, struct blk_outcome *o)
{
    uint64_t offset = sector << BLK_SECTOR_SHIFT;
    bool write = o->kind == BLK_WRITE;
    o->bounced = (d->config.flags & BLK_DIRECT) && !blk_aligned(d, span);
    if (o->bounced)
        o->error = blk_transfer_bounced(d, scratch, write, span, offset);
    else
        o->error = blk_transfer(d, write, span, offset, cached);
}

static int blk_write_zero_bytes(struct blk_device *d, struct blk_scratch *scratch, uint64_t offset, uint64_t bytes)
{
    void *bounce = blk_bounce(scratch);
    if (!bounce)
        return ENOMEM;
    memset(bounce, 0, BLK_BOUNCE_BYTES);
    while (bytes) {
        uint64_t part = bytes < BLK_BOUNCE_BYTES ? bytes : BLK_BOUNCE_BYTES;
        struct iovec iov = {bounce, part};
        struct blk_span span = {&iov, 1, part};
        int error = blk_transfer(d, true, &span, offset, false);
        if (error)
            return error;
        offset += part;
        bytes -= part;
    }
    return 0;
}

/* fallocate, on a file or (since Linux 4.9, page cache kept coherent) a block device. `*missing` latches EOPNOTSUPP. */
static int blk_allocate(struct blk_device *d, int mode, uint64_t offset, uint64_t bytes, bool *missing)
{
    int result;
    if (__atomic_load_n(missing, __ATOMIC_RELAXED))
        return EOPNOTSUPP;
    blk_held(true);
    do {
        result = fallocate(d->config.fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes);
    } while (result < 0 && errno == EINTR);
    blk_held(false);
    if (!result)
        return 0;
    if (errno == EOPNOTSUPP)
        __atomic_store_n(missing, true, __ATOMIC_RELAXED);
    return errno;
}

static int blk_discard(struct blk_device *d, uint64_t offset, uint64_t bytes)
{
    int error = 0;
    if (d->config.flags & BLK_BLOCK_DEVICE) {
        uint64_t range[2] = {offset, bytes};
        blk_held(true);
        error = ioctl(d->config.fd, BLKDISCARD, range) ? errno : 0;
        blk_held(false);
    } else {
        error = blk_allocate(d, FALLOC_FL_PUNCH_HOLE, offset, bytes, &d->no_punch);
    }
    /* Only advice. A guest that was offered it elsewhere may have moved here. */
    return error == EOPNOTSUPP ? 0 : error;
}

static int blk_zero(struct blk_device *d, struct blk_scratch *scratch, uint64_t offset, uint64_t bytes, bool unmap)
{
    int error = EOPNOTSUPP;
    if (unmap)
        error = blk_allocate(d, FALLOC_FL_PUNCH_HOLE, offset, bytes, &d->no_punch);
    if (error == EOPNOTSUPP)
        error = blk_allocate(d, FALLOC_FL_ZERO_RANGE, offset, bytes, &d->no_zero);
    if (error == EOPNOTSUPP || error == EINVAL) /* EINVAL: a block device's own alignment */
        error = blk_write_zero_bytes(d, scratch, offset, bytes);
    return error;
}

/* DISCARD and WRITE_ZEROES: one segment, as offered in max_discard_seg and max_write_zeroes_seg. */
static void blk_do_range(struct blk_device *d, struct blk_scratch *scratch, struct blk_span *span, struct blk_outcome *o)
{
    bool discard = o->kind == BLK_DISCARD;
    struct blk_range range;
    o->status = BLK_S_IOERR;
    if (span->bytes != sizeof(range))
        return;
    blk_copy(span, &range, sizeof(range), false);
    uint64_t bytes = (uint64_t)range.num_sectors << BLK_SECTOR_SHIFT;
    if (range.flags & ~(discard ? 0 : BLK_WRITE_ZEROES_F_UNMAP)) {
        o->status = BLK_S_UNSUPP;
        return;
    }
    if (!blk_in_range(d, range.sector, bytes))
        return;
    bool unmap = (range.flags & BLK_WRITE_ZEROES_F_UNMAP) && (d->config.flags & BLK_CAN_DISCARD);
    if (bytes && discard)
        o->error = blk_discard(d, range.sector << BLK_SECTOR_SHIFT, bytes);
    else if (bytes)
        o->error = blk_zero(d, scratch, range.sector << BLK_SECTOR_SHIFT, bytes, unmap);
    if (!discard)
        blk_write_through(d, o);
    o->bytes = bytes;
    o->status = o->error ? BLK_S_IOERR : BLK_S_OK;
}

static bool blk_allowed(const struct blk_device *d, enum blk_kind kind, struct blk_outcome *o)
{
    bool offered = true;
    if (kind == BLK_DISCARD)
        offered = d->config.flags & BLK_CAN_DISCARD;
    else if (kind == BLK_ZERO)
        offered = d->config.flags & BLK_CAN_ZERO;
    if (!offered)
        o->status = BLK_S_UNSUPP;
    else if ((d->config.flags & BLK_READONLY) && (kind == BLK_WRITE || kind == BLK_DISCARD || kind == BLK_ZERO))
        o->status = BLK_S_IOERR;
    else
        return true;
    return false;
}

static enum blk_kind blk_kind_of(uint32_t type)
{
    switch (type) {
    case BLK_T_IN: return BLK_READ;
    case BLK_T_OUT: return BLK_WRITE;
    case BLK_T_FLUSH: return BLK_FLUSH;
    case BLK_T_DISCARD: return BLK_DISCARD;
    case BLK_T_WRITE_ZEROES: return BLK_ZERO;
    default: return BLK_OTHER;
    }
}

/* ------------------------------------------------------------------ rehearsed faults */

/* Uniform in [0, 1); splitmix64. */
static double blk_random(struct blk_fault *f)
{
    uint64_t x = f->seed += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (double)((x ^ (x >> 31)) >> 11) / (double)(1ull << 53);
}

static uint32_t blk_delay(struct blk_fault *f)
{
    double off = 0;
    if (f->shape == BLK_FIXED || f->delay_ms == UINT32_MAX)
        return f->delay_ms;
    if (f->shape == BLK_UNIFORM)
        off = 2 * blk_random(f) - 1;
    else
        for (int i = 0; i < 12; i++) /* twelve of variance 1/12 */
            off += blk_random(f) - 0.5;
    off = f->delay_ms + off * f->spread_ms;
    return off < 0 ? 0 : off > 1e6 ? 1000000 : (uint32_t)off;
}

/* Whether the fault is for this request; counts it. */
static bool blk_fault_hits(struct blk_fault *f, enum blk_kind kind, uint64_t sector, uint64_t bytes)
{
    bool placed = kind == BLK_READ || kind == BLK_WRITE;
    if (!(f->kinds & (1u << kind)))
        return false;
    if (f->last_sector && (!placed || sector > f->last_sector || sector + (bytes >> BLK_SECTOR_SHIFT) <= f->first_sector))
        return false;
    if (f->after) {
        f->after--;
        return false;
    }
    if (f->count && --f->count == 0)
        f->kinds = 0;
    return true;
}

/* Waits as told; true: fail the request. */
static bool blk_faulted(struct blk_device *d, enum blk_kind kind, uint64_t sector, uint64_t bytes)
{
    uint32_t delay = 0;
    bool fail = false;
    pthread_mutex_lock(&d->fault_lock);
    if (d->fault.die_on_sector && d->fault.sector == sector && (kind == BLK_READ || kind == BLK_WRITE))
        abort();
    if (blk_fault_hits(&d->fault, kind, sector, bytes)) {
        delay = blk_delay(&d->fault);
        fail = d->fault.fail && blk_random(&d->fault) * 1e6 < d->fault.fail;
        if (delay == UINT32_MAX)
            while (d->fault.delay_ms == UINT32_MAX)
                pthread_cond_wait(&d->fault_changed, &d->fault_lock);
    }
    pthread_mutex_unlock(&d->fault_lock);
    if (delay && delay != UINT32_MAX) {
        struct timespec rest = {delay / 1000, (long)(delay % 1000) * 1000000};
        blk_held(true); /* it plays a slow disk */
        while (nanosleep(&rest, &rest) && errno == EINTR)
            ;
        blk_held(false);
    }
    return fail;
}

/* A ring thread that is told to hang does so here, as in a loop that has lost its way: nothing but `clear` or a kill ends it. */
static void blk_freeze(struct blk_device *d)
{
    pthread_mutex_lock(&d->fault_lock);
    while (d->fault.freeze)
        pthread_cond_wait(&d->fault_changed, &d->fault_lock);
    pthread_mutex_unlock(&d->fault_lock);
}

/* Whether BLK_CACHED_ONLY may try: only reads ever profit, and only buffered ones can tell. */
static bool blk_may_be_cached(const struct blk_device *d, const struct blk_outcome *o, uint64_t bytes)
{
    return o->kind == BLK_READ && bytes <= BLK_INLINE_BYTES && !(d->config.flags & BLK_DIRECT)
           && !__atomic_load_n(&d->no_nowait, __ATOMIC_RELAXED) && !__atomic_load_n(&d->armed, __ATOMIC_RELAXED);
}

/* Carry out what `header` says; `in` is room for the guest to read, without the status byte. false: declined. */
static bool blk_do(struct blk_device *d, struct blk_scratch *scratch, const struct blk_request_header *header,
                   struct blk_span *out, struct blk_span *in, enum blk_mode mode, struct blk_outcome *o)
{
    struct blk_span *data = o->kind == BLK_WRITE ? out : in;
    uint64_t bytes = data->bytes;
    if (mode == BLK_CACHED_ONLY && !blk_may_be_cached(d, o, bytes))
        return false;
    if (!blk_allowed(d, o->kind, o))
        return true;
    o->status = BLK_S_IOERR;
    if (__builtin_expect(__atomic_load_n(&d->armed, __ATOMIC_RELAXED), 0)
        && blk_faulted(d, o->kind, header->sector, bytes)) {
        o->error = EIO;
        return true;
    }
    switch (o->kind) {
    case BLK_READ:
    case BLK_WRITE:
        if (!blk_in_range(d, header->sector, bytes))
            return true;
        blk_do_data(d, scratch, header->sector, data, mode == BLK_CACHED_ONLY, o);
        if (o->error == EAGAIN && mode == BLK_CACHED_ONLY)
            return false;
        if (o->kind == BLK_WRITE)
            blk_write_through(d, o);
        o->bytes = bytes;
        break;
    case BLK_FLUSH:
        blk_sync(d, o);
        break;
    case BLK_DISCARD:
    case BLK_ZERO:
        blk_do_range(d, scratch, out, o);
        return true;
    default:
        if (header->type != BLK_T_GET_ID) {
            o->status = BLK_S_UNSUPP;
            return true;
        }
        o->bytes = bytes < BLK_ID_BYTES ? bytes : BLK_ID_BYTES;
        blk_copy(in, d->config.id, o->bytes, true);
    }
    o->status = o->error ? BLK_S_IOERR : BLK_S_OK;
    return true;
}

/*
 * A request that has killed worker after worker: an error to the guest, and its sector for the log. One that dies of being
 * looked at even so is returned without a status.
 */
static void blk_refuse(const struct blk_request *request, struct blk_scratch *scratch, bool blindly,
                       struct blk_outcome *o, uint32_t *len)
{
    struct blk_counters *counters = &request->queue->counters;
    struct vring_chain *chain = &scratch->chain;
    struct blk_request_header header = {.sector = UINT64_MAX};

    *o = (struct blk_outcome){.kind = BLK_OTHER, .status = BLK_S_IOERR};
    *len = 0;
    if (blindly || vring_parse(&request->queue->vring, request->head, chain)
        || chain->readable_bytes < sizeof(header) || !chain->writable_bytes) {
        chain->readable = chain->writable = 0;
    } else {
        struct blk_span out = {chain->iov, chain->readable, chain->readable_bytes};
        struct iovec *last = &chain->iov[chain->readable + chain->writable - 1];
        *((volatile uint8_t *)last->iov_base + last->iov_len - 1) = BLK_S_IOERR;
        *len = 1;
        blk_copy(&out, &header, sizeof(header), false);
    }
    /* The count last: whoever sees it tells the sector with it, and never again. */
    __atomic_store_n(&counters->poisoned_sector, header.sector, __ATOMIC_RELAXED);
    __atomic_store_n(&counters->poisoned, counters->poisoned + 1, __ATOMIC_RELEASE);
}

/*
 * Carry out a request up to its status byte. scratch->chain.writable tells what was written to, *len how many bytes.
 * false: declined (BLK_CACHED_ONLY); nothing was touched but perhaps the buffers of a read.
 */
static bool blk_execute(const struct blk_request *request, struct blk_scratch *scratch, enum blk_mode mode,
                        struct blk_outcome *o, uint32_t *len)
{
    struct blk_device *d = request->queue->device;
    struct vring_chain *chain = &scratch->chain;
    struct blk_request_header header;

    *o = (struct blk_outcome){.kind = BLK_OTHER, .status = BLK_S_OK};
    *len = 0;
    o->malformed = vring_parse(&request->queue->vring, request->head, chain);
    if (!o->malformed && (chain->readable_bytes < sizeof(header) || !chain->writable_bytes))
        o->malformed = VRING_BAD_REQUEST;
    if (o->malformed) {
        chain->writable = 0;
        return true;
    }
    struct blk_span out = {chain->iov, chain->readable, chain->readable_bytes};
    struct blk_span in = {chain->iov + chain->readable, chain->writable, chain->writable_bytes - 1};
    struct iovec *last = &in.iov[in.count - 1];
    volatile uint8_t *status = (uint8_t *)last->iov_base + --last->iov_len;
    in.count -= !last->iov_len;

    blk_copy(&out, &header, sizeof(header), false);
    o->kind = blk_kind_of(header.type);
    if (!blk_do(d, scratch, &header, &out, &in, mode, o))
        return false;
    *status = o->status;
    *len = 1;
    if (o->status == BLK_S_OK && (o->kind == BLK_READ || o->kind == BLK_OTHER))
        *len += (uint32_t)o->bytes;
    return true;
}

#endif
