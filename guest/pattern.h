/* Self-describing data: every word follows from a key, so that what is read tells whether, where and when it was
 * written. guest/pattern.py checks a disk image on the host. */
#ifndef PATTERN_H
#define PATTERN_H

#include "probe.h"

#define PATTERN_STEP 0x9e3779b97f4a7c15ul

static inline void pattern_fill(u64 *words, u32 count, u64 key)
{
    for (u32 i = 0; i < count; i++, key += PATTERN_STEP)
        words[i] = key;
}

/* Index of the first wrong word, or count. */
static inline u32 pattern_check(const u64 *words, u32 count, u64 key)
{
    u64 difference = 0;
    u64 k = key;
    for (u32 i = 0; i < count; i++, k += PATTERN_STEP)
        difference |= words[i] ^ k;
    if (!difference)
        return count;
    for (u32 i = 0; i < count; i++, key += PATTERN_STEP)
        if (words[i] != key)
            return i;
    return count;
}

#endif
