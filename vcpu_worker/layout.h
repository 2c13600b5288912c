/*
 * The shared pages of a VM's vCPU processes: layout.py is the same, field by field (tests compare the two).
 *
 * All of it lies in one shared mapping that starts out as zeros, which is a valid initial state. Epochs and the
 * *_done tables belong together: they are zeroed together (a new VM) or not at all.
 */
#ifndef FLOTILLA_VCPU_LAYOUT_H
#define FLOTILLA_VCPU_LAYOUT_H

#include <linux/types.h>

#define MAX_VCPUS 1024
#define TX_SLOTS 4096
#define PCI_SLOTS 32
#define PCI_CONFIG_SIZE 4096
#define VCPU_PAGE_SIZE 4096

/* What exit_reason of a kvm_run holds while no exit is being worked on. KVM's own reasons are small numbers. */
#define EXIT_SENTINEL 0xF1071111u

/* vcpu_page.command: bit 0 asks for a pause, the rest numbers the requests, so that an old answer is not taken
 * for a new one. */
#define COMMAND_PAUSE 1u

enum vcpu_state { STATE_STARTING, STATE_RUNNING, STATE_EXITING, STATE_PARKED, STATE_FAILED };

enum vcpu_stat {
    STAT_UART_WRITE,
    STAT_UART_STATUS,
    STAT_PCI_ADDRESS,
    STAT_PCI_READ,
    STAT_ECAM_READ,
    STAT_PM_TIMER,
    STAT_POST_CODE,
    STAT_HANDED_PIO,
    STAT_HANDED_MMIO,
    STAT_HANDED_OTHER,
    STAT_INTERRUPTED,
    STAT_STARTS,
    STAT_COUNT
};

/* Who finished an exit: vcpu_page.exits[finisher][reason]. */
enum exit_finisher { FINISHED_BY_VCPU, FINISHED_BY_CONTROLLER, FINISHERS };

/* KVM's reasons are below 40; EXIT_REASONS - 1 counts all others. */
#define EXIT_REASONS 48

struct vcpu_page {
    /* Written by the controller. */
    __u32 command; /* futex */
    __u32 pad0;
    __u64 done; /* epoch of the last handed-over exit that is finished; futex on its low half */
    __u8 pad1[48];
    /* Written by the vCPU process. */
    __u32 state;
    __u32 parked; /* the command that it parked for */
    __u32 error;  /* errno of a KVM_RUN that failed, while that is handed over */
    __u32 pad2;
    __u64 epoch;   /* counts entries into KVM_RUN; names the exit that the last one ended with */
    __u64 handoff; /* epoch of the last exit that was handed to the controller */
    __u64 stats[STAT_COUNT];
    __u64 exits[FINISHERS][EXIT_REASONS]; /* by KVM_EXIT_*; one whose process was killed may be counted twice */
};

/* COM1. Registers are written by the serial device (controller), the ring by every vCPU. */
struct uart_page {
    __u32 present; /* 0: no COM1, every access goes to the controller */
    __u32 ier;
    __u32 lcr;
    __u32 mcr;
    __u32 lsr;
    __u32 thr_irq_pending; /* set by a vCPU, cleared by the device when the guest reads IIR */
    __s32 irq_fd;          /* eventfd of pin 4; 0: none */
    __s32 tx_fd;           /* eventfd that is written when tx_wanted is not 0 */
    __u64 tx_wanted;       /* number of the consumer's wish to be woken; 0: it is awake */
    __u64 tx_wishes;       /* consumer's own: the last number */
    __u8 pad0[16];
    __u64 tx_head; /* position of the next byte; positions never wrap */
    __u8 pad1[56];
    __u64 tx_tail; /* position of the next byte to consume */
    __u8 pad2[56];
    __u64 tx_done[MAX_VCPUS]; /* epoch of each vCPU's last byte that is in the ring */
    __u64 tx_slots[TX_SLOTS];
};

/* PCI segment 0, bus 0, function 0: written by the controller, read by every vCPU. */
struct pci_page {
    __u64 latch;     /* CF8: low 32 bits */
    __u64 latch_tag; /* who wrote it; changes in one 16-byte store with the latch */
    __u64 ecam_base;
    __u64 ecam_size; /* 0: none */
    __u32 present;   /* bit n: slot n holds a device */
    __u32 enabled;   /* 0: every access goes to the controller */
    __u8 pad0[24];
    __u64 latch_done[MAX_VCPUS]; /* epoch of each vCPU's last CF8 write that has taken effect */
    __u32 dynamic[PCI_SLOTS][PCI_CONFIG_SIZE / 4 / 32]; /* bit n: dword n is the controller's to read */
    __u32 config[PCI_SLOTS][PCI_CONFIG_SIZE / 4];
};

struct timer_page {
    __u64 start; /* CLOCK_MONOTONIC, ns, at which the ACPI PM timer read 0 */
    __u32 present;
    __u8 pad0[52];
};

struct machine_page {
    struct timer_page timer;
    struct uart_page uart;
    struct pci_page pci;
};

/* What a new vCPU process is told; it stays in place while the process lives. */
struct vcpu_start {
    struct vcpu_page *page;
    struct kvm_run *run;
    struct machine_page *machine;
    const void *seccomp; /* struct sock_fprog; 0: no filter */
    __u64 stack;         /* lowest address */
    __u64 stack_size;
    __s32 vcpu_fd;
    __s32 event_fd;
    __u32 index;
    __s32 parent; /* filled in by vcpu_spawn() */
    __s32 pidfd;  /* likewise */
    __u32 kick_signal;
    char name[16];
};

_Static_assert(sizeof(struct vcpu_page) <= VCPU_PAGE_SIZE, "one page each");
_Static_assert(__builtin_offsetof(struct vcpu_page, state) == 64, "the two writers have a cache line each");
_Static_assert(__builtin_offsetof(struct machine_page, pci.latch) % 16 == 0, "cmpxchg16b needs it");
_Static_assert(sizeof(struct machine_page) == 64 + 41152 + 143424, "layout.py says the same");

#endif
