"""The devices that are not on PCI, under Cloud Hypervisor's register behaviour and state keys.

ioapic   24 pins, each an MSI route        serial   COM1
acpi     sleep, reset, PM timer, GED       hotplug  PCI and CPU hotplug registers
cmos     memory and clock                  i8042    reset line       debug_port   POST codes, debug consoles

events   what a guest can ask for          state    checked reading of saved state     misuse   guest errors,
counted
"""
