/* The probe guest's core: types, port and memory access, CPUs, time, memory, log, command line.
 * All C code runs in ring 3. */
#ifndef PROBE_H
#define PROBE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define NS_PER_MS 1000000ul
#define NS_PER_S 1000000000ul

/* ---- access ------------------------------------------------------------------------------------------ */

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }

static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u16 in16(u16 port)
{
    u16 value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u32 in32(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* MMIO by plain MOV only: the VMM's instruction emulator sees one access of exactly this size. */
#define MMIO_ACCESS(bits, constraint)                                                                        \
    static inline u##bits mmio_read##bits(u64 address)                                                       \
    {                                                                                                        \
        u##bits value;                                                                                       \
        __asm__ volatile("mov (%1), %0" : constraint(value) : "r"(address) : "memory");                      \
        return value;                                                                                        \
    }                                                                                                        \
    static inline void mmio_write##bits(u64 address, u##bits value)                                          \
    {                                                                                                        \
        __asm__ volatile("mov %0, (%1)" ::"r"(value), "r"(address) : "memory");                              \
    }
MMIO_ACCESS(8, "=q")
MMIO_ACCESS(16, "=r")
MMIO_ACCESS(32, "=r")
MMIO_ACCESS(64, "=r")

static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}

static inline void pause(void) { __asm__ volatile("pause" ::: "memory"); }
static inline void compiler_barrier(void) { __asm__ volatile("" ::: "memory"); }
static inline void full_barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* ---- CPUs -------------------------------------------------------------------------------------------- */

/* Layout of pvclock_vcpu_time_info: Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW. */
struct pvclock {
    u32 version;
    u32 pad0;
    u64 tsc_timestamp;
    u64 system_time;
    u32 tsc_to_system_mul;
    signed char tsc_shift;
    u8 flags;
    u8 pad[2];
};

struct fault {
    u64 vector, error, rip, rsp, cr2, count;
};

struct cpu {
    u32 index;
    u32 apic_id;
    volatile u32 irq_total;
    volatile u32 online;
    volatile u32 irq_count[256];
    struct fault fault;
    u8 pad0[CPU_KVM_FEATURES - CPU_FAULT - sizeof(struct fault)];
    u32 kvm_features;
    u8 pad1[CPU_GDT - CPU_KVM_FEATURES - 4];
    u64 gdt[16];
    u8 tss[0x68];
    u8 pad2[CPU_CLOCK - CPU_TSS - 0x68];
    volatile struct pvclock clock;
    u64 last_ns;
    u64 back_ns; /* the furthest the clock was ever seen behind itself */
    volatile u32 done; /* this CPU's tasks have finished their passes */
    u32 bad;           /* BAD lines printed */
    u32 line_length;
    u8 next_vector;
    const char *scope; /* the mode whose code runs: `MODE.key` words apply to it */
    char line[1024];
};

_Static_assert(offsetof(struct cpu, irq_total) == CPU_IRQ_TOTAL, "layout.h");
_Static_assert(offsetof(struct cpu, irq_count) == CPU_IRQ, "layout.h");
_Static_assert(offsetof(struct cpu, fault) == CPU_FAULT, "layout.h");
_Static_assert(offsetof(struct cpu, fault.count) == CPU_FAULT_COUNT, "layout.h");
_Static_assert(offsetof(struct cpu, kvm_features) == CPU_KVM_FEATURES, "layout.h");
_Static_assert(offsetof(struct cpu, gdt) == CPU_GDT, "layout.h");
_Static_assert(offsetof(struct cpu, tss) == CPU_TSS, "layout.h");
_Static_assert(offsetof(struct cpu, clock) == CPU_CLOCK, "layout.h");
_Static_assert(sizeof(struct cpu) <= CPU_RING0_TOP - 0x1000, "a page for the ring 0 stack");
_Static_assert(CPU_RING0_TOP <= CPU_IO_BITMAP, "layout.h");

#define MAX_CPUS 64
#define VECTOR_TIMER VECTOR_IRQ_FIRST

extern struct cpu *cpus[MAX_CPUS];
extern u32 cpu_count;

static inline struct cpu *this_cpu(void)
{
    u64 rsp;
    __asm__ volatile("mov %%rsp, %0" : "=r"(rsp));
    return (struct cpu *)(rsp & -(u64)CPU_REGION);
}

/* Interrupts on; halt until the next one unless *word already differs from value. (traps.S) */
void gate(volatile u32 *word, u32 value);

static inline void interrupts_on(void)
{
    static u32 zero;
    gate(&zero, 1);
}

void lapic_init(void);
void lapic_timer(u32 hz); /* periodic on VECTOR_TIMER; 0 stops it */
u8 irq_vector(struct cpu *cpu);
u64 msi_address(const struct cpu *cpu);
void ioapic_route(u32 pin, u8 vector);
void cpus_start(u32 count, void (*entry)(struct cpu *));
void cpu_main(struct cpu *cpu);
void halt_forever(void) __attribute__((noreturn));

/* ---- locks ------------------------------------------------------------------------------------------- */

struct lock {
    volatile u32 held;
};

static inline void lock_take(struct lock *lock)
{
    while (__atomic_exchange_n(&lock->held, 1, __ATOMIC_ACQUIRE))
        while (lock->held)
            pause();
}

static inline void lock_drop(struct lock *lock) { __atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE); }

