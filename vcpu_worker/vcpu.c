/*
 * A vCPU as a process: clone, the KVM_RUN loop, and the exits that are finished without waking the controller.
 *
 * The process shares address space, fd table and, what matters most here, the TLS register of the thread that made
 * it. So nothing in this file may touch TLS: no libc, no errno, no stack protector, no lazy binding. Raw system
 * calls only. Everything it keeps is in shared pages (layout.h), because it can be killed at any instruction and
 * its successor goes on from there. The rules of that, called exactly once:
 *
 *   - exit_reason holds EXIT_SENTINEL (or KVM's INTR or UNKNOWN) while no exit is being worked on. The sentinel is
 *     stored after the effect and before the epoch moves on: whoever finds another value finishes that exit first,
 *     under the same epoch.
 *   - An effect is either idempotent (a read) or published by one store that carries (vCPU, epoch). It is recorded
 *     in a done table before that store can be overwritten, by whoever overwrites it.
 *   - An exit once handed to the controller (handoff == epoch) is never finished natively.
 *   - KVM applies the answer to an exit at the next KVM_RUN, before it looks at immediate_exit or at signals. So only
 *     EINTR proves that nothing is pending.
 */
#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/signal.h>
#include <stdbool.h>
#include <stddef.h>

#include "layout.h"

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;

#define EXPORT __attribute__((visibility("default")))
#define LOAD(p) __atomic_load_n(&(p), __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n(&(p), (v), __ATOMIC_SEQ_CST)

enum { PORT_POST = 0x80, PORT_THR = 0x3f8, PORT_LSR = 0x3fd, PORT_PM_TIMER = 0x608, PORT_CF8 = 0xcf8, PORT_CFC = 0xcfc };
enum { IER_THRI = 0x02, LCR_DLAB = 0x80, MCR_LOOP = 0x10 };
#define CF8_ENABLE 0x80000000u
#define PM_TIMER_HZ 3579545u
#define NS_PER_S 1000000000u

struct vcpu {
    struct vcpu_page *page;
    struct kvm_run *run;
    struct machine_page *machine;
    int fd, event_fd;
    u32 index;
};

/* ---- system calls ---- */

static inline long syscall4(long nr, long a, long b, long c, long d)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = 0; /* prctl insists on zeros in what it does not use */
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

static void notify(int eventfd)
{
    static const u64 one = 1;
    syscall4(__NR_write, eventfd, (long)&one, sizeof one, 0);
}

/* Private: processes that share the address space share these futexes, wherever the page comes from. */
static void futex_wait(void *word, u32 seen)
{
    syscall4(__NR_futex, (long)word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, seen, 0);
}

static void futex_wake(void *word)
{
    syscall4(__NR_futex, (long)word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, 0);
}

static void __attribute__((noreturn)) die(int code)
{
    for (;;)
        syscall4(__NR_exit_group, code, 0, 0, 0);
}

#include "once.h"

/* ---- exits finished here ---- */

static void copy_out(u8 *data, u64 value, u32 size)
{
    for (u32 i = 0; i < size; i++)
        data[i] = (u8)(value >> 8 * i);
}

static u32 copy_in(const u8 *data)
{
    return data[0] | (u32)data[1] << 8 | (u32)data[2] << 16 | (u32)data[3] << 24;
}

/* address: bus, device, function and byte as ECAM has them. False: the controller's to answer. */
static bool config_read(struct pci_page *pci, u64 address, u32 size, u8 *data)
{
    u32 reg = address & 0xfff, slot = address >> 15 & 31, value = 0xffffffff;
    if (size > 4 || size & (size - 1) || reg & (size - 1))
        return false;
    if (!(address >> 12 & ~0xf8ull) && LOAD(pci->present) & 1u << slot) {
        u32 dword = reg / 4;
        if (LOAD(pci->dynamic[slot][dword / 32]) & 1u << dword % 32)
            return false;
        value = LOAD(pci->config[slot][dword]) >> 8 * (reg & 3);
    }
    copy_out(data, value, size);
    return true;
}

