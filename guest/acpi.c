/* ACPI: enough to find ECAM, the IOAPIC, the CPUs and the power registers, and to print every table. ACPI 6.4 §5.2. */
#include "probe.h"

struct table {
    char signature[4];
    u32 length;
    u8 revision, checksum;
    char oem_id[6], oem_table_id[8];
    u32 oem_revision;
    char creator_id[4];
    u32 creator_revision;
} __attribute__((packed));

struct rsdp {
    char signature[8];
    u8 checksum;
    char oem_id[6];
    u8 revision;
    u32 rsdt;
    u32 length;
    u64 xsdt;
    u8 extended_checksum, reserved[3];
} __attribute__((packed));

struct generic_address {
    u8 space, bit_width, bit_offset, access;
    u64 address;
} __attribute__((packed));
#define SPACE_IO 1

enum { /* FADT */
    FADT_DSDT = 40,
    FADT_PM1A_CONTROL = 64,
    FADT_PM_TIMER = 76,
    FADT_FLAGS = 112,
    FADT_RESET_REGISTER = 116,
    FADT_RESET_VALUE = 128,
    FADT_X_DSDT = 140,
    FADT_X_PM_TIMER = 208,
    FADT_SLEEP_CONTROL = 244,
};
#define FADT_TMR_VAL_EXT (1u << 8)
#define FADT_HW_REDUCED (1u << 20)

enum { MADT_LAPIC = 0, MADT_IOAPIC = 1, MADT_X2APIC = 9, MADT_HEADER = 44, MCFG_HEADER = 44 };

struct acpi acpi = {.ioapic = 0xfec00000};

static u8 byte_sum(const void *data, u32 length)
{
    u8 sum = 0;
    for (u32 i = 0; i < length; i++)
        sum = (u8)(sum + ((const u8 *)data)[i]);
    return sum;
}

static u64 load(const struct table *table, u32 offset, u32 size)
{
    u64 value = 0;
    if (offset + size <= table->length)
        memcpy(&value, (const u8 *)table + offset, size);
    return value;
}

static const struct rsdp *rsdp_find(void)
{
    if (rsdp_address)
        return (const void *)rsdp_address;
    for (u64 a = 0xa0000; a < 0x100000; a += 16)
        if (!memcmp((const void *)a, "RSD PTR ", 8))
            return (const void *)a;
    return NULL;
}

static void cpu_found(u32 apic_id, u32 flags)
{
    if (flags & 1 && acpi.cpu_count < MAX_CPUS)
        acpi.apic_ids[acpi.cpu_count++] = apic_id;
}

static void madt_read(const struct table *madt)
{
    for (u32 at = MADT_HEADER; at + 2 <= madt->length;) {
        u32 kind = (u32)load(madt, at, 1), length = (u32)load(madt, at + 1, 1);
        if (length < 2)
            return;
        if (kind == MADT_LAPIC)
            cpu_found((u32)load(madt, at + 3, 1), (u32)load(madt, at + 4, 4));
        else if (kind == MADT_X2APIC)
            cpu_found((u32)load(madt, at + 4, 4), (u32)load(madt, at + 8, 4));
        else if (kind == MADT_IOAPIC && !load(madt, at + 8, 4)) /* the one whose pins are GSI 0 and up */
            acpi.ioapic = load(madt, at + 4, 4);
        at += length;
    }
}

static void fadt_read(const struct table *fadt)
{
    u32 flags = (u32)load(fadt, FADT_FLAGS, 4);
    struct generic_address timer = {0}, sleep = {0}, reset = {0};
    if (fadt->length >= FADT_SLEEP_CONTROL + sizeof(sleep)) {
        memcpy(&timer, (const u8 *)fadt + FADT_X_PM_TIMER, sizeof(timer));
        memcpy(&sleep, (const u8 *)fadt + FADT_SLEEP_CONTROL, sizeof(sleep));
    }
    if (fadt->length > FADT_RESET_VALUE)
        memcpy(&reset, (const u8 *)fadt + FADT_RESET_REGISTER, sizeof(reset));
    acpi.pm_timer = (u16)(timer.address ? timer.address : load(fadt, FADT_PM_TIMER, 4));
    acpi.pm_timer_32bit = flags & FADT_TMR_VAL_EXT;
    acpi.hw_reduced = flags & FADT_HW_REDUCED;
    acpi.pm1a_control = (u16)load(fadt, FADT_PM1A_CONTROL, 4);
    acpi.sleep_control = sleep.address;
    acpi.sleep_is_io = sleep.space == SPACE_IO;
    acpi.reset_register = reset.address;
    acpi.reset_is_io = reset.space == SPACE_IO;
    acpi.reset_value = (u8)load(fadt, FADT_RESET_VALUE, 1);
}

