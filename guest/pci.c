/* Enumeration, BARs and MSI-X. Bus 0 only: CH puts one bus in a segment. */
#include "pci.h"

#define BAR_IO 1u
#define BAR_WIDE 4u
#define MSIX_ENABLE 0x8000
#define MSIX_MASK_ALL 0x4000

struct pci_function pci_functions[PCI_MAX_FUNCTIONS];
u32 pci_count;
bool pci_has_cf8, pci_has_ecam;
struct lock pci_lock;

u32 cf8_read(u16 slot, u16 reg, u32 size)
{
    u16 port = (u16)(CFC + (reg & 3));
    u32 value;
    lock_take(&pci_lock);
    out32(CF8, 0x80000000u | (u32)slot << 8 | (reg & 0xfc));
    value = size == 1 ? in8(port) : size == 2 ? in16(port) : in32(port);
    lock_drop(&pci_lock);
    return value;
}

void cf8_write(u16 slot, u16 reg, u32 size, u32 value)
{
    u16 port = (u16)(CFC + (reg & 3));
    lock_take(&pci_lock);
    out32(CF8, 0x80000000u | (u32)slot << 8 | (reg & 0xfc));
    if (size == 1)
        out8(port, (u8)value);
    else if (size == 2)
        out16(port, (u16)value);
    else
        out32(port, value);
    lock_drop(&pci_lock);
}

u32 ecam_read(u16 slot, u16 reg, u32 size)
{
    u64 address = acpi.ecam + ((u64)slot << 12) + reg;
    return size == 1 ? mmio_read8(address) : size == 2 ? mmio_read16(address) : mmio_read32(address);
}

void ecam_write(u16 slot, u16 reg, u32 size, u32 value)
{
    u64 address = acpi.ecam + ((u64)slot << 12) + reg;
    if (size == 1)
        mmio_write8(address, (u8)value);
    else if (size == 2)
        mmio_write16(address, (u16)value);
    else
        mmio_write32(address, value);
}

u32 pci_read(u16 slot, u16 reg, u32 size)
{
    return pci_has_cf8 ? cf8_read(slot, reg, size) : ecam_read(slot, reg, size);
}

void pci_write(u16 slot, u16 reg, u32 size, u32 value)
{
    if (pci_has_cf8)
        cf8_write(slot, reg, size, value);
    else
        ecam_write(slot, reg, size, value);
}

/* PCI 3.0 §6.2.5.1: write ones, read the mask back, with decoding off. */
static void bars_read(struct pci_function *f)
{
    u32 command = pci_read(f->slot, PCI_COMMAND, 2);
    pci_write(f->slot, PCI_COMMAND, 2, command & ~(u32)(PCI_COMMAND_IO | PCI_COMMAND_MEMORY));
    for (u32 i = 0; i < 6; i++) {
        struct pci_bar *bar = &f->bars[i];
        u16 reg = (u16)(PCI_BAR0 + 4 * i);
        u32 low = pci_read(f->slot, reg, 4), high = 0, high_mask = 0xffffffff, mask;
        bar->io = low & BAR_IO;
        bar->wide = !bar->io && (low & 6) == BAR_WIDE && i < 5;
        pci_write(f->slot, reg, 4, 0xffffffff);
        mask = pci_read(f->slot, reg, 4);
        pci_write(f->slot, reg, 4, low);
        if (!mask)
            continue;
        if (bar->wide) {
            high = pci_read(f->slot, (u16)(reg + 4), 4);
            pci_write(f->slot, (u16)(reg + 4), 4, 0xffffffff);
            high_mask = pci_read(f->slot, (u16)(reg + 4), 4);
            pci_write(f->slot, (u16)(reg + 4), 4, high);
        }
        u32 type_bits = bar->io ? 3 : 15;
        bar->size = -((u64)high_mask << 32 | (mask & ~type_bits));
        if (bar->io)
            bar->size &= 0xffff;
        bar->address = (u64)high << 32 | (low & ~type_bits);
        i += bar->wide;
    }
    pci_write(f->slot, PCI_COMMAND, 2, command);
}

/* A VMM without firmware or BAR allocation of its own (QEMU's microvm) leaves them at 0. */
static void bars_assign(struct pci_function *f, u64 *next)
{
    for (u32 i = 0; i < 6; i++) {
        struct pci_bar *bar = &f->bars[i];
        if (!bar->size || bar->io || bar->address)
            continue;
        *next = (*next + bar->size - 1) & -bar->size;
        bar->address = *next;
        *next += bar->size;
        pci_write(f->slot, (u16)(PCI_BAR0 + 4 * i), 4, (u32)bar->address);
        if (bar->wide)
            pci_write(f->slot, (u16)(PCI_BAR0 + 4 * i + 4), 4, (u32)(bar->address >> 32));
    }
}