static bool port_config_read(struct pci_page *pci, u32 offset, u32 size, u8 *data)
{
    u32 latch = (u32)LOAD(pci->latch);
    if (offset + size > 4 || size == 0)
        return false;
    if (!(latch & CF8_ENABLE)) {
        copy_out(data, 0xffffffff, size);
        return true;
    }
    return config_read(pci, (u64)(latch >> 8 & 0xffff) << 12 | (latch & 0xfc) | offset, size, data);
}

/* A system call and not rdtsc: it costs a hundredth of the exit, and it never runs backwards, on any host. */
static u32 pm_timer(const struct timer_page *timer)
{
    struct { __s64 seconds, nanoseconds; } now;
    syscall4(__NR_clock_gettime, 1 /* CLOCK_MONOTONIC */, (long)&now, 0, 0);
    u64 elapsed = (u64)now.seconds * NS_PER_S + (u64)now.nanoseconds - timer->start;
    return (u32)(elapsed / NS_PER_S * PM_TIMER_HZ + elapsed % NS_PER_S * PM_TIMER_HZ / NS_PER_S);
}

static bool port_write(struct vcpu *v, u16 port, u32 size, const u8 *data, u64 epoch, enum vcpu_stat *kind)
{
    struct machine_page *m = v->machine;
    if (port == PORT_THR && size == 1 && m->uart.present) {
        *kind = STAT_UART_WRITE;
        return uart_transmit(&m->uart, v->index, epoch, data[0]);
    }
    if (port == PORT_CF8 && size == 4 && m->pci.enabled) {
        *kind = STAT_PCI_ADDRESS;
        latch_store(&m->pci, TAG(v->index, epoch, 0), copy_in(data));
        return true;
    }
    *kind = STAT_POST_CODE;
    return port == PORT_POST;
}

static bool port_read(struct vcpu *v, u16 port, u32 size, u8 *data, enum vcpu_stat *kind)
{
    struct machine_page *m = v->machine;
    if (port == PORT_LSR && size == 1 && m->uart.present) {
        *kind = STAT_UART_STATUS;
        data[0] = (u8)LOAD(m->uart.lsr);
        return true;
    }
    if (port == PORT_CF8 && size == 4 && m->pci.enabled) {
        *kind = STAT_PCI_ADDRESS;
        copy_out(data, LOAD(m->pci.latch), 4);
        return true;
    }
    if (port >= PORT_CFC && port < PORT_CFC + 4 && m->pci.enabled) {
        *kind = STAT_PCI_READ;
        return port_config_read(&m->pci, port - PORT_CFC, size, data);
    }
    if (port == PORT_PM_TIMER && size == 4 && m->timer.present) {
        *kind = STAT_PM_TIMER;
        copy_out(data, pm_timer(&m->timer), 4);
        return true;
    }
    return false;
}

static bool finish_natively(struct vcpu *v, u32 reason, u64 epoch, enum vcpu_stat *kind)
{
    struct kvm_run *run = v->run;
    struct pci_page *pci = &v->machine->pci;

    if (reason == KVM_EXIT_IO && run->io.count == 1) {
        u8 *data = (u8 *)run + run->io.data_offset;
        if (run->io.direction == KVM_EXIT_IO_OUT)
            return port_write(v, run->io.port, run->io.size, data, epoch, kind);
        return port_read(v, run->io.port, run->io.size, data, kind);
    }
    if (reason == KVM_EXIT_MMIO && !run->mmio.is_write && pci->enabled &&
        run->mmio.phys_addr - pci->ecam_base < pci->ecam_size) {
        *kind = STAT_ECAM_READ;
        return config_read(pci, run->mmio.phys_addr - pci->ecam_base, run->mmio.len, run->mmio.data);
    }
    return false;
}

/* ---- the loop ---- */

/* The controller keeps the epochs that it has begun: repeating the notice for one is harmless. */
static void hand_over(struct vcpu *v, u64 epoch)
{
    struct vcpu_page *page = v->page;
    u64 done;
    STORE(page->handoff, epoch);
    if (LOAD(page->done) == epoch)
        return; /* finished while there was no process: nobody waits for a notice */
    notify(v->event_fd);
    while ((done = LOAD(page->done)) != epoch)
        futex_wait(&page->done, (u32)done);
}

