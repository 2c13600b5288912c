/*
 * What every C fuzz target has in common: an input that is consumed from its front, and guest memory between red zones.
 *
 * A target is one file with LLVMFuzzerTestOneInput, which includes the product's source: libFuzzer (clang) or replay.c
 * (gcc) is its main. Everything runs in the caller's thread, so an input always takes the same path.
 */
#ifndef FLOTILLA_FUZZ_H
#define FLOTILLA_FUZZ_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A property of the product that did not hold: a crash for either main. */
#define MUST(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);                             \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

struct input {
    const uint8_t *at;
    size_t left;
};

/* The next `size` bytes (at most 8) as a number; zeros behind the end. */
static inline uint64_t take(struct input *in, size_t size)
{
    uint64_t value = 0;
    size_t n = size < in->left ? size : in->left;
    memcpy(&value, in->at, n);
    in->at += n;
    in->left -= n;
    return value;
}

static inline uint64_t below(struct input *in, uint64_t limit)
{
    return take(in, limit > 256 ? 2 : 1) % limit;
}

/* Guest memory: each region an allocation of its own, so that what lies outside is a red zone. The first two are
 * neighbours in guest addresses only; behind the second is a hole. */
#define GUEST_REGIONS 3
static const uint64_t guest_gpa[GUEST_REGIONS] = {0, 0x4000, 0x10000};
static const uint64_t guest_size[GUEST_REGIONS] = {0x4000, 0x1200, 0x2000};
#define GUEST_BYTES (0x4000 + 0x1200 + 0x2000)
#define GUEST_LOG_BYTES 3 /* one bit per page below 0x12000, and as ever the last bits have no byte */

struct guest {
    uint8_t *block[GUEST_REGIONS];
};

static inline void guest_make(struct guest *g)
{
    for (int i = 0; i < GUEST_REGIONS; i++) {
        g->block[i] = aligned_alloc(64, guest_size[i]);
        MUST(g->block[i]);
        memset(g->block[i], 0, guest_size[i]);
    }
}

static inline void guest_free(struct guest *g)
{
    for (int i = 0; i < GUEST_REGIONS; i++)
        free(g->block[i]);
}

/* An address in or around guest memory: near an edge of a region, anywhere in the first 0x12000, or any at all. */
static inline uint64_t guest_address(struct input *in)
{
    uint64_t kind = take(in, 1), offset = take(in, 2);
    switch (kind & 3) {
    case 0: return guest_gpa[(kind >> 2) % GUEST_REGIONS] + offset % 0x1000;
    case 1: return guest_gpa[(kind >> 2) % GUEST_REGIONS] + guest_size[(kind >> 2) % GUEST_REGIONS] - offset % 64;
    case 2: return offset & 8 ? offset << (kind >> 2) : UINT64_MAX - offset;
    default: return offset % 0x12000;
    }
}

static inline uint32_t guest_length(struct input *in)
{
    static const uint32_t lengths[] = {0, 1, 8, 12, 15, 16, 17, 32, 48, 512, 513, 1024, 4096, 0x1200, 0x8000, 0xffffffff};
    uint64_t kind = take(in, 1);
    return kind < 128 ? lengths[kind % 16] : (uint32_t)((kind & 127) * 16);
}

/* Bytes of the input into guest memory, as far as they lie within one region. */
static inline void guest_write(struct guest *g, uint64_t gpa, struct input *in, size_t size)
{
    if (size > in->left)
        size = in->left;
    for (int i = 0; i < GUEST_REGIONS; i++)
        if (gpa - guest_gpa[i] < guest_size[i]) {
            size_t room = guest_size[i] - (gpa - guest_gpa[i]);
            memcpy(g->block[i] + (gpa - guest_gpa[i]), in->at, size < room ? size : room);
        }
    in->at += size;
    in->left -= size;
}

static inline uint8_t *guest_at(const struct guest *g, uint64_t gpa, size_t size)
{
    for (int i = 0; i < GUEST_REGIONS; i++)
        if (gpa - guest_gpa[i] < guest_size[i] && size <= guest_size[i] - (gpa - guest_gpa[i]))
            return g->block[i] + (gpa - guest_gpa[i]);
    return NULL;
}

static inline void guest_save(const struct guest *g, uint8_t *to)
{
    for (int i = 0; i < GUEST_REGIONS; to += guest_size[i++])
        memcpy(to, g->block[i], guest_size[i]);
}

/* Every page that differs from `before` must be marked in `log`. */
static inline void guest_must_be_logged(const struct guest *g, const uint8_t *before, const uint8_t *log)
{
    for (int i = 0; i < GUEST_REGIONS; before += guest_size[i++])
        for (uint64_t at = 0; at < guest_size[i]; at += 4096) {
            uint64_t n = guest_size[i] - at < 4096 ? guest_size[i] - at : 4096, page = (guest_gpa[i] + at) >> 12;
            if (memcmp(g->block[i] + at, before + at, n))
                MUST(log[page / 8] >> page % 8 & 1);
        }
}

#endif
