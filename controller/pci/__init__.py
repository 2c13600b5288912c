"""PCI: segments and slots, configuration space, MSI-X, and the virtio transport.

host           segments, ECAM and CF8/CFC, slot and BAR placement, `build`
function       base of every function, and its place
config_space   header, capabilities, BARs, writable bits
allocator      BAR addresses, top down
msix           vector table, pending bits, irqfds
virtio         what transport and device say to each other
virtio_pci     the transport            common_config   its registers and queues
pvpanic        the one function that is not virtio
"""
