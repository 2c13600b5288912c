# A boot sector that proves that the disk works: it reads the second sector by the BIOS (SeaBIOS drives virtio-blk
# itself), prints its text to COM1, writes it to the third sector, and leaves through QEMU's isa-debug-exit.
        .code16
        .globl _start
_start: cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $0x7c00, %sp
        mov     %dl, drive
        mov     $0x0201, %ax            # read 1 sector
        mov     $0x0002, %cx            # cylinder 0, sector 2
        call    disk
        mov     $0x7e00, %si
next:   lodsb
        test    %al, %al
        jz      copied
        mov     $0x3f8, %dx
        out     %al, %dx
        jmp     next
copied: mov     $0x0301, %ax            # write 1 sector
        mov     $0x0003, %cx            # cylinder 0, sector 3
        call    disk
        mov     $0, %al                 # exit code 1
quit:   mov     $0xf4, %dx
        out     %al, %dx
        hlt
disk:   mov     $0x7e00, %bx
        mov     $0, %dh
        mov     drive, %dl
        int     $0x13
        mov     $1, %al                 # exit code 3
        jc      quit
        ret
drive:  .byte   0
        .org    510
        .word   0xaa55