static void count_exit(struct vcpu_page *page, enum exit_finisher finisher, u32 reason)
{
    page->exits[finisher][reason < EXIT_REASONS ? reason : EXIT_REASONS - 1]++;
}

static void finish_exit(struct vcpu *v, u32 reason)
{
    struct vcpu_page *page = v->page;
    u64 epoch = page->epoch;
    enum vcpu_stat kind = STAT_HANDED_OTHER;

    if (LOAD(page->handoff) != epoch && finish_natively(v, reason, epoch, &kind)) {
        page->stats[kind]++;
        count_exit(page, FINISHED_BY_VCPU, reason);
    } else {
        kind = reason == KVM_EXIT_IO ? STAT_HANDED_PIO : reason == KVM_EXIT_MMIO ? STAT_HANDED_MMIO : STAT_HANDED_OTHER;
        page->stats[kind]++;
        count_exit(page, FINISHED_BY_CONTROLLER, reason);
        STORE(page->state, page->error ? STATE_FAILED : STATE_EXITING);
        hand_over(v, epoch);
        STORE(page->state, STATE_RUNNING);
    }
}

static void park(struct vcpu *v, u32 command)
{
    struct vcpu_page *page = v->page;
    STORE(page->state, STATE_PARKED);
    STORE(page->parked, command);
    notify(v->event_fd);
    while (LOAD(page->command) == command)
        futex_wait(&page->command, command);
    STORE(page->state, STATE_RUNNING);
}

static bool is_exit(u32 reason)
{
    return reason != EXIT_SENTINEL && reason != KVM_EXIT_INTR && reason != KVM_EXIT_UNKNOWN;
}

static void __attribute__((noreturn)) run_vcpu(struct vcpu *v)
{
    struct vcpu_page *page = v->page;
    u32 *reason = &v->run->exit_reason;
    bool retired = false; /* KVM has taken the answer to the last exit; a new process can't know */
    bool unknown = false; /* KVM_RUN did return with reason UNKNOWN, or failed */

    for (;;) {
        u32 found = LOAD(*reason);
        if (is_exit(found) || unknown) {
            finish_exit(v, found);
            page->error = 0;
            STORE(*reason, EXIT_SENTINEL);
        }
        u32 command = LOAD(page->command);
        if (retired && command & COMMAND_PAUSE) {
            park(v, command);
            continue;
        }
        STORE(page->epoch, page->epoch + 1);
        long result = syscall4(__NR_ioctl, v->fd, KVM_RUN, 0, 0);
        retired = result == -EINTR;
        if (retired) {
            page->stats[STAT_INTERRUPTED]++;
            count_exit(page, FINISHED_BY_VCPU, KVM_EXIT_INTR);
        }
        /* EAGAIN: an application processor has got its INIT or SIPI and is to be entered again. */
        page->error = result < 0 && result != -EINTR && result != -EAGAIN ? (u32)-result : 0;
        unknown = page->error || (result == 0 && LOAD(*reason) == KVM_EXIT_UNKNOWN);
    }
}

/* ---- birth ---- */

static void on_kick(int signal)
{
    (void)signal; /* it has done its work by interrupting KVM_RUN */
}

__attribute__((naked)) static void restorer(void)
{
    __asm__("mov %0, %%eax\n\tsyscall" ::"i"(__NR_rt_sigreturn));
}

struct kernel_sigaction {
    void (*handler)(int);
    u64 flags;
    void (*restorer)(void);
    u64 mask;
};

