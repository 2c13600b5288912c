/*
 * shared/vring.h under a hostile driver and a hostile inflight region: parse, mark, return, publish, recover.
 *
 * Must hold: what parses lies in guest memory, its sums are right; every page that changes is in the dirty log.
 */
#include "guest_ring.h"

static void touch(const struct vring *v, const struct vring_chain *c)
{
    uint64_t readable = 0, writable = 0;
    volatile uint8_t sum = 0;
    for (uint32_t i = 0; i < c->readable + c->writable; i++) {
        uint8_t *p = c->iov[i].iov_base;
        MUST(c->len[i] && c->iov[i].iov_len == c->len[i]);
        MUST(vring_translate(v->memory, c->gpa[i], c->len[i]) == p);
        for (uint32_t n = 0; n < c->len[i]; n += 61)
            sum = (uint8_t)(sum + p[n]);
        if (i < c->readable) {
            readable += c->len[i];
        } else {
            writable += c->len[i];
            p[0] ^= 0xff;
            p[c->len[i] - 1] ^= 0x55;
            vring_mark(v, c->gpa[i], c->len[i]);
        }
    }
    MUST(readable == c->readable_bytes && writable == c->writable_bytes);
}

/* One turn of a device that does nothing with its requests. */
static void turn(struct vring *v)
{
    static struct vring_chain chain;
    uint16_t head;
    int popped = 0;
    vring_disable_notify(v);
    for (int n = 0; n < 300 && (popped = vring_pop(v, &head)) > 0; n++) {
        MUST(head < v->size);
        if (!vring_parse(v, head, &chain))
            touch(v, &chain);
        vring_add_used(v, head, 1);
        if (n % 3 == 0 && vring_publish(v))
            vring_should_notify(v);
    }
    if (vring_publish(v))
        vring_should_notify(v);
    vring_enable_notify(v);
    MUST(popped <= 0 || v->size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t before[GUEST_BYTES];
    struct input in = {data, size};
    struct guest guest;
    guest_make(&guest);
    uint8_t flags = (uint8_t)take(&in, 1);
    struct ring ring = {&guest, below(&in, 4) * RING_BYTES, (uint16_t)(1u << below(&in, RING_MAX_ORDER + 1)), 0, flags & 16};
    struct vring_memory *memory = ring_memory(&guest);
    size_t inflight_size = sizeof(struct vring_inflight) + ring.size * sizeof(struct vring_inflight_desc);
    struct vring_inflight *inflight = flags & 8 ? malloc(inflight_size) : NULL;
    struct vring_resubmit *list = malloc(ring.size * sizeof(*list));
    uint8_t *log = calloc(1, GUEST_LOG_BYTES);
    struct vring_setup setup = ring_setup(&ring, 0, flags);
    setup.base = (uint16_t)take(&in, 2);
    setup.inflight = (uintptr_t)inflight;
    setup.inflight_desc_num = ring.size;
    if (inflight)
        for (size_t i = 0; i < inflight_size; i++)
            ((uint8_t *)inflight)[i] = (uint8_t)take(&in, 1);
    ring_used(&ring)->idx = (uint16_t)take(&in, 2);
    ring.avail = ring_avail(&ring)->idx = setup.base;

    struct vring v = {0};
    uint32_t resubmits;
    MUST(vring_setup_valid(&setup));
    guest_save(&guest, before);
    MUST(!vring_set_up(&v, &setup, memory, log, GUEST_LOG_BYTES, list, &resubmits));
    MUST(resubmits <= ring.size);
    for (uint32_t i = 0; i < resubmits; i++)
        MUST(list[i].head < ring.size && (!i || list[i - 1].counter <= list[i].counter));
    while (in.left) {
        uint8_t op = (uint8_t)(take(&in, 1) % 9);
        if (ring_step(&ring, &in, op))
            continue;
        if (op == 8 && inflight)
            ((uint8_t *)inflight)[below(&in, inflight_size)] = (uint8_t)take(&in, 1);
        memset(log, 0, GUEST_LOG_BYTES);
        guest_save(&guest, before);
        turn(&v);
        guest_must_be_logged(&guest, before, log);
    }
    free(log);
    free(list);
    free(inflight);
    free(memory);
    guest_free(&guest);
    return 0;
}
