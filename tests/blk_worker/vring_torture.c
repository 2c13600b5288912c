/*
 * shared/vring.h without a device: to be run under sanitizers.
 *
 *   vring_torture ring SEED REQUESTS EVENT_IDX INDIRECT   a driver thread and a device thread on one ring
 *   vring_torture fuzz SEED ROUNDS                        random tables; every buffer that parses is touched
 *   vring_torture kill SEED                               die at every step, recover, count what the driver sees
 *
 * Exit code 0: all is well; else a line on stderr says what was not.
 */
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "vring.h"

#define SIZE 16
#define BASE 0x100000u
#define PATIENCE_MS 20000

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static uint64_t state;

static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

/* Guest memory: desc, avail, used, then a page per head for its buffers and its indirect table. */
struct guest {
    _Alignas(16) struct vring_desc desc[SIZE];
    _Alignas(16) struct vring_desc table[SIZE][4];
    _Alignas(4) uint16_t avail[2 + SIZE + 1];
    _Alignas(4) uint8_t used[4 + SIZE * 8 + 4];
    uint64_t in[SIZE][2], out[SIZE];
};

static struct guest *guest;
static struct vring ring;
static int kick_fd, call_fd, event_idx, indirect;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t gpa_of(const void *p)
{
    return BASE + (uint64_t)((const char *)p - (const char *)guest);
}

static struct vring_memory *memory_of(void *host, uint64_t size)
{
    struct vring_memory *memory = malloc(sizeof(*memory) + sizeof(struct vring_region));
    memory->count = 1;
    memory->region[0] = (struct vring_region){BASE, size, (uintptr_t)host};
    return memory;
}

static void attach(struct vring *v, struct vring_memory *memory)
{
    *v = (struct vring){
        .desc = guest->desc, .avail = (void *)guest->avail, .used = (void *)guest->used, .memory = memory,
        .size = SIZE, .event_idx = event_idx, .indirect = indirect, .used_gpa = gpa_of(guest->used),
    };
}

static void pause_on(int fd, const char *who)
{
    struct pollfd p = {fd, POLLIN, 0};
    uint64_t count;
    CHECK(poll(&p, 1, PATIENCE_MS) == 1, "%s sleeps for ever: a notification was lost", who);
    CHECK(read(fd, &count, sizeof(count)) == sizeof(count), "eventfd");
}

static void signal_on(int fd)
{
    uint64_t one = 1;
    CHECK(write(fd, &one, sizeof(one)) == sizeof(one), "eventfd");
}

/* ------------------------------------------------------------------ ring */

static uint64_t answer_to(uint64_t a, uint64_t b)
{
    return a * 31 + (b ^ 0x5555);
}

static void *device_main(void *argument)
{
    uint64_t left = *(uint64_t *)argument;
    static struct vring_chain chain;
    while (left) {
        uint16_t head;
        pthread_mutex_lock(&lock);
        vring_disable_notify(&ring);
        int popped = vring_pop(&ring, &head);
        if (!popped)
            sched_yield(); /* the driver's chance to slip in before we ask for its kick */
        bool more = popped || vring_enable_notify(&ring);
        pthread_mutex_unlock(&lock);
        CHECK(popped >= 0, "ring broken: %d", -popped);
        if (!popped) {
            if (!more)
                pause_on(kick_fd, "device");
            continue;
        }
        CHECK(!vring_parse(&ring, head, &chain), "head %u", head);
        CHECK(chain.readable_bytes == 16 && chain.writable_bytes == 8, "head %u", head);
        uint64_t in[2];
        memcpy(&in[0], chain.iov[0].iov_base, 8);
        memcpy(&in[1], chain.iov[1].iov_base, 8);
        uint64_t out = answer_to(in[0], in[1]);
        memcpy(chain.iov[2].iov_base, &out, 8);
        pthread_mutex_lock(&lock);
        vring_add_used(&ring, head, 8);
        /* Batches of random length, but never one that is kept while the driver waits for it. */
        if (in[0] & 1 || ring.used_next - ring.used_idx > 4 || ring.avail_seen == ring.last_avail)
            if (vring_publish(&ring) && vring_should_notify(&ring))
                signal_on(call_fd);
        pthread_mutex_unlock(&lock);
        left--;
    }
    return NULL;
}

static uint16_t avail_idx, used_seen;