static void __attribute__((noreturn, used)) vcpu_main(struct vcpu_start *start)
{
    struct vcpu v = {start->page, start->run, start->machine, start->vcpu_fd, start->event_fd, start->index};
    struct kernel_sigaction action = {on_kick, SA_RESTORER, restorer, 0};
    u64 blocked = ~(1ull << (start->kick_signal - 1));

    /* The parent may be gone before this takes hold: then somebody else is the parent by now. */
    syscall4(__NR_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0);
    if (syscall4(__NR_getppid, 0, 0, 0, 0) != start->parent)
        die(125);
    syscall4(__NR_prctl, PR_SET_NAME, (long)start->name, 0, 0);
    /* The handler first: all signals are blocked since before the clone. Those of the terminal stay blocked, a
     * Ctrl-C is for the controller. */
    if (syscall4(__NR_rt_sigaction, start->kick_signal, (long)&action, 0, sizeof blocked) < 0 ||
        syscall4(__NR_rt_sigprocmask, SIG_SETMASK, (long)&blocked, 0, sizeof blocked) < 0)
        die(126);
    if (start->seccomp && (syscall4(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0) < 0 ||
                           syscall4(__NR_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, (long)start->seccomp, 0) < 0))
        die(127);
    v.page->error = 0;
    STORE(v.page->state, STATE_RUNNING);
    /* The count last: who is counted is RUNNING. */
    STORE(v.page->stats[STAT_STARTS], v.page->stats[STAT_STARTS] + 1);
    run_vcpu(&v);
}

/* clone3 or clone; the child begins on its new stack in vcpu_main() and never returns here. */
static long clone_vcpu(long nr, long a, long b, long c, struct vcpu_start *start)
{
    long result;
    register long r10 __asm__("r10") = 0;
    register long r8 __asm__("r8") = 0;
    register struct vcpu_start *r12 __asm__("r12") = start;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t" /* the outermost frame */
                     "mov %%r12, %%rdi\n\t"
                     "call vcpu_main\n\t"
                     "ud2\n"
                     "1:"
                     : "=a"(result)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r12)
                     : "rcx", "r11", "memory");
    return result;
}

/*
 * Start a vCPU process. Returns its pid and fills in start->pidfd, or returns -errno. The process dies with the
 * calling *thread* (PDEATHSIG). The caller has reaped the predecessor, whose stack is used again.
 */
EXPORT long vcpu_spawn(struct vcpu_start *start)
{
    u64 all = ~0ull, before, flags = CLONE_VM | CLONE_FILES | CLONE_PIDFD;
    struct clone_args args = {
        .flags = flags | CLONE_CLEAR_SIGHAND,
        .pidfd = (u64)&start->pidfd,
        .exit_signal = SIGCHLD,
        .stack = start->stack,
        .stack_size = start->stack_size,
    };

    start->parent = (int)syscall4(__NR_getpid, 0, 0, 0, 0);
    /* Blocked across the clone: a signal must not find the child with the parent's handlers or none. */
    syscall4(__NR_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)&before, sizeof all);
    long pid = clone_vcpu(__NR_clone3, (long)&args, sizeof args, 0, start);
    if (pid == -ENOSYS) /* container runtimes hide clone3; what it adds here is only the reset of handlers */
        pid = clone_vcpu(__NR_clone, (long)(flags | SIGCHLD), (long)(start->stack + start->stack_size),
                         (long)&start->pidfd, start);
    syscall4(__NR_rt_sigprocmask, SIG_SETMASK, (long)&before, 0, sizeof before);
    return pid;
}

/* ---- the controller's side of the shared pages ---- */

EXPORT void vcpu_command(struct vcpu_page *page, u32 command)
{
    STORE(page->command, command);
    futex_wake(&page->command);
}

EXPORT void vcpu_finish(struct vcpu_page *page, u64 epoch)
{
    STORE(page->done, epoch);
    futex_wake(&page->done);
}

EXPORT u32 uart_drain(struct uart_page *uart, u8 *bytes, u32 size)
{
    tx_help(uart);
    u64 tail = uart->tx_tail, count = LOAD(uart->tx_head) - tail;
    if (count > size)
        count = size;
    for (u64 i = 0; i < count; i++) {
        u64 *slot = &uart->tx_slots[(tail + i) % TX_SLOTS];
        bytes[i] = (u8)LOAD(*slot);
        STORE(*slot, (tail + i) / TX_SLOTS + 1);
    }
    STORE(uart->tx_tail, tail + count);
    return (u32)count;
}

EXPORT u32 uart_arm(struct uart_page *uart)
{
    STORE(uart->tx_wanted, ++uart->tx_wishes);
    tx_help(uart);
    return LOAD(uart->tx_head) != uart->tx_tail;
}

EXPORT void pci_latch_store(struct pci_page *pci, u32 value)
{
    latch_store(pci, 0, value);
}
