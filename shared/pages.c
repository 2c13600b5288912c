/* Guest pages on their way: bitmaps with one bit per page of guest address, and the frames that carry what is set.
 *
 * The loops that see every page. Policy (which frame, which socket, when) is the callers': migration_agent/pages.py and
 * controller/dirty.py. A page is 4096 bytes, a word of a bitmap 64 pages. Nothing here keeps a pointer.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define PAGE 4096ull
#define MAX_RUNS 1024
#define MAX_DATA 512	/* pages with contents in one frame */
#define PIECE (256u << 10)
#define STORE 100000	/* beyond every errno */
#define MAX_LOOK 16384	/* pages looked at for one frame, so that zeros do not hold the caller up */

struct region {
	uint64_t gpa, size, host, offset;
	int32_t fd;
	uint32_t pad;
};

struct run {
	uint64_t gpa, count;
};

/* One frame: `data` runs and then `zero` runs; the iovecs are what is left to move of the data runs. */
struct frame {
	uint32_t data, zero;
	uint64_t pages;		/* with contents */
	uint64_t zeros;
	uint64_t left;		/* bytes to move */
	uint64_t cursor;	/* page number where the next frame begins to look */
	uint32_t first, last;	/* iovecs that are left: first .. last-1 */
	struct run runs[MAX_RUNS];
	struct iovec iov[MAX_RUNS + 1];
};

EXPORT uint64_t frame_size(void)
{
	return sizeof(struct frame);
}

/* into |= from, word by word; the number of bits that are set in `from`. */
EXPORT uint64_t bitmap_or(uint64_t *into, const uint64_t *from, uint64_t words)
{
	uint64_t bits = 0;

	for (uint64_t i = 0; i < words; i++) {
		if (from[i]) {
			into[i] |= from[i];
			bits += __builtin_popcountll(from[i]);
		}
	}
	return bits;
}

/* The same from a bitmap that others set bits of meanwhile: each word is taken by one exchange. */
EXPORT uint64_t bitmap_take(uint64_t *into, uint64_t *from, uint64_t words)
{
	uint64_t bits = 0;

	for (uint64_t i = 0; i < words; i++) {
		if (__atomic_load_n(&from[i], __ATOMIC_RELAXED)) {
			uint64_t word = __atomic_exchange_n(&from[i], 0, __ATOMIC_SEQ_CST);

			into[i] |= word;
			bits += __builtin_popcountll(word);
		}
	}
	return bits;
}

EXPORT uint64_t bitmap_count(const uint64_t *map, uint64_t words)
{
	uint64_t bits = 0;

	for (uint64_t i = 0; i < words; i++)
		bits += __builtin_popcountll(map[i]);
	return bits;
}

EXPORT void bitmap_set(uint64_t *map, uint64_t first, uint64_t count)
{
	for (; count && first % 64; first++, count--)
		map[first / 64] |= 1ull << (first % 64);
	for (; count >= 64; first += 64, count -= 64)
		map[first / 64] = ~0ull;
	for (; count; first++, count--)
		map[first / 64] |= 1ull << (first % 64);
}

static int is_zero(const void *page)
{
	const uint64_t *p = page;

	if (p[0] | p[255] | p[511])
		return 0;
	for (unsigned i = 0; i < 512; i += 32) {
		uint64_t any = 0;

		for (unsigned j = 0; j < 32; j++)
			any |= p[i + j];
		if (any)
			return 0;
	}
	return 1;
}

static const struct region *find(const struct region *r, uint32_t n, uint64_t gpa)
{
	for (uint32_t i = 0; i < n; i++)
		if (gpa >= r[i].gpa && gpa - r[i].gpa < r[i].size)
			return &r[i];
	return 0;
}

static void extend(struct run *runs, uint32_t *n, uint64_t gpa)
{
	if (*n && runs[*n - 1].gpa + runs[*n - 1].count * PAGE == gpa)
		runs[*n - 1].count++;
	else
		runs[(*n)++] = (struct run){ gpa, 1 };
}

/* Fill a frame with the next pages that are set in `map`, from the frame's cursor on, and clear their bits. A page that is
 * no RAM is cleared and left out. Returns 1 while there may be more, 0 at the end of the bitmap. `base` is what the caller
 * sends first (header and runs): iov[0] is reserved for it.
 */