static void offer(uint16_t head)
{
    uint16_t first = indirect ? 0 : head;
    struct vring_desc *d = indirect ? guest->table[head] : guest->desc;
    d[first] = (struct vring_desc){gpa_of(&guest->in[head][0]), 8, VRING_DESC_F_NEXT, (uint16_t)(first + 1)};
    d[first + 1] = (struct vring_desc){gpa_of(&guest->in[head][1]), 8, VRING_DESC_F_NEXT, (uint16_t)(first + 2)};
    d[first + 2] = (struct vring_desc){gpa_of(&guest->out[head]), 8, VRING_DESC_F_WRITE, 0};
    if (indirect)
        guest->desc[head] = (struct vring_desc){gpa_of(d), 48, VRING_DESC_F_INDIRECT, 0};
    __atomic_store_n(&guest->avail[2 + avail_idx % SIZE], head, __ATOMIC_RELAXED);
    avail_idx++;
    __atomic_store_n(&guest->avail[1], avail_idx, __ATOMIC_RELEASE);
}

/* The driver's half of the notification rules, as a Linux guest has them. */
static void kick_if_wanted(uint16_t before)
{
    struct vring_used *used = (void *)guest->used;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (event_idx) {
        uint16_t event = __atomic_load_n((uint16_t *)(void *)&used->ring[SIZE], __ATOMIC_RELAXED);
        if ((uint16_t)(avail_idx - event - 1) < (uint16_t)(avail_idx - before))
            signal_on(kick_fd);
    } else if (!(__atomic_load_n(&used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY)) {
        signal_on(kick_fd);
    }
}

static void wait_for_used(void)
{
    struct vring_used *used = (void *)guest->used;
    for (;;) {
        if (event_idx)
            __atomic_store_n(&guest->avail[2 + SIZE], used_seen, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) != used_seen)
            return;
        pause_on(call_fd, "driver");
    }
}

static int run_ring(uint64_t requests)
{
    struct vring_resubmit none[SIZE];
    uint32_t resubmits;
    uint64_t sent = 0, returned = 0;
    uint16_t spare[SIZE], spares = 0;
    bool busy[SIZE] = {0};
    pthread_t device;
    guest = calloc(1, sizeof(*guest));
    struct vring_memory *memory = memory_of(guest, sizeof(*guest));
    uint64_t log_size = (BASE >> 12) / 8 + 8;
    attach(&ring, memory);
    ring.log = calloc(1, log_size);
    ring.log_size = log_size;
    CHECK(!vring_start(&ring, 0, none, &resubmits) && !resubmits, "start");
    kick_fd = eventfd(0, EFD_NONBLOCK);
    call_fd = eventfd(0, EFD_NONBLOCK);
    for (uint16_t head = 0; head < SIZE; head += indirect ? 1 : 4)
        spare[spares++] = head;
    pthread_create(&device, NULL, device_main, &requests);
    while (returned < requests) {
        uint16_t before = avail_idx;
        uint64_t burst = next_random() % SIZE + 1;
        while (sent < requests && spares && burst--) {
            uint16_t head = spare[--spares];
            guest->in[head][0] = next_random();
            guest->in[head][1] = sent++;
            guest->out[head] = 0;
            busy[head] = true;
            offer(head);
        }
        if (avail_idx != before)
            kick_if_wanted(before);
        wait_for_used();
        struct vring_used *used = (void *)guest->used;
        while (used_seen != __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE)) {
            struct vring_used_elem *e = &used->ring[used_seen % SIZE];
            uint32_t head = __atomic_load_n(&e->id, __ATOMIC_RELAXED);
            CHECK(head < SIZE && busy[head], "head %u returned unasked", head);
            CHECK(guest->out[head] == answer_to(guest->in[head][0], guest->in[head][1]), "head %u: wrong answer", head);
            busy[head] = false;
            spare[spares++] = (uint16_t)head;
            used_seen++;
            returned++;
        }
    }
    pthread_join(device, NULL);
    CHECK(ring.log[(BASE >> 12) / 8] & 1 << (BASE >> 12) % 8, "the used ring's page was never marked");
    free(ring.log);
    free(memory);
    free(guest);
    close(kick_fd);
    close(call_fd);
    return 0;
}

/* ------------------------------------------------------------------ fuzz */

#define REGIONS 3

/* Separate allocations: the sanitizer's red zones are what lies outside guest memory. */
static struct vring_memory *scattered(uint8_t **blocks)
{
    static const struct vring_region wanted[REGIONS] = {{0, 4096, 0}, {4096, 512, 0}, {0x10000, 8192, 0}};
    struct vring_memory *memory = malloc(sizeof(*memory) + REGIONS * sizeof(struct vring_region));
    memory->count = REGIONS;
    for (int i = 0; i < REGIONS; i++) {
        blocks[i] = aligned_alloc(16, wanted[i].size);
        memset(blocks[i], 0, wanted[i].size);
        memory->region[i] = wanted[i];
        memory->region[i].host = (uintptr_t)blocks[i];
    }
    return memory;
}

