/* CPUs: IDT, LAPIC, IOAPIC, INIT-SIPI. The LAPIC is used in xAPIC mode through its page. */
#include "probe.h"

enum {
    LAPIC_ID = 0x20,
    LAPIC_TPR = 0x80,
    LAPIC_SVR = 0xf0,
    LAPIC_ICR_LOW = 0x300,
    LAPIC_ICR_HIGH = 0x310,
    LAPIC_LVT_TIMER = 0x320,
    LAPIC_LVT_LINT0 = 0x350,
    LAPIC_TIMER_INITIAL = 0x380,
    LAPIC_TIMER_DIVIDE = 0x3e0,
};
#define LAPIC_ENABLE 0x100
#define LVT_MASKED 0x10000
#define LVT_PERIODIC 0x20000
#define DIVIDE_BY_1 0xb
#define LAPIC_TIMER_HZ 1000000000u /* KVM's APIC_BUS_CYCLE_NS is 1; QEMU's own LAPIC counts the same */

#define ICR_INIT 0x4500
#define ICR_STARTUP 0x4600

extern u8 irq_stubs[], fault_stubs[], general_protection_stub[], spurious_stub[], trampoline[], trampoline_end[];
extern u64 idt[][2];
extern struct cpu bsp_region;
extern volatile u64 ap_region;

struct cpu *cpus[MAX_CPUS];
u32 cpu_count = 1;
static void (*ap_entry)(struct cpu *);

static u32 lapic_read(u32 reg) { return mmio_read32(LAPIC_BASE + reg); }
static void lapic_write(u32 reg, u32 value) { mmio_write32(LAPIC_BASE + reg, value); }

static void idt_set(u32 vector, const u8 *handler)
{
    u64 address = (u64)handler;
    idt[vector][0] =
        (address & 0xffff) | (u64)SEL_CODE0 << 16 | 0x8e00ull << 32 | (address >> 16 & 0xffff) << 48;
    idt[vector][1] = address >> 32;
}

static void idt_init(void)
{
    for (u32 i = 0; i < 32; i++)
        idt_set(i, fault_stubs + i * TRAP_STUB_SIZE);
    idt_set(13, general_protection_stub);
    for (u32 i = 0; i < VECTOR_IRQ_COUNT; i++)
        idt_set(VECTOR_IRQ_FIRST + i, irq_stubs + i * TRAP_STUB_SIZE);
    idt_set(VECTOR_SPURIOUS, spurious_stub);
}

void lapic_init(void)
{
    struct cpu *cpu = this_cpu();
    cpu->apic_id = lapic_read(LAPIC_ID) >> 24;
    cpu->next_vector = VECTOR_TIMER + 1;
    lapic_write(LAPIC_LVT_LINT0, LVT_MASKED); /* firmware may have left a PIC behind it */
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_SVR, LAPIC_ENABLE | VECTOR_SPURIOUS);
}

void lapic_timer(u32 hz)
{
    lapic_write(LAPIC_LVT_TIMER, (hz ? LVT_PERIODIC : LVT_MASKED) | VECTOR_TIMER);
    lapic_write(LAPIC_TIMER_DIVIDE, DIVIDE_BY_1);
    lapic_write(LAPIC_TIMER_INITIAL, hz ? LAPIC_TIMER_HZ / hz : 0);
}

u8 irq_vector(struct cpu *cpu)
{
    if (cpu->next_vector == VECTOR_IRQ_FIRST + VECTOR_IRQ_COUNT)
        die("out of interrupt vectors");
    return cpu->next_vector++;
}

u64 msi_address(const struct cpu *cpu) { return LAPIC_BASE | cpu->apic_id << 12; }

/* Edge, active high, fixed delivery, to the calling CPU. */
void ioapic_route(u32 pin, u8 vector)
{
    enum { REGSEL = 0, WINDOW = 0x10, REDIRECTION = 0x10 };
    mmio_write32(acpi.ioapic + REGSEL, REDIRECTION + 2 * pin + 1);
    mmio_write32(acpi.ioapic + WINDOW, this_cpu()->apic_id << 24);
    mmio_write32(acpi.ioapic + REGSEL, REDIRECTION + 2 * pin);
    mmio_write32(acpi.ioapic + WINDOW, vector);
}

static void delay_ns(u64 ns)
{
    for (u64 end = now_ns() + ns; now_ns() < end;)
        pause();
}

static void send_ipi(u32 apic_id, u32 command)
{
    lapic_write(LAPIC_ICR_HIGH, apic_id << 24);
    lapic_write(LAPIC_ICR_LOW, command);
    while (lapic_read(LAPIC_ICR_LOW) & 1 << 12)
        pause();
}

static void cpu_start(u32 index, u32 apic_id)
{
    struct cpu *cpu = memory_alloc(CPU_REGION, CPU_REGION);
    cpu->index = index;
    cpus[index] = cpu;
    ap_region = (u64)cpu;
    send_ipi(apic_id, ICR_INIT);
    delay_ns(NS_PER_MS);
    for (u32 attempt = 0; attempt < 2 && !cpu->online; attempt++) {
        send_ipi(apic_id, ICR_STARTUP | TRAMPOLINE >> 12);
        for (u64 end = now_ns() + 5000 * NS_PER_MS; !cpu->online && now_ns() < end;)
            pause();
    }
    if (!cpu->online)
        die("cpu%u (apic id %u) did not start", index, apic_id);
}

void cpus_start(u32 count, void (*entry)(struct cpu *))
{
    struct cpu *self = this_cpu();
    if (count > acpi.cpu_count)
        die("cpus=%u but the MADT enables %u", count, acpi.cpu_count);
    ap_entry = entry;
    memcpy((void *)TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
    for (u32 i = 0; i < acpi.cpu_count && cpu_count < count; i++) {
        if (acpi.apic_ids[i] == self->apic_id)
            continue;
        cpu_start(cpu_count, acpi.apic_ids[i]);
        cpu_count++;
    }
}

void halt_forever(void)
{
    static u32 zero;
    lapic_timer(0);
    for (;;)
        gate(&zero, 0);
}

/* An empty IDT turns the first fault into a double and then a triple fault. */
void triple_fault(void)
{
    memset(idt, 0, 4096);
    for (;;)
        __asm__ volatile("ud2");
}

/* Ring 3 begins here, on every CPU. */
void cpu_entry(void);
void cpu_entry(void)
{
    struct cpu *cpu = this_cpu();
    if (cpu == &bsp_region) {
        cpus[0] = cpu;
        idt_init();
        cpu_main(cpu);
    } else {
        lapic_init();
        ap_entry(cpu);
    }
    halt_forever();
}

/* traps.S sends every fault here, on a fresh stack. */
void fault_entry(void);
void fault_entry(void)
{
    const struct fault *f = &this_cpu()->fault;
    while (f->count > 1) /* reporting the first one faulted too */
        pause();
    uart_lock.held = 0; /* the fault may have come inside a line */
    die("fault vector=%lu error=0x%lx rip=0x%lx rsp=0x%lx cr2=0x%lx", f->vector, f->error, f->rip, f->rsp,
        f->cr2);
}
