/* All that runs in ring 0 once the guest is up: a wait gate, the interrupt stubs, the fault stubs. */
#include "layout.h"

        .text
        .code64

/* void gate(volatile u32 *word, u32 value), called in ring 3: halt unless the word has already changed; interrupts
 * are on afterwards. A HLT in ring 3 is a general protection fault, and that is the way into ring 0: a software KVM
 * that runs ring 3 natively delivers faults as the architecture says, but not SYSCALL (CPL stays 3) nor INT n. */
        .globl gate
gate:
        hlt
        ret

/* The interrupt gate has cleared IF, and STI holds interrupts off for one instruction more, so a wake-up between the
 * comparison and the HLT cannot be missed. */
gate_ring0:
        cmp %esi, (%rdi)
        jne 1f
        sti
        hlt
1:      orl $0x200, 24(%rsp)
        incq 8(%rsp) /* over the one-byte HLT */
        add $8, %rsp
        iretq

        .balign TRAP_STUB_SIZE
        .globl general_protection_stub
general_protection_stub:
        cmpq $gate, 8(%rsp)
        je gate_ring0
        push $13
        jmp fault_common

        .balign TRAP_STUB_SIZE
        .globl irq_stubs
irq_stubs:
        .set vector, VECTOR_IRQ_FIRST
        .rept VECTOR_IRQ_COUNT
        .balign TRAP_STUB_SIZE
        push %rax
        mov $vector, %eax
        jmp irq_common
        .set vector, vector + 1
        .endr

        .balign TRAP_STUB_SIZE
irq_common:
        push %rdx
        mov %rsp, %rdx
        and $-CPU_REGION, %rdx
        incl CPU_IRQ(%rdx, %rax, 4)
        incl CPU_IRQ_TOTAL(%rdx)
        mov $LAPIC_EOI, %eax
        movl $0, (%rax)
        pop %rdx
        pop %rax
        .globl spurious_stub
spurious_stub:
        iretq

/* A fault is recorded in struct cpu and reported by ring 3. */
        .balign TRAP_STUB_SIZE
        .globl fault_stubs
fault_stubs:
        .set vector, 0
        .rept 32
        .balign TRAP_STUB_SIZE
        .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21)
        .else
        push $0
        .endif
        push $vector
        jmp fault_common
        .set vector, vector + 1
        .endr

        .balign TRAP_STUB_SIZE
fault_common:
        mov %rsp, %rdi
        and $-CPU_REGION, %rdi
        incl CPU_FAULT_COUNT(%rdi)
        pop CPU_FAULT(%rdi)
        pop CPU_FAULT + 8(%rdi)
        mov (%rsp), %rax
        mov %rax, CPU_FAULT + 16(%rdi)
        mov 24(%rsp), %rax
        mov %rax, CPU_FAULT + 24(%rdi)
        mov %cr2, %rax
        mov %rax, CPU_FAULT + 32(%rdi)
        mov $SEL_DATA3, %eax
        push %rax
        lea CPU_RING3_TOP - 8(%rdi), %rax /* a fresh stack */
        push %rax
        push $RFLAGS_RING3
        push $SEL_CODE3
        pushq $fault_entry
        iretq
        .section .note.GNU-stack, "", @progbits