static void table_print(const struct table *table)
{
    say("acpi %c%c%c%c addr=0x%lx len=%u rev=%u sum=%s", table->signature[0], table->signature[1],
        table->signature[2], table->signature[3], (u64)table, table->length, table->revision,
        byte_sum(table, table->length) ? "BAD" : "ok");
}

/* Calls `use` for the root table, every table it lists, and the DSDT. */
static void tables_walk(void (*use)(const struct table *))
{
    const struct rsdp *rsdp = rsdp_find();
    if (!rsdp)
        return;
    bool wide = rsdp->revision >= 2 && rsdp->xsdt;
    const struct table *root = (const void *)(wide ? rsdp->xsdt : rsdp->rsdt);
    u32 step = wide ? 8 : 4;
    use(root);
    for (u32 at = sizeof(*root); at + step <= root->length; at += step) {
        const struct table *table = (const void *)load(root, at, step);
        use(table);
        if (memcmp(table->signature, "FACP", 4))
            continue;
        u64 dsdt = load(table, FADT_X_DSDT, 8);
        use((const void *)(dsdt ? dsdt : load(table, FADT_DSDT, 4)));
    }
}

static void table_read(const struct table *table)
{
    if (!memcmp(table->signature, "APIC", 4))
        madt_read(table);
    else if (!memcmp(table->signature, "MCFG", 4))
        acpi.ecam = load(table, MCFG_HEADER, 8);
    else if (!memcmp(table->signature, "FACP", 4))
        fadt_read(table);
}

void acpi_init(void)
{
    tables_walk(table_read);
    acpi.ecam = word_u64("ecam", acpi.ecam); /* for a machine without an MCFG table */
}

void acpi_print(void)
{
    const struct rsdp *rsdp = rsdp_find();
    say("cmdline %s", command_line);
    for (u32 i = 0; i < memory_map_count; i++)
        say("mem addr=0x%lx size=0x%lx type=%u", memory_map[i].address, memory_map[i].size, memory_map[i].type);
    if (!rsdp) {
        bad("acpi BAD no RSDP");
        return;
    }
    u32 length = rsdp->revision >= 2 ? rsdp->length : 20;
    say("acpi RSDP addr=0x%lx len=%u rev=%u sum=%s", (u64)rsdp, length, rsdp->revision,
        byte_sum(rsdp, 20) || byte_sum(rsdp, length) ? "BAD" : "ok");
    tables_walk(table_print);
    say("acpi ecam=0x%lx ioapic=0x%lx pm_timer=0x%x sleep=0x%lx reset=0x%lx:%u cpus=%u", acpi.ecam, acpi.ioapic,
        acpi.pm_timer, acpi.sleep_control, acpi.reset_register, acpi.reset_value, acpi.cpu_count);
}

static void register_write(u64 address, bool is_io, u8 value)
{
    if (is_io)
        out8((u16)address, value);
    else
        mmio_write8(address, value);
}

/* The effect of a power register may take a moment to reach this CPU. */
static void __attribute__((noreturn)) register_wait(const char *what)
{
    for (u64 end = now_ns() + NS_PER_S; now_ns() < end;)
        pause();
    die("%s had no effect", what);
}

#define SLP_EN (1 << 5)
#define S5_SLEEP_TYPE 5           /* CH's \_S5 */
#define PM1_SLP_EN (1 << 13)      /* QEMU's \_S5 has type 0 */

void power_off(void)
{
    if (acpi.sleep_control)
        register_write(acpi.sleep_control, acpi.sleep_is_io, S5_SLEEP_TYPE << 2 | SLP_EN);
    else if (acpi.pm1a_control)
        out16(acpi.pm1a_control, PM1_SLP_EN);
    register_wait("power-off");
}

void power_reset(const char *how)
{
    if (word_is(how, "kbd"))
        out8(0x64, 0xfe);
    else if (acpi.reset_register)
        register_write(acpi.reset_register, acpi.reset_is_io, acpi.reset_value);
    register_wait("reset");
}
