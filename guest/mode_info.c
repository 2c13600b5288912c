/* Modes that print once what the machine is: `pci` and `acpi`. */
#include "virtio.h"

static void header_print(const struct pci_function *f)
{
    u32 slot = f->slot >> 3, function = f->slot & 7, class_revision = pci_read(f->slot, PCI_REVISION, 4);
    say("pci 00:%02x.%u id=%04x:%04x rev=%02x code=%06x hdr=%02x cmd=%04x status=%04x subsys=%04x:%04x", slot,
        function, f->vendor, f->device, class_revision & 0xff, class_revision >> 8,
        pci_read(f->slot, PCI_HEADER_TYPE, 1), pci_read(f->slot, PCI_COMMAND, 2),
        pci_read(f->slot, PCI_STATUS, 2), pci_read(f->slot, PCI_SUBSYSTEM, 2),
        pci_read(f->slot, PCI_SUBSYSTEM + 2, 2));
    for (u32 i = 0; i < 6; i++)
        if (f->bars[i].size)
            say("pci 00:%02x.%u bar%u=0x%lx size=0x%lx kind=%s", slot, function, i, f->bars[i].address,
                f->bars[i].size, f->bars[i].io ? "io" : f->bars[i].wide ? "mem64" : "mem32");
}

static void config_print(const struct pci_function *f)
{
    u32 differences = 0;
    for (u16 reg = 0; reg < 256; reg = (u16)(reg + 16)) {
        u32 words[4];
        for (u16 i = 0; i < 4; i++) {
            words[i] = pci_read(f->slot, (u16)(reg + 4 * i), 4);
            if (pci_has_cf8 && pci_has_ecam && ecam_read(f->slot, (u16)(reg + 4 * i), 4) != words[i])
                differences++;
        }
        line_add("pci 00:%02x.%u cfg %02x ", f->slot >> 3, f->slot & 7, reg);
        line_hex(words, sizeof(words));
        line_end();
    }
    if (!pci_has_cf8 || !pci_has_ecam)
        return;
    if (differences)
        bad("pci BAD 00:%02x.%u ecam differs from cf8 in %u words", f->slot >> 3, f->slot & 7, differences);
    else
        say("pci 00:%02x.%u ecam=equal", f->slot >> 3, f->slot & 7);
}

static void virtio_print(const struct virtio_device *d)
{
    line_add("virtio 00:%02x.%u type=%u features=0x%lx status=0x%02x vectors=%u queues=", d->pci->slot >> 3,
             d->pci->slot & 7, d->type, d->features, mmio_read8(d->common + COMMON_STATUS), d->pci->msix_vectors);
    for (u16 i = 0; i < d->queue_count; i++) {
        mmio_write16(d->common + COMMON_QUEUE_SELECT, i);
        line_add("%s%u", i ? "," : "", mmio_read16(d->common + COMMON_QUEUE_SIZE));
    }
    line_add(" config=");
    for (u32 at = 0; d->device && at < 64 && at < d->device_length; at++) {
        u8 byte = mmio_read8(d->device + at);
        line_hex(&byte, 1);
    }
    line_end();
}

static void pci_start(struct task *task)
{
    (void)task;
    pci_init();
    say("pci cf8=%u ecam=%u at=0x%lx functions=%u", pci_has_cf8, pci_has_ecam, acpi.ecam, pci_count);
    /* Config space before the virtio drivers' part of it: virtio_find() sets the command registers. */
    for (u32 i = 0; i < pci_count; i++) {
        header_print(&pci_functions[i]);
        if (word_flag("config", true))
            config_print(&pci_functions[i]);
    }
    for (u16 type = 0; type < 64; type++)
        for (u32 n = 0; virtio_find(type, n); n++)
            virtio_print(virtio_find(type, n));
}

static void acpi_start(struct task *task)
{
    (void)task;
    acpi_print();
}

static enum progress done(struct task *task)
{
    (void)task;
    return DONE;
}

const struct mode mode_pci = {"pci", pci_start, done};
const struct mode mode_acpi = {"acpi", acpi_start, done};