static uint64_t random_address(void)
{
    static const uint64_t edges[] = {0, 4096, 4608, 0x10000, 0x12000, 0xffffffff, 1ull << 63, UINT64_MAX};
    uint64_t edge = edges[next_random() % (sizeof(edges) / sizeof(edges[0]))];
    return edge + next_random() % 64 - 32 * (next_random() & 1);
}

static struct vring_desc random_desc(void)
{
    static const uint32_t lengths[] = {0, 1, 15, 16, 17, 48, 511, 512, 4096, 5000, 8192, 0x10000, 0xffffffff};
    return (struct vring_desc){
        .addr = random_address(),
        .len = lengths[next_random() % (sizeof(lengths) / sizeof(lengths[0]))],
        .flags = (uint16_t)(next_random() % 5 ? next_random() % 4 : next_random()),
        .next = (uint16_t)(next_random() % 8 ? next_random() % SIZE : next_random()),
    };
}

static void touch(const struct vring *v, const struct vring_chain *c)
{
    uint64_t sum = 0, readable = 0, writable = 0;
    for (uint32_t i = 0; i < c->readable + c->writable; i++) {
        uint8_t *p = c->iov[i].iov_base;
        CHECK(c->iov[i].iov_len == c->len[i] && c->len[i], "length");
        CHECK(vring_translate(v->memory, c->gpa[i], c->len[i]) == p, "address");
        if (i < c->readable) {
            readable += c->len[i];
            for (uint64_t n = 0; n < c->iov[i].iov_len; n++)
                sum += p[n];
        } else {
            writable += c->len[i];
            vring_mark(v, c->gpa[i], c->len[i]);
            p[0] ^= (uint8_t)sum;
            p[c->iov[i].iov_len - 1] ^= (uint8_t)sum;
        }
    }
    CHECK(readable == c->readable_bytes && writable == c->writable_bytes, "sums");
}

static int run_fuzz(uint64_t rounds)
{
    uint8_t *blocks[REGIONS];
    struct vring_memory *memory = scattered(blocks);
    static struct vring_chain chain;
    uint64_t counts[32] = {0};
    struct vring_desc *desc = aligned_alloc(16, SIZE * sizeof(*desc));
    uint16_t *avail = calloc(3 + SIZE, 2);
    uint8_t *used = calloc(1, 4 + 8 * SIZE + 2), *log = malloc(5);
    while (rounds--) {
        struct vring v = {
            .desc = desc, .avail = (void *)avail, .used = (void *)used, .memory = memory, .size = SIZE, .log = log,
            .log_size = 5, .indirect = next_random() % 8 != 0, .event_idx = next_random() & 1,
            .used_gpa = random_address(),
        };
        struct vring_resubmit list[SIZE];
        uint32_t resubmits;
        for (int i = 0; i < SIZE; i++)
            desc[i] = random_desc();
        for (int block = 0; block < REGIONS; block++)
            for (uint64_t at = 0; at + 16 <= memory->region[block].size && next_random() % 32; at += 16) {
                struct vring_desc d = random_desc();
                memcpy(blocks[block] + at, &d, sizeof(d));
            }
        for (int i = 0; i < 3 + SIZE; i++)
            avail[i] = (uint16_t)(next_random() % 4 ? next_random() % SIZE : next_random());
        CHECK(!vring_start(&v, 0, list, &resubmits), "start");
        uint16_t head;
        int popped;
        while ((popped = vring_pop(&v, &head)) > 0) {
            enum vring_error error = vring_parse(&v, head, &chain);
            counts[error]++;
            if (!error)
                touch(&v, &chain);
            vring_add_used(&v, head, 0);
            vring_publish(&v);
            vring_should_notify(&v);
        }
        vring_enable_notify(&v);
        counts[-popped]++;
    }
    for (int error = 0; error <= VRING_BAD_ORDER + 1; error++)
        CHECK(counts[error], "no case of error %d came up: the fuzzer is blind", error);
    CHECK(counts[VRING_BAD_INDEX] && counts[VRING_BAD_HEAD], "no broken ring came up");
    for (int i = 0; i < REGIONS; i++)
        free(blocks[i]);
    free(memory);
    free(desc);
    free(avail);
    free(used);
    free(log);
    return 0;
}

/* ------------------------------------------------------------------ kill */

/* What survives the device: guest memory, the inflight region, and a count of the work done per request. */
struct shared {
    struct guest guest;
    _Alignas(64) uint8_t inflight[sizeof(struct vring_inflight) + SIZE * sizeof(struct vring_inflight_desc)];
    uint32_t done[4096];
};

