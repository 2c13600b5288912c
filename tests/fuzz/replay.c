/*
 * A main for fuzz targets without libFuzzer: any compiler with ASan and UBSan will do.
 *
 *   TARGET FILE…                  each file once
 *   TARGET -random SEED COUNT FILE…   COUNT inputs made from the files and the seed; the last one is written to the file
 *                                 named by FUZZ_LAST before it runs, so that a crash can be replayed
 */
#include "fuzz.h"

#define MAX_INPUT 4096

static uint64_t state;

static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static size_t load(const char *path, uint8_t *to)
{
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(2);
    }
    size_t size = fread(to, 1, MAX_INPUT, file);
    fclose(file);
    return size;
}

/* Change a few bytes, insert, cut, or double a part. */
static size_t mutate(uint8_t *data, size_t size)
{
    for (uint64_t n = 1 + next_random() % 12; n; n--) {
        uint64_t at = size ? next_random() % size : 0, count = 1 + next_random() % 16;
        switch (next_random() % 5) {
        case 0:
            for (; count && size < MAX_INPUT; count--)
                data[size++] = (uint8_t)next_random();
            break;
        case 1:
            if (at + count < size) {
                memmove(data + at, data + at + count, size - at - count);
                size -= count;
            }
            break;
        case 2:
            if (at + count <= size && size + count <= MAX_INPUT) {
                memmove(data + at + count, data + at, size - at);
                size += count;
            }
            break;
        default:
            if (size)
                data[at] = (uint8_t)(next_random() & 1 ? next_random() : data[at] + 1 - (next_random() & 2));
        }
    }
    return size;
}

static void run(const uint8_t *data, size_t size)
{
    /* A copy of just that length: a read beyond the input is the target's own mistake. */
    uint8_t *copy = malloc(size ? size : 1);
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static void keep(const char *path, const uint8_t *data, size_t size)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    MUST(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    close(fd);
}

int main(int argc, char **argv)
{
    static uint8_t data[MAX_INPUT];
    bool random = argc > 3 && !strcmp(argv[1], "-random");
    int first = random ? 4 : 1;
    if (argc <= first) {
        fprintf(stderr, "usage: %s [-random SEED COUNT] FILE…\n", argv[0]);
        return 2;
    }
    if (!random) {
        for (int i = first; i < argc; i++)
            run(data, load(argv[i], data));
        return 0;
    }
    const char *last = getenv("FUZZ_LAST");
    state = strtoull(argv[2], NULL, 0) * 2654435761u + 1;
    for (uint64_t n = strtoull(argv[3], NULL, 0); n; n--) {
        size_t size = mutate(data, load(argv[first + (int)(next_random() % (uint64_t)(argc - first))], data));
        if (last)
            keep(last, data, size);
        run(data, size);
    }
    return 0;
}
