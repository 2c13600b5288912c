/*
 * shared/pages.c: a peer's list of page runs against the guest's regions, then its bytes in pieces of any size; and the
 * source's side, whose frames the destination's must take.
 *
 * Must hold: nothing outside the regions' files changes; a frame that was collected is accepted whole.
 */
#include "shared/pages.c"

#include <sys/mman.h>
#include <sys/socket.h>

#include "fuzz.h"

#define REGIONS 2
static const uint64_t region_gpa[REGIONS] = {0, 0x20000}, region_pages[REGIONS] = {8, 16};
#define LEAD 4096 /* bytes of each file in front of its region */

static struct region table[REGIONS];
static struct frame *frame_in, *frame_out;
static int stream[2];

static void make(void)
{
    int bytes = 1 << 20;
    for (int i = 0; i < REGIONS; i++) {
        uint64_t size = region_pages[i] * PAGE;
        int fd = memfd_create("fuzz", 0);
        MUST(fd >= 0 && !ftruncate(fd, (off_t)(LEAD + size + PAGE)));
        void *host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, LEAD);
        MUST(host != MAP_FAILED);
        table[i] = (struct region){region_gpa[i], size, (uintptr_t)host, LEAD, fd, 0};
    }
    MUST(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, stream));
    setsockopt(stream[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    frame_in = calloc(1, sizeof(*frame_in));
    frame_out = calloc(1, sizeof(*frame_out));
}

static void check_edges(void)
{
    static uint8_t edge[PAGE], zero[PAGE];
    for (int i = 0; i < REGIONS; i++) {
        MUST(pread(table[i].fd, edge, PAGE, 0) == PAGE && !memcmp(edge, zero, PAGE));
        MUST(pread(table[i].fd, edge, PAGE, (off_t)(LEAD + table[i].size)) == PAGE && !memcmp(edge, zero, PAGE));
        MUST(lseek(table[i].fd, 0, SEEK_END) == (off_t)(LEAD + table[i].size + PAGE));
    }
}

static void empty(int fd)
{
    static uint8_t rest[1 << 16];
    while (read(fd, rest, sizeof(rest)) > 0)
        ;
}

/* Move the frame's bytes through the stream in pieces, and what comes out into RAM. */
static void carry(struct input *in)
{
    static uint8_t bytes[PIECE];
    memset(bytes, (int)take(in, 1), sizeof(bytes));
    while (frame_in->left) {
        uint64_t n = 1 + below(in, 60000);
        if (write(stream[0], bytes, n < frame_in->left ? n : frame_in->left) <= 0)
            break;
        uint64_t left = frame_in->left;
        int64_t got = frame_read(frame_in, stream[1], table, REGIONS);
        MUST(got > 0 && frame_in->left == left - (uint64_t)got);
    }
    empty(stream[1]);
}

/* A list as Frame.parse hands it over: counts and runs of the peer, at most MAX_RUNS in all. */
static void receive(struct input *in)
{
    frame_in->data = (uint32_t)below(in, 6);
    frame_in->zero = (uint32_t)below(in, 6);
    for (uint32_t i = 0; i < frame_in->data + frame_in->zero; i++) {
        uint64_t kind = take(in, 1);
        frame_in->runs[i].gpa = kind & 1 ? take(in, 8) : below(in, 64) * PAGE;
        frame_in->runs[i].count = kind & 2 ? take(in, 8) : below(in, 20);
    }
    uint32_t bad = frame_map(frame_in, table, REGIONS);
    MUST(bad <= frame_in->data + frame_in->zero);
    if (bad)
        return;
    MUST(!frame_zero(frame_in, table, REGIONS));
    carry(in);
}

static void resend(struct input *in)
{
    uint64_t map[2] = {take(in, 8), take(in, 8)};
    frame_out->cursor = 0;
    int more = 1;
    for (int n = 0; more && n < 4; n++) {
        more = frame_collect(frame_out, map, 2, table, REGIONS);
        MUST(!frame_map(frame_out, table, REGIONS));
        uint64_t pages = frame_out->pages;
        MUST(frame_out->left == pages * PAGE);
        frame_head(frame_out, "header", 6);
        while (frame_out->left && frame_write(frame_out, stream[0]) > 0)
            empty(stream[1]);
        MUST(!frame_out->left);
        empty(stream[1]);
    }
    MUST(!more && !map[0] && !map[1]);
}

static void bitmaps(struct input *in)
{
    uint64_t *map = calloc(3, 8), *other = calloc(3, 8), first = below(in, 192), count = below(in, 193 - first);
    bitmap_set(map, first, count);
    MUST(bitmap_count(map, 3) == count);
    other[below(in, 3)] = take(in, 8);
    MUST(bitmap_or(map, other, 3) == bitmap_take(map, other, 3));
    MUST(!bitmap_count(other, 3));
    free(map);
    free(other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    if (!frame_in)
        make();
    while (in.left) {
        switch (take(&in, 1) % 3) {
        case 0: receive(&in); break;
        case 1: resend(&in); break;
        default: bitmaps(&in); break;
        }
    }
    check_edges();
    return 0;
}