static void serve(struct shared *s, uint16_t batch, enum vring_step die_at, uint32_t die_after)
{
    struct vring v;
    struct vring_resubmit list[SIZE];
    uint32_t resubmits, queued = 0;
    uint16_t queue[2 * SIZE], head;
    struct vring_memory *memory = memory_of(&s->guest, sizeof(s->guest));
    attach(&v, memory);
    v.inflight = (void *)s->inflight;
    v.die_at = (uint16_t)die_at;
    v.die_after = die_after;
    CHECK(!vring_start(&v, 0x7777, list, &resubmits), "start");
    for (uint32_t i = 0; i < resubmits; i++) {
        CHECK(!i || list[i - 1].counter < list[i].counter, "not in the order of taking");
        queue[queued++] = list[i].head;
    }
    for (;;) {
        while (queued < SIZE && vring_pop(&v, &head) > 0)
            queue[queued++] = head;
        if (!queued)
            break;
        uint16_t now = batch < queued ? batch : (uint16_t)queued;
        /* The newest first: completions out of order. */
        for (uint16_t i = 0; i < now; i++) {
            head = queue[--queued];
            s->done[s->guest.in[head][0]]++;
            vring_reached(&v, VRING_STEP_DONE);
            vring_add_used(&v, head, 1);
        }
        vring_publish(&v);
    }
    free(memory);
}

/* The driver of one kill: offers heads, reaps what is returned. */
static void reap(struct shared *s, bool *busy, uint32_t *returned)
{
    struct vring_used *used = (void *)s->guest.used;
    while (used_seen != used->idx) {
        uint32_t head = used->ring[used_seen++ % SIZE].id;
        CHECK(head < SIZE && busy[head], "head %u returned twice, or unasked", head);
        busy[head] = false;
        returned[s->guest.in[head][0]]++;
    }
}

static uint32_t run_kill_once(struct shared *s, uint16_t batch, enum vring_step step, uint32_t nth)
{
    uint32_t returned[4096] = {0}, sent = 0, died = 0;
    bool busy[SIZE] = {0};
    memset(s, 0, sizeof(*s));
    guest = &s->guest;
    avail_idx = used_seen = 0;
    for (uint32_t life = 0; life < 5; life++) {
        for (uint16_t i = 0, head = (uint16_t)(next_random() % SIZE); i < SIZE; i++, head = (head + 5) % SIZE)
            if (!busy[head]) {
                guest->in[head][0] = sent++;
                guest->desc[head] = (struct vring_desc){gpa_of(&guest->out[head]), 8, VRING_DESC_F_WRITE, 0};
                guest->avail[2 + avail_idx++ % SIZE] = head;
                guest->avail[1] = avail_idx;
                busy[head] = true;
            }
        pid_t pid = fork();
        if (!pid) {
            serve(s, batch, step, nth + life);
            _exit(0);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status), "device");
        CHECK(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 137, "device says %d", WEXITSTATUS(status));
        died += WEXITSTATUS(status) == 137;
        reap(s, busy, returned);
    }
    serve(s, batch, VRING_STEP_NONE, 0);
    reap(s, busy, returned);
    for (uint32_t i = 0; i < sent; i++)
        CHECK(returned[i] == 1 && s->done[i], "step %d, the %u-th, batch %u: request %u returned %u times, done %u times",
              step, nth, batch, i, returned[i], s->done[i]);
    return died;
}

static int run_kill(void)
{
    struct shared *s = mmap(NULL, sizeof(*s), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(s != MAP_FAILED, "mmap");
    for (int step = VRING_STEP_POPPED; step < VRING_STEP_COUNT; step++) {
        uint32_t died = 0;
        for (uint16_t batch = 1; batch <= 5; batch += 2)
            for (uint32_t nth = 1; nth <= 7; nth++)
                died += run_kill_once(s, batch, (enum vring_step)step, nth);
        CHECK(died >= 20, "step %d was reached only %u times", step, died);
    }
    munmap(s, sizeof(*s));
    return 0;
}

int main(int argc, char **argv)
{
    if (argc >= 3)
        state = strtoull(argv[2], NULL, 0) * 2654435761u + 1;
    if (argc == 6 && !strcmp(argv[1], "ring")) {
        event_idx = atoi(argv[4]);
        indirect = atoi(argv[5]);
        return run_ring(strtoull(argv[3], NULL, 0));
    }
    if (argc == 4 && !strcmp(argv[1], "fuzz"))
        return run_fuzz(strtoull(argv[3], NULL, 0));
    if (argc == 3 && !strcmp(argv[1], "kill"))
        return run_kill();
    fprintf(stderr, "usage: %s ring|fuzz|kill …\n", argv[0]);
    return 2;
}
