/* Atomic operations on a 32-bit word of memory that several processes share.
 *
 * Python has none: ctypes loads and stores are plain, and a lock in shared memory dies with its holder. Freestanding, so
 * that nothing but the instruction stands between the caller and the word. All are sequentially consistent.
 */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT uint32_t load32(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

EXPORT void store32(uint32_t *word, uint32_t value)
{
	__atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

/* Store `desired` if the word holds `expected`. Returns what it held: the exchange happened when that is `expected`. */
EXPORT uint32_t cas32(uint32_t *word, uint32_t expected, uint32_t desired)
{
	__atomic_compare_exchange_n(word, &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	return expected;
}
