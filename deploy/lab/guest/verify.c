/* verify DEVICE [SECONDS]: write blocks of a disk and read them back, past the page cache, for ever or so long.
 *
 * Every block carries its number, its generation and a pattern that follows from both; memory keeps which generation
 * each block must have. Once a second it says "verify: ok WRITES READS"; the first wrong block is reported as
 * "verify: BAD block N: generation G, wanted W" and ends it with 1.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8, MOST_BLOCKS = 65536 };

static uint32_t generation[MOST_BLOCKS];
static uint64_t buffer[WORDS] __attribute__((aligned(BLOCK)));

static uint64_t mixed(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

static uint64_t word(uint64_t block, uint64_t gen, unsigned at)
{
    if (at == 0)
        return block;
    return at == 1 ? gen : mixed(block << 40 ^ gen << 10 ^ at);
}

static int failed(const char *what)
{
    fprintf(stderr, "verify: ");
    perror(what);
    return 2;
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: verify DEVICE [SECONDS]\n");
        return 2;
    }
    uint64_t bytes = 0;
    struct stat about;
    int fd = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &about))
        return failed(argv[1]);
    if (S_ISBLK(about.st_mode) ? ioctl(fd, BLKGETSIZE64, &bytes) : (bytes = (uint64_t)about.st_size, 0))
        return failed("BLKGETSIZE64");
    uint64_t blocks = bytes / BLOCK < MOST_BLOCKS ? bytes / BLOCK : MOST_BLOCKS;
    if (!blocks) {
        fprintf(stderr, "verify: %s is smaller than a block\n", argv[1]);
        return 2;
    }
    time_t said = time(NULL), end = argc == 3 ? said + atol(argv[2]) : 0;
    uint64_t random = (uint64_t)said, writes = 0, reads = 0;
    for (;;) {
        random = mixed(random + 0x9e3779b97f4a7c15ull);
        uint64_t block = random % blocks;
        off_t at = (off_t)(block * BLOCK);
        if (!generation[block] || random >> 63) {
            uint64_t gen = generation[block] + 1;
            for (unsigned i = 0; i < WORDS; i++)
                buffer[i] = word(block, gen, i);
            if (pwrite(fd, buffer, BLOCK, at) != BLOCK)
                return failed("write");
            generation[block] = (uint32_t)gen;
            writes++;
        } else {
            if (pread(fd, buffer, BLOCK, at) != BLOCK)
                return failed("read");
            for (unsigned i = 0; i < WORDS; i++)
                if (buffer[i] != word(block, generation[block], i)) {
                    printf("verify: BAD block %llu word %u: generation %llu, wanted %u\n", (unsigned long long)block, i,
                           (unsigned long long)buffer[1], generation[block]);
                    return 1;
                }
            reads++;
        }
        time_t now = time(NULL);
        if (now == said && !end)
            continue;
        if (now != said) {
            printf("verify: ok %llu %llu\n", (unsigned long long)writes, (unsigned long long)reads);
            fflush(stdout);
            said = now;
        }
        if (end && now >= end)
            return 0;
    }
}
