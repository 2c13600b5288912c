/* Numbers that the assembler and the C code share. */
#ifndef LAYOUT_H
#define LAYOUT_H

/* One 64 KiB aligned region per CPU: struct cpu, then the ring 0 stack, then the ring 3 stack. Any stack
 * pointer of a CPU, rounded down, is therefore its struct cpu: no segment base and no MSR is needed. */
#define CPU_REGION 0x10000
#define CPU_RING0_TOP 0x3000
#define CPU_IO_BITMAP 0x3000 /* 8 KiB of zeros: every port is open to ring 3 */
#define CPU_RING3_TOP 0x10000

#define CPU_IRQ_TOTAL 0x08
#define CPU_IRQ 0x10
#define CPU_FAULT 0x410
#define CPU_FAULT_COUNT 0x438
#define CPU_KVM_FEATURES 0x440
#define CPU_GDT 0x480
#define CPU_TSS 0x500
#define CPU_CLOCK 0x580

#define SEL_CODE0 0x08
#define SEL_DATA0 0x10
#define SEL_DATA3 0x1b
#define SEL_CODE3 0x23
#define SEL_TSS 0x30

/* IOPL 3, and the TSS's bitmap besides. A software KVM that runs ring 3 natively does not keep IOPL; QEMU's emulated
 * SVM forgets the bitmap as soon as a VMM sets TR, for it wants its type "available" and KVM says "busy". Interrupts
 * stay off until the first gate(). */
#define RFLAGS_RING3 0x3002

#define VECTOR_IRQ_FIRST 0x20
#define VECTOR_IRQ_COUNT 0x60
#define VECTOR_SPURIOUS 0xff
#define TRAP_STUB_SIZE 16

#define LAPIC_BASE 0xfee00000
#define LAPIC_EOI 0xfee000b0

#define COM1 0x3f8
#define TRAMPOLINE 0x10000 /* INIT-SIPI vector 0x10; free of boot data in CH's map and in QEMU's */

#endif
