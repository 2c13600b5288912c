/* Lines on COM1. A line is put together in the CPU's own buffer and sent whole under one lock. */
#include "probe.h"

struct lock uart_lock;

#define UART_LSR (COM1 + 5)
#define LSR_THR_EMPTY 0x20

void uart_put(u8 byte)
{
    for (u32 spins = 0; !(in8(UART_LSR) & LSR_THR_EMPTY) && spins < 1000000; spins++)
        pause();
    out8(COM1, byte);
}

static void line_char(struct cpu *cpu, char c)
{
    if (cpu->line_length < sizeof(cpu->line))
        cpu->line[cpu->line_length++] = c;
}

static void line_number(struct cpu *cpu, u64 value, u32 base, u32 width, char pad)
{
    char digits[24];
    u32 n = 0;
    do
        digits[n++] = "0123456789abcdef"[value % base];
    while (value /= base);
    for (; width > n; width--)
        line_char(cpu, pad);
    while (n)
        line_char(cpu, digits[--n]);
}

/* %s %c %u %d %x, with 0, width and l/ll/z. */
static void line_format(struct cpu *cpu, const char *p, va_list args)
{
    for (; *p; p++) {
        if (*p != '%') {
            line_char(cpu, *p);
            continue;
        }
        char pad = *++p == '0' ? '0' : ' ';
        u32 width = 0, wide = 0;
        for (; *p >= '0' && *p <= '9'; p++)
            width = width * 10 + (u32)(*p - '0');
        for (; *p == 'l' || *p == 'z'; p++)
            wide = 1;
        if (*p == 's') {
            for (const char *s = va_arg(args, const char *); *s; s++)
                line_char(cpu, *s);
        } else if (*p == 'c') {
            line_char(cpu, (char)va_arg(args, int));
        } else if (*p == 'd') {
            long value = wide ? va_arg(args, long) : va_arg(args, int);
            if (value < 0)
                line_char(cpu, '-');
            line_number(cpu, value < 0 ? -(u64)value : (u64)value, 10, width, pad);
        } else if (*p == 'u' || *p == 'x') {
            u64 value = wide ? va_arg(args, unsigned long) : va_arg(args, unsigned int);
            line_number(cpu, value, *p == 'x' ? 16 : 10, width, pad);
        } else {
            line_char(cpu, *p);
        }
    }
}

static void line_begin(struct cpu *cpu)
{
    if (cpu->line_length || !cpu->index)
        return;
    line_char(cpu, 'c');
    line_char(cpu, 'p');
    line_char(cpu, 'u');
    line_number(cpu, cpu->index, 10, 0, ' ');
    line_char(cpu, ':');
    line_char(cpu, ' ');
}

void line_add(const char *format, ...)
{
    struct cpu *cpu = this_cpu();
    va_list args;
    line_begin(cpu);
    va_start(args, format);
    line_format(cpu, format, args);
    va_end(args);
}

void line_hex(const void *data, size_t size)
{
    struct cpu *cpu = this_cpu();
    line_begin(cpu);
    for (size_t i = 0; i < size; i++)
        line_number(cpu, ((const u8 *)data)[i], 16, 2, '0');
}

void line_end(void)
{
    struct cpu *cpu = this_cpu();
    lock_take(&uart_lock);
    for (u32 i = 0; i < cpu->line_length; i++)
        uart_put((u8)cpu->line[i]);
    uart_put('\n');
    lock_drop(&uart_lock);
    cpu->line_length = 0;
}

void say(const char *format, ...)
{
    struct cpu *cpu = this_cpu();
    va_list args;
    line_begin(cpu);
    va_start(args, format);
    line_format(cpu, format, args);
    va_end(args);
    line_end();
}

/* A device that has gone wrong goes wrong on every access: the first lines tell, the rest is counted. */
#define BAD_LINES 50

void bad(const char *format, ...)
{
    struct cpu *cpu = this_cpu();
    va_list args;
    if (cpu->bad++ >= BAD_LINES)
        return;
    line_begin(cpu);
    va_start(args, format);
    line_format(cpu, format, args);
    va_end(args);
    line_end();
}

void die(const char *format, ...)
{
    struct cpu *cpu = this_cpu();
    va_list args;
    cpu->line_length = 0;
    line_begin(cpu);
    line_format(cpu, "probe: error ", args);
    va_start(args, format);
    line_format(cpu, format, args);
    va_end(args);
    line_end();
    halt_forever();
}
