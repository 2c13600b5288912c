/* Time: kvmclock (Linux Documentation/virt/kvm/x86/msr.rst) or, without KVM, the TSC measured against the PM timer. */
#include "probe.h"

#define PM_TIMER_HZ 3579545ull

static u64 ns_per_tick = 1ull << 32; /* 32.32 fixed point */
static const char *name = "tsc-assumed-1ghz";

/* 5 ms against the PM timer; without one the TSC is taken for 1 GHz. */
void clock_init(void)
{
    struct cpu *cpu = this_cpu();
    if (cpu->clock.version) {
        name = "kvmclock";
        return;
    }
    if (!acpi.pm_timer)
        return;
    u32 mask = acpi.pm_timer_32bit ? 0xffffffff : 0xffffff;
    u32 start = in32(acpi.pm_timer), elapsed = 0;
    u64 tsc = rdtsc();
    for (u32 i = 0; i < 1000000 && elapsed < PM_TIMER_HZ / 200; i++)
        elapsed = (in32(acpi.pm_timer) - start) & mask;
    if (!elapsed)
        return;
    ns_per_tick = (NS_PER_S << 32) / ((rdtsc() - tsc) * PM_TIMER_HZ / elapsed);
    name = "tsc-by-pm-timer";
}

const char *clock_name(void) { return name; }

static u64 kvmclock_ns(volatile struct pvclock *clock)
{
    for (;;) {
        u32 version = clock->version;
        compiler_barrier();
        u64 delta = rdtsc() - clock->tsc_timestamp;
        delta = clock->tsc_shift >= 0 ? delta << clock->tsc_shift : delta >> -clock->tsc_shift;
        u64 ns = clock->system_time + (u64)((unsigned __int128)delta * clock->tsc_to_system_mul >> 32);
        compiler_barrier();
        if (!(version & 1) && version == clock->version)
            return ns;
    }
}

u64 now_ns(void)
{
    struct cpu *cpu = this_cpu();
    u64 ns = cpu->clock.version ? kvmclock_ns(&cpu->clock) : (u64)((unsigned __int128)rdtsc() * ns_per_tick >> 32);
    if (ns > cpu->last_ns)
        cpu->last_ns = ns;
    else if (cpu->last_ns - ns > cpu->back_ns)
        cpu->back_ns = cpu->last_ns - ns;
    return cpu->last_ns;
}
