"""The guest-visible machine: address layout, payload, firmware tables, CPUID and the state at the first instruction.

Everything here is Cloud Hypervisor's, byte for byte, so that a running VM can move between the two. Modules:

    layout    every fixed address, and what follows from the RAM size and the physical address bits
    topology  x2APIC ids
    boot/     the kernel and its initramfs: ELF with a PVH note, bzImage, unified kernel image
    acpi/     ACPI, SMBIOS and MP tables
    cpuid     what the guest reads from CPUID; whether a host can run another host's guest
    hostcpu   the CPUID instruction
    regs      registers, MSRs, LAPIC and FPU at boot

Records are shared.records' NamedTuples: all of this lies on the way to the guest's first instruction.
"""
