/* Start-up and the task loop of a CPU. */
#include "probe.h"

#define MAX_TASKS 8

static const struct mode *const modes[] = {
    &mode_equal,   &mode_blkload, &mode_ram, &mode_exits, &mode_tick,     &mode_rng,
    &mode_console, &mode_echo,    &mode_net, &mode_netload, &mode_netflood, &mode_pci, &mode_acpi,
    &mode_fuzz,
};

bool report_due(struct task *task)
{
    u64 now = now_ns();
    if (now < task->next_report)
        return false;
    task->next_report = now + task->report_ns;
    return true;
}

static const struct mode *mode_find(const char *name)
{
    for (u32 i = 0; i < ARRAY_SIZE(modes); i++)
        if (str_equal(modes[i]->name, name))
            return modes[i];
    die("unknown mode=%s", name);
}

static u32 tasks_start(struct cpu *cpu, struct task *tasks)
{
    const char *list = word("mode");
    char name[16];
    u32 count = 0;
    while (word_next(&list, name, sizeof(name)) && count < MAX_TASKS) {
        struct task *task = &tasks[count++];
        task->mode = mode_find(name);
        task->cpu = cpu;
        cpu->scope = task->mode->name;
        task->passes = word_u64("passes", 0);
        task->report_ns = word_u64("report_ms", task->mode == &mode_equal ? 0 : 1000) * NS_PER_MS;
        task->polled = word_flag("poll", false);
        task->mode->start(task);
    }
    cpu->scope = NULL;
    return count;
}

static void tasks_run(struct cpu *cpu, struct task *tasks, u32 count)
{
    for (u32 left = count; left;) {
        u32 seen = cpu->irq_total;
        bool busy = false;
        for (u32 i = 0; i < count; i++) {
            struct task *task = &tasks[i];
            if (task->done)
                continue;
            cpu->scope = task->mode->name;
            enum progress progress = task->mode->step(task);
            if (progress == DONE) {
                task->done = true;
                left--;
            }
            busy |= progress != IDLE || task->polled;
        }
        cpu->scope = NULL;
        if (!busy)
            gate(&cpu->irq_total, seen);
    }
}

static void ap_main(struct cpu *cpu)
{
    struct task tasks[MAX_TASKS] = {0};
    lapic_timer((u32)word_u64("hz", 10));
    interrupts_on();
    u32 count = tasks_start(cpu, tasks);
    cpu->online = 1;
    tasks_run(cpu, tasks, count);
    cpu->done = 1;
}

/* Everybody is done: count what went wrong and leave as the command line asks. */
static void finish(struct cpu *cpu)
{
    u32 total = 0;
    for (u32 i = 1; i < cpu_count; i++)
        while (!cpus[i]->done)
            gate(&cpu->irq_total, cpu->irq_total);
    for (u32 i = 0; i < cpu_count; i++)
        total += cpus[i]->bad;
    say("probe: done bad=%u", total);
    if (word("crash"))
        triple_fault();
    if (word("reset"))
        power_reset(word("reset"));
    if (word_flag("off", false))
        power_off();
}

void cpu_main(struct cpu *cpu)
{
    static struct task tasks[MAX_TASKS];
    u64 tsc = rdtsc();
    boot_info_read();
    memory_init();
    acpi_init();
    lapic_init();
    clock_init();
    say("probe: up tsc=%lu ns=%lu clock=%s cpus=%u kvm=0x%x", tsc, now_ns(), clock_name(), acpi.cpu_count,
        cpu->kvm_features);
    lapic_timer((u32)word_u64("hz", 10));
    interrupts_on();
    u32 count = tasks_start(cpu, tasks);
    cpus_start((u32)word_u64("cpus", 1), ap_main);
    say("probe: ready tasks=%u cpus=%u", count, cpu_count);
    tasks_run(cpu, tasks, count);
    finish(cpu);
}
