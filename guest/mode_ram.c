/* A working set that is verified and rewritten without end: what a migration must carry over whole. */
#include "pattern.h"

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define PAGES_PER_STEP 64

struct ram {
    u64 base, pages, next;
    u64 generation; /* of the pages below `next`; those above have the one before */
    u64 bytes_per_s;
    u64 started, written; /* for the rate */
    u64 reported_bytes;
};

static u64 page_key(u64 address, u64 generation) { return mix64(address ^ mix64(generation)); }

static void start(struct task *task)
{
    struct ram *ram = task->state = memory_alloc(sizeof(*ram), 64);
    u64 bytes = word_u64("mb", 64) << 20;
    ram->pages = bytes / PAGE;
    ram->base = memory_claim(bytes);
    ram->bytes_per_s = word_u64("rate", 0) << 20;
    if (!ram->base || !ram->pages)
        die("ram: no room for mb=%lu", bytes >> 20);
    for (u64 i = 0; i < ram->pages; i++)
        pattern_fill((u64 *)(ram->base + i * PAGE), WORDS, page_key(ram->base + i * PAGE, 0));
    ram->generation = 1;
    ram->started = now_ns();
    say("ram open addr=0x%lx mb=%lu rate=%lu", ram->base, bytes >> 20, ram->bytes_per_s >> 20);
}

/* Which generation a word would fit, if any: old data means a page that was lost on the way. */
static const char *diagnose(u64 address, u32 at, u64 word_found, u64 generation)
{
    if (!word_found)
        return "zero";
    for (u64 g = 0; g < generation; g++)
        if (page_key(address, g) + at * PATTERN_STEP == word_found)
            return "stale";
    if (page_key(address, generation) + at * PATTERN_STEP == word_found)
        return "future";
    return "corrupt";
}

static void page_turn(struct ram *ram, u64 address)
{
    u64 *words = (u64 *)address;
    u64 key = page_key(address, ram->generation - 1);
    u32 wrong = pattern_check(words, WORDS, key);
    if (wrong < WORDS)
        bad("ram BAD %s addr=0x%lx got=0x%lx want=0x%lx gen=%lu",
            diagnose(address, wrong, words[wrong], ram->generation), address + wrong * 8, words[wrong],
            key + wrong * PATTERN_STEP, ram->generation - 1);
    pattern_fill(words, WORDS, page_key(address, ram->generation));
}

/* A jump of the clock (pause, migration) must not turn into a burst: the rate restarts from now. */
static bool ahead_of_rate(struct ram *ram)
{
    if (!ram->bytes_per_s)
        return false;
    u64 elapsed = now_ns() - ram->started;
    if (elapsed > NS_PER_S) {
        ram->started += elapsed;
        ram->written = 0;
        return false;
    }
    return ram->written > ram->bytes_per_s / 1000 * (elapsed / NS_PER_MS);
}

static enum progress step(struct task *task)
{
    struct ram *ram = task->state;
    if (ahead_of_rate(ram))
        return IDLE;
    for (u32 i = 0; i < PAGES_PER_STEP && ram->next < ram->pages; i++)
        page_turn(ram, ram->base + ram->next++ * PAGE);
    ram->written += PAGES_PER_STEP * PAGE;
    if (ram->next < ram->pages)
        return BUSY;
    ram->next = 0;
    bool last = task->passes && ram->generation >= task->passes;
    if (last || report_due(task))
        say("ram ok %lu mb=%lu ns=%lu", ram->generation, ram->pages * PAGE >> 20, now_ns());
    ram->generation++;
    return last ? DONE : BUSY;
}

const struct mode mode_ram = {"ram", start, step};