u8 pci_capability(const struct pci_function *f, u8 id, u8 after)
{
    u8 at = (u8)pci_read(f->slot, after ? after + 1u : PCI_CAPABILITIES, 1);
    if (!after && !(pci_read(f->slot, PCI_STATUS, 2) & 0x10))
        return 0;
    for (u32 i = 0; at >= 0x40 && i < 48; i++) {
        if (pci_read(f->slot, at, 1) == id)
            return at;
        at = (u8)pci_read(f->slot, at + 1u, 1);
    }
    return 0;
}

static void function_add(u16 slot, u64 *next_bar)
{
    struct pci_function *f = &pci_functions[pci_count++];
    f->slot = slot;
    f->vendor = (u16)pci_read(slot, PCI_VENDOR, 2);
    f->device = (u16)pci_read(slot, PCI_VENDOR + 2, 2);
    if ((pci_read(slot, PCI_HEADER_TYPE, 1) & 0x7f) == 0 && pci_read(slot, PCI_REVISION, 4) >> 24 != 6)
        bars_read(f);
    bars_assign(f, next_bar);
    for (u32 i = 0; i < 6; i++)
        if (f->bars[i].size && !f->bars[i].io)
            memory_map_range(f->bars[i].address, f->bars[i].size, true);
    if (!(f->msix_cap = pci_capability(f, PCI_CAP_MSIX, 0)))
        return;
    u32 table = pci_read(slot, f->msix_cap + 4u, 4);
    f->msix_vectors = (u16)((pci_read(slot, f->msix_cap + 2u, 2) & 0x7ff) + 1);
    f->msix_table = f->bars[table & 7].address + (table & ~7u);
}

static bool is_present(u32 id) { return id && (id & 0xffff) != 0xffff; }

void pci_init(void)
{
    static bool done;
    if (done)
        return;
    done = true;
    u64 next_bar = word_u64("bars", 0xd0000000);
    pci_has_cf8 = is_present(cf8_read(0, PCI_VENDOR, 4));
    pci_has_ecam = acpi.ecam && acpi.ecam < 0x100000000ull && is_present(ecam_read(0, PCI_VENDOR, 4));
    if (!pci_has_cf8 && !pci_has_ecam)
        return;
    for (u16 slot = 0; slot < 256 && pci_count < PCI_MAX_FUNCTIONS; slot++) {
        if (slot & 7 && !(pci_read(slot & ~7u & 0xffff, PCI_HEADER_TYPE, 1) & 0x80)) {
            slot |= 7;
            continue;
        }
        if (is_present(pci_read(slot, PCI_VENDOR, 4)))
            function_add(slot, &next_bar);
        else if (!(slot & 7))
            slot |= 7;
    }
}

void pci_enable(const struct pci_function *f)
{
    u32 command = pci_read(f->slot, PCI_COMMAND, 2);
    pci_write(f->slot, PCI_COMMAND, 2, command | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_OFF);
}

/* PCI 3.0 §6.8.2. Enabled with the function mask set first, so that no half-written entry ever fires. */
void pci_msix_enable(const struct pci_function *f)
{
    u32 control = pci_read(f->slot, f->msix_cap + 2u, 2);
    pci_write(f->slot, f->msix_cap + 2u, 2, control | MSIX_ENABLE | MSIX_MASK_ALL);
    for (u32 i = 0; i < f->msix_vectors; i++)
        mmio_write32(f->msix_table + 16 * i + 12, 1);
    pci_write(f->slot, f->msix_cap + 2u, 2, (control | MSIX_ENABLE) & ~(u32)MSIX_MASK_ALL);
}

void pci_msix_set(const struct pci_function *f, u32 entry, const struct cpu *cpu, u8 vector, bool masked)
{
    u64 at = f->msix_table + 16 * entry;
    mmio_write32(at + 12, 1);
    mmio_write32(at, (u32)msi_address(cpu));
    mmio_write32(at + 4, 0);
    mmio_write32(at + 8, vector);
    mmio_write32(at + 12, masked);
}

bool pci_claim(struct pci_function *f)
{
    u32 nobody = 0;
    return __atomic_compare_exchange_n(&f->claimed, &nobody, this_cpu()->index + 1, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}
