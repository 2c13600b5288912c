/* PCI functions of bus 0, by CF8/CFC and by ECAM. */
#ifndef PCI_H
#define PCI_H

#include "probe.h"

enum {
    PCI_VENDOR = 0x00,
    PCI_COMMAND = 0x04,
    PCI_STATUS = 0x06,
    PCI_REVISION = 0x08,
    PCI_HEADER_TYPE = 0x0e,
    PCI_BAR0 = 0x10,
    PCI_SUBSYSTEM = 0x2c,
    PCI_CAPABILITIES = 0x34,
    PCI_INTERRUPT_LINE = 0x3c,
};
#define PCI_COMMAND_IO 1
#define PCI_COMMAND_MEMORY 2
#define PCI_COMMAND_MASTER 4
#define PCI_COMMAND_INTX_OFF 0x400
#define PCI_CAP_VENDOR 0x09
#define PCI_CAP_MSIX 0x11
#define PCI_MAX_FUNCTIONS 64
#define CF8 0xcf8
#define CFC 0xcfc

struct pci_bar {
    u64 address, size;
    bool io, wide; /* wide: 64 bits, takes the next BAR too */
};

struct pci_function {
    u16 slot; /* device << 3 | function */
    u16 vendor, device;
    struct pci_bar bars[6];
    u8 msix_cap; /* 0 = none */
    u16 msix_vectors;
    u64 msix_table;
    volatile u32 claimed; /* 1 + index of the CPU that drives it */
};

extern struct pci_function pci_functions[PCI_MAX_FUNCTIONS];
extern u32 pci_count;
extern bool pci_has_cf8, pci_has_ecam;

void pci_init(void); /* once; the BSP or the holder of virtio_find()'s lock calls it */
/* Registers of any slot of bus 0, by either mechanism. pci_read() and pci_write() take the best there is. */
u32 cf8_read(u16 slot, u16 reg, u32 size);
void cf8_write(u16 slot, u16 reg, u32 size, u32 value);
u32 ecam_read(u16 slot, u16 reg, u32 size);
void ecam_write(u16 slot, u16 reg, u32 size, u32 value);
u32 pci_read(u16 slot, u16 reg, u32 size);
void pci_write(u16 slot, u16 reg, u32 size, u32 value);

void pci_enable(const struct pci_function *function); /* memory decoding and bus mastering */
void pci_msix_enable(const struct pci_function *function);
void pci_msix_set(const struct pci_function *function, u32 entry, const struct cpu *cpu, u8 vector, bool masked);
u8 pci_capability(const struct pci_function *function, u8 id, u8 after); /* 0 = no further one */
bool pci_claim(struct pci_function *function);                         /* for the calling CPU */

#endif
