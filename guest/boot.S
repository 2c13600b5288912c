/* From the PVH entry (or the INIT-SIPI trampoline) to ring 3 in 64-bit mode.
 *
 * A software KVM interprets ring 0, so this file does only what the privilege demands: tables that can be
 * constant are constant, the IDT is filled by ring 3 (all memory is user-writable), and nothing returns here. */
#include "layout.h"

#define CR0_LONG 0x80000033 /* PG NE ET MP PE */
#define CR4_LONG 0x00000620 /* OSXMMEXCPT OSFXSR PAE */
#define IO_BITMAP_OFFSET (CPU_IO_BITMAP - CPU_TSS)
#define GDT_ENTRIES 5
#define EFER 0xc0000080
#define EFER_LONG 0x100 /* LME; NXE stays off: everything is executable */
#define PAGE_TABLE 0x67 /* D A U W P */
#define PAGE_2M 0xe7    /* PS and the above; preset A and D spare the walker its updates */
#define PAGE_2M_DEVICE 0xff /* and PCD PWT */

        .section .note.pvh, "a", @note
        .balign 4
        .long 4, 8, 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .quad start32

        .section .text.boot, "ax"
        .code32
        .globl start32
start32:
        mov $COM1, %edx /* the boot-time mark comes before anything else */
        mov $'P', %al
        out %al, %dx
        mov %ebx, start_info_address
        lgdt boot_gdt_pointer
        mov $CR4_LONG, %eax
        mov %eax, %cr4
        mov $pml4, %eax
        mov %eax, %cr3
        mov $EFER, %ecx
        mov $EFER_LONG, %eax
        xor %edx, %edx
        wrmsr
        mov $CR0_LONG, %eax
        mov %eax, %cr0
        ljmp $SEL_CODE0, $start64

        .code64
start64:
        mov $bsp_region, %edi
        jmp enter_ring3

/* The trampoline is copied below 1 MiB. Real mode goes straight to long mode: PE and PG in one write. */
        .balign 16
        .globl trampoline, trampoline_end
        .code16
trampoline:
        cli
        mov %cs, %ax
        mov %ax, %ds
        lgdtl trampoline_gdt - trampoline
        mov $CR4_LONG, %eax
        mov %eax, %cr4
        mov $pml4, %eax
        mov %eax, %cr3
        mov $EFER, %ecx
        mov $EFER_LONG, %eax
        xor %edx, %edx
        wrmsr
        mov $CR0_LONG, %eax
        mov %eax, %cr0
        ljmpl $SEL_CODE0, $ap_start64
        .balign 4
trampoline_gdt:
        .word gdt_end - gdt_template - 1
        .long gdt_template
trampoline_end:

        .code64
ap_start64:
        mov ap_region, %rdi /* the BSP starts one AP at a time and names its region here */

/* rdi = this CPU's region, below 4 GiB. */
enter_ring3:
        mov $SEL_DATA0, %eax
        mov %eax, %ss
        lea CPU_RING0_TOP(%rdi), %rsp
        xor %r8d, %r8d
        .rept GDT_ENTRIES
        mov gdt_template(%r8), %rax
        mov %rax, CPU_GDT(%rdi, %r8)
        add $8, %r8d
        .endr
        mov %rsp, CPU_TSS + 4(%rdi) /* RSP0 */
        movw $IO_BITMAP_OFFSET, CPU_TSS + 0x66(%rdi)
        movb $0xff, CPU_IO_BITMAP + 0x2000(%rdi) /* the byte that must close the bitmap */
        lea CPU_TSS(%rdi), %rax
        mov %rax, %rdx
        shl $40, %rdx
        shr $24, %rdx /* base 23:0 at bit 16 */
        shr $24, %rax
        shl $56, %rax /* base 31:24 at bit 56 */
        or %rdx, %rax
        mov $(0x0000890000000000 + IO_BITMAP_OFFSET + 0x2000), %rdx
        or %rdx, %rax
        mov %rax, CPU_GDT + SEL_TSS(%rdi)
        movq $0, CPU_GDT + SEL_TSS + 8(%rdi)
        movw $SEL_TSS + 15, -10(%rsp)
        lea CPU_GDT(%rdi), %rax
        mov %rax, -8(%rsp)
        lgdt -10(%rsp)
        lidt idt_pointer
        mov $SEL_TSS, %eax
        ltr %ax

        mov $0x40000000, %eax
        cpuid
        cmp $0x4b4d564b, %ebx /* "KVMK" */
        jne 1f
        mov $0x40000001, %eax
        cpuid
        mov %eax, CPU_KVM_FEATURES(%rdi)
        test $8, %eax /* KVM_FEATURE_CLOCKSOURCE2 */
        jz 1f
        lea CPU_CLOCK + 1(%rdi), %rax
        xor %edx, %edx
        mov $0x4b564d01, %ecx /* MSR_KVM_SYSTEM_TIME_NEW */
        wrmsr
1:
        mov $SEL_DATA3, %eax
        mov %eax, %ds
        mov %eax, %es
        push %rax
        lea CPU_RING3_TOP - 8(%rdi), %rdx
        push %rdx
        push $RFLAGS_RING3
        push $SEL_CODE3
        pushq $cpu_entry
        iretq

        .section .rodata
        .balign 8
gdt_template:
        .quad 0
        .quad 0x00af9b000000ffff /* ring 0 code */
        .quad 0x00cf93000000ffff /* ring 0 data */
        .quad 0x00cff3000000ffff /* ring 3 data */
        .quad 0x00affb000000ffff /* ring 3 code */
gdt_end:
boot_gdt_pointer:
        .word gdt_end - gdt_template - 1
        .long gdt_template
        .balign 8
idt_pointer:
        .word 256 * 16 - 1
        .quad idt

/* Identity map of the first 4 GiB in 2 MiB pages, user-accessible; memory.c adds what lies above. */
        .data
        .balign 4096
        .globl pml4
pml4:
        .quad pdpt + PAGE_TABLE
        .fill 511, 8, 0
pdpt:
        .quad pd + PAGE_TABLE, pd + 0x1000 + PAGE_TABLE, pd + 0x2000 + PAGE_TABLE, pd + 0x3000 + PAGE_TABLE
        .fill 508, 8, 0
pd:
        .set page, 0
        .rept 1536
        .quad page + PAGE_2M
        .set page, page + 0x200000
        .endr
        .rept 512
        .quad page + PAGE_2M_DEVICE
        .set page, page + 0x200000
        .endr
        .globl start_info_address, ap_region
start_info_address:
        .quad 0
ap_region:
        .quad 0

        .section .bss.cpu, "aw", @nobits
        .balign CPU_REGION
        .globl bsp_region
bsp_region:
        .skip CPU_REGION
        .bss
        .balign 4096
        .globl idt
idt:
        .skip 4096
        .section .note.GNU-stack, "", @progbits
