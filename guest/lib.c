/* String and number helpers: freestanding C has none. */
#include "probe.h"

void *memcpy(void *to, const void *from, size_t size)
{
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
    return result;
}

void *memset(void *to, int byte, size_t size)
{
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(byte) : "memory");
    return result;
}

int memcmp(const void *a, const void *b, size_t size)
{
    const u8 *x = a, *y = b;
    for (size_t i = 0; i < size; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

size_t strlen(const char *s)
{
    size_t n = 0;
    while (s[n])
        n++;
    return n;
}

bool str_equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* Slicing-by-8; the table is made at first use. Polynomial 0xEDB88320, as zlib and Python's binascii. */
u32 crc32(u32 crc, const void *data, size_t size)
{
    static u32 table[8][256];
    const u8 *p = data;
    if (!table[0][1]) {
        for (u32 i = 0; i < 256; i++) {
            u32 c = i;
            for (int k = 0; k < 8; k++)
                c = c & 1 ? c >> 1 ^ 0xedb88320 : c >> 1;
            __atomic_store_n(&table[0][i], c, __ATOMIC_RELAXED);
        }
        for (u32 i = 0; i < 256; i++)
            for (int k = 1; k < 8; k++)
                table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 0xff];
    }
    crc = ~crc;
    for (; size >= 8; size -= 8, p += 8) {
        u32 low = *(const u32 *)p ^ crc, high = *(const u32 *)(p + 4);
        crc = table[7][low & 0xff] ^ table[6][low >> 8 & 0xff] ^ table[5][low >> 16 & 0xff] ^
              table[4][low >> 24] ^ table[3][high & 0xff] ^ table[2][high >> 8 & 0xff] ^
              table[1][high >> 16 & 0xff] ^ table[0][high >> 24];
    }
    while (size--)
        crc = crc >> 8 ^ table[0][(crc ^ *p++) & 0xff];
    return ~crc;
}

/* The finaliser of splitmix64: a bijection, so different inputs never collide. */
u64 mix64(u64 x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

u64 random64(u64 *state) { return mix64(*state += 0x9e3779b97f4a7c15ull); }

static bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

static bool skip(const char **p, const char *text)
{
    size_t n = strlen(text);
    if (memcmp(*p, text, n))
        return false;
    *p += n;
    return true;
}

/* Where the last `scope` `dot` `key` of the command line has its value; "1" for a bare word. */
static const char *find(const char *scope, const char *dot, const char *key)
{
    const char *found = NULL;
    for (const char *p = command_line; *p;) {
        while (is_blank(*p))
            p++;
        const char *end = p;
        if (skip(&end, scope) && skip(&end, dot) && skip(&end, key)) {
            if (*end == '=')
                found = end + 1;
            else if (!*end || is_blank(*end))
                found = "1";
        }
        while (*p && !is_blank(*p))
            p++;
    }
    return found;
}

const char *word(const char *key)
{
    struct cpu *cpu = this_cpu();
    const char *value;
    char prefix[] = "cpu00";
    char *p = prefix + 3;
    if (cpu->index >= 10)
        *p++ = (char)('0' + cpu->index / 10);
    *p++ = (char)('0' + cpu->index % 10);
    *p = 0;
    if ((value = find(prefix, ".", key)))
        return value;
    if (cpu->index && (value = find("ap", ".", key)))
        return value;
    if (cpu->index && str_equal(key, "mode") && (value = find("", "", "ap")))
        return value;
    if (cpu->scope && (value = find(cpu->scope, ".", key)))
        return value;
    return find("", "", key);
}

bool word_is(const char *value, const char *text)
{
    size_t n = strlen(text);
    return value && !memcmp(value, text, n) && (!value[n] || is_blank(value[n]));
}

static u64 parse_u64(const char *p)
{
    u64 n = 0;
    if (p[0] == '0' && p[1] == 'x') {
        for (p += 2;; p++) {
            if (*p >= '0' && *p <= '9')
                n = n << 4 | (u64)(*p - '0');
            else if ((*p | 32) >= 'a' && (*p | 32) <= 'f')
                n = n << 4 | (u64)((*p | 32) - 'a' + 10);
            else
                return n;
        }
    }
    for (; *p >= '0' && *p <= '9'; p++)
        n = n * 10 + (u64)(*p - '0');
    switch (*p) {
    case 'k':
        return n << 10;
    case 'm':
        return n << 20;
    case 'g':
        return n << 30;
    default:
        return n;
    }
}

u64 word_u64(const char *key, u64 otherwise)
{
    const char *value = word(key);
    return value ? parse_u64(value) : otherwise;
}

bool word_flag(const char *key, bool otherwise)
{
    const char *value = word(key);
    if (!value)
        return otherwise;
    return !(word_is(value, "0") || word_is(value, "off") || word_is(value, "no"));
}

bool word_next(const char **list, char *item, size_t size)
{
    const char *p = *list;
    size_t n = 0;
    if (!p || !*p || is_blank(*p))
        return false;
    while (*p && !is_blank(*p) && *p != ',') {
        if (n + 1 < size)
            item[n++] = *p;
        p++;
    }
    item[n] = 0;
    *list = *p == ',' ? p + 1 : p;
    return true;
}