extern struct lock uart_lock, pci_lock;

/* ---- time -------------------------------------------------------------------------------------------- */

void clock_init(void);
u64 now_ns(void);      /* kvmclock where there is one, else a calibrated TSC; never goes back on one CPU */
const char *clock_name(void);

/* ---- memory ------------------------------------------------------------------------------------------ */

struct memory_range {
    u64 address, size;
    u32 type, pad;
};

extern struct memory_range memory_map[64];
extern u32 memory_map_count;
extern char command_line[4096];
extern u64 rsdp_address;

void boot_info_read(void);
void memory_init(void);
void *memory_alloc(u64 size, u64 align); /* zeroed, below 4 GiB, never freed; stops the probe when RAM is short */
u64 memory_claim(u64 size);              /* a contiguous 2 MiB aligned block anywhere; 0 when there is none */
void memory_map_range(u64 address, u64 size, bool device);

/* ---- library ----------------------------------------------------------------------------------------- */

void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
int memcmp(const void *a, const void *b, size_t size);
size_t strlen(const char *s);
bool str_equal(const char *a, const char *b);
u32 crc32(u32 crc, const void *data, size_t size); /* zlib's crc32() */
u64 mix64(u64 x);
u64 random64(u64 *state);

/* ---- log: one line, whole, on COM1 -------------------------------------------------------------------- */

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void bad(const char *format, ...) __attribute__((format(printf, 1, 2))); /* say(), counted in cpu->bad */
void line_add(const char *format, ...) __attribute__((format(printf, 1, 2)));
void line_hex(const void *data, size_t size);
void line_end(void);
void uart_put(u8 byte); /* the caller holds uart_lock */
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* ---- command line ------------------------------------------------------------------------------------- */

/* A word `key=value` is looked up as `cpuN.key` first, then (on an AP) `ap.key`, then `MODE.key`, then `key`.
 * `ap=x` means `ap.mode=x`. A bare word `key` has the value "1". */
const char *word(const char *key);                  /* NULL when absent; ends at a blank: compare with word_is() */
bool word_is(const char *value, const char *text);
u64 word_u64(const char *key, u64 otherwise);       /* decimal or 0x..., suffix k, m, g */
bool word_flag(const char *key, bool otherwise);
bool word_next(const char **list, char *item, size_t size); /* walks "a,b,c" */

/* ---- ACPI --------------------------------------------------------------------------------------------- */

struct acpi {
    u64 ecam;
    u64 ioapic;
    u16 pm_timer;
    bool pm_timer_32bit;
    bool hw_reduced;
    u16 pm1a_control;
    u64 sleep_control;
    bool sleep_is_io;
    u64 reset_register;
    bool reset_is_io;
    u8 reset_value;
    u32 cpu_count; /* enabled CPUs */
    u32 apic_ids[MAX_CPUS];
};

extern struct acpi acpi;
void acpi_init(void);
void acpi_print(void);
void power_off(void) __attribute__((noreturn));
void power_reset(const char *how) __attribute__((noreturn));
void triple_fault(void) __attribute__((noreturn));

/* ---- tasks -------------------------------------------------------------------------------------------- */

enum progress { BUSY, IDLE, DONE };

/* A mode is a cooperative task: `step` does a bounded piece of work and never blocks. A CPU steps its tasks in
 * turn and halts until the next interrupt when all are IDLE. */
struct task {
    const struct mode *mode;
    struct cpu *cpu;
    void *state;
    u64 passes;    /* stop after so many; 0 = never */
    u64 report_ns; /* shortest time between two progress lines */
    u64 next_report;
    bool polled;
    bool done;
};

struct mode {
    const char *name;
    void (*start)(struct task *task);
    enum progress (*step)(struct task *task);
};

extern const struct mode mode_equal, mode_blkload, mode_ram, mode_exits, mode_tick, mode_rng, mode_console,
    mode_echo, mode_net, mode_netload, mode_netflood, mode_pci, mode_acpi, mode_fuzz;

bool report_due(struct task *task); /* true at most once per report_ns */

#endif