EXPORT int frame_collect(struct frame *f, uint64_t *map, uint64_t words, const struct region *regions, uint32_t n)
{
	struct run zero[MAX_RUNS / 2];
	const struct region *r = 0;
	uint64_t look = MAX_LOOK, word = f->cursor / 64;
	int more = 1;

	f->data = f->zero = 0;
	f->pages = f->zeros = 0;
	while (look && f->pages < MAX_DATA && f->data < MAX_RUNS / 2 && f->zero < MAX_RUNS / 2) {
		while (word < words && !map[word])
			word++;
		if (word >= words) {
			more = 0;
			break;
		}
		uint64_t page = word * 64 + __builtin_ctzll(map[word]), gpa = page * PAGE;

		map[word] &= map[word] - 1;
		if (!r || gpa < r->gpa || gpa - r->gpa >= r->size)
			r = find(regions, n, gpa);
		if (!r)
			continue;
		look--;
		if (is_zero((void *)(r->host + (gpa - r->gpa)))) {
			extend(zero, &f->zero, gpa);
			f->zeros++;
		} else {
			extend(f->runs, &f->data, gpa);
			f->pages++;
		}
	}
	f->cursor = word * 64;
	memcpy(f->runs + f->data, zero, f->zero * sizeof(*zero));
	return more;
}

/* Check a frame's runs (the peer's, at the destination) against the regions and point its iovecs at the pages. Returns 0,
 * or 1 + the index of the first run that is not whole pages of one region, or more data than a frame may have.
 */
EXPORT uint32_t frame_map(struct frame *f, const struct region *regions, uint32_t n)
{
	uint64_t pages = 0;

	for (uint32_t i = 0; i < f->data + f->zero; i++) {
		uint64_t gpa = f->runs[i].gpa, count = f->runs[i].count;
		const struct region *r = find(regions, n, gpa);

		if (!r || gpa % PAGE || !count || count > (r->size - (gpa - r->gpa)) / PAGE)
			return i + 1;
		if (i >= f->data)
			continue;
		pages += count;
		if (pages > MAX_DATA)
			return i + 1;
		f->iov[i + 1] = (struct iovec){ (void *)(r->host + (gpa - r->gpa)), count * PAGE };
	}
	f->pages = pages;
	f->left = pages * PAGE;
	f->first = 1;
	f->last = f->data + 1;
	return 0;
}

/* Put `size` bytes of the caller's in front of the pages. */
EXPORT void frame_head(struct frame *f, void *head, uint64_t size)
{
	f->iov[0] = (struct iovec){ head, size };
	f->first = 0;
	f->left += size;
}

static int64_t moved(struct frame *f, ssize_t count)
{
	int64_t all = count;

	if (count < 0)
		return -errno;
	f->left -= count;
	while (count > 0) {
		struct iovec *v = &f->iov[f->first];

		if ((size_t)count < v->iov_len) {
			v->iov_base = (char *)v->iov_base + count;
			v->iov_len -= count;
			break;
		}
		count -= v->iov_len;
		f->first++;
	}
	return all;
}

/* One writev of what is left; bytes moved or -errno. */
EXPORT int64_t frame_write(struct frame *f, int fd)
{
	return moved(f, writev(fd, f->iov + f->first, f->last - f->first));
}

static int64_t store(const struct frame *f, const char *data, uint64_t size, const struct region *regions, uint32_t n)
{
	for (uint32_t v = f->first; size; v++) {
		const char *host = f->iov[v].iov_base;
		uint64_t count = f->iov[v].iov_len < size ? f->iov[v].iov_len : size;
		const struct region *r = regions;

		while (r < regions + n && ((uint64_t)host < r->host || (uint64_t)host - r->host >= r->size))
			r++;
		for (size -= count; count;) {
			ssize_t done = pwrite(r->fd, data, count, (uint64_t)host - r->host + r->offset);

			if (done <= 0)
				return done ? -errno : -EIO;
			data += done;
			host += done;
			count -= done;
		}
	}
	return 0;
}

/* Read a piece of what is left and put it into RAM; bytes read, 0 at the end of the stream, or -errno; -STORE - errno when
 * RAM did not take it. By pwrite from a buffer that stays in the cache, and not by readv into the mapping: a page of RAM
 * that is not there yet is then neither faulted in nor zeroed first (measured: a third faster), and a host without memory
 * answers with an error instead of SIGBUS.
 */
EXPORT int64_t frame_read(struct frame *f, int fd, const struct region *regions, uint32_t n)
{
	static char piece[PIECE];
	ssize_t count = read(fd, piece, f->left < PIECE ? f->left : PIECE);

	if (count > 0) {
		int64_t stored = store(f, piece, count, regions, n);

		if (stored)
			return stored - STORE;
	}
	return moved(f, count);
}

/* Make the zero runs read as zeros by giving their pages back. Returns 0 or -errno. */
EXPORT int frame_zero(const struct frame *f, const struct region *regions, uint32_t n)
{
	for (uint32_t i = f->data; i < f->data + f->zero; i++) {
		const struct region *r = find(regions, n, f->runs[i].gpa);
		uint64_t at = f->runs[i].gpa - r->gpa + r->offset;

		if (fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, f->runs[i].count * PAGE))
			return -errno;
	}
	return 0;
}
