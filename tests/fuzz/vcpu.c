/*
 * vcpu_worker/vcpu.c: exits that are finished in the vCPU's own loop, with ports, addresses and data of a hostile guest,
 * between which the controller drains the ring and changes registers.
 *
 * Must hold: an exit that is repeated under its epoch has its effect once; bytes come out in the order they went in.
 */
/* vcpu.c has the kernel's headers and no libc's: where the two have one name, the kernel's gets another here. */
#define sigset_t kernel_sigset_t
#define timeval kernel_timeval
#include "vcpu_worker/vcpu.c"
#undef sigset_t
#undef timeval

#include "fuzz.h"

#define VCPUS 3
#define FIFO 8192

static struct machine_page *machine;
static struct kvm_run *run[VCPUS];
static u64 epoch[VCPUS];
static u8 fifo[FIFO];
static u32 fifo_in, fifo_out;

static struct kvm_run *exit_of(struct input *in, u32 index)
{
    static const u16 ports[] = {0x3f8, 0x3fd, 0xcf8, 0xcfc, 0xcfd, 0xcfe, 0xcff, 0x608, 0x80, 0x600};
    struct kvm_run *r = run[index];
    u8 kind = (u8)take(in, 1);
    if (kind & 1) {
        r->exit_reason = KVM_EXIT_MMIO;
        r->mmio.is_write = kind >> 1 & 1;
        r->mmio.len = 1u << (kind >> 2 & 3);
        r->mmio.phys_addr = kind & 16 ? take(in, 8) : machine->pci.ecam_base + take(in, 3);
    } else {
        r->exit_reason = KVM_EXIT_IO;
        r->io.direction = kind >> 1 & 1;
        r->io.size = (u8)(1u << (kind >> 2 & 3) % 3);
        r->io.port = kind & 16 ? (u16)take(in, 2) : ports[take(in, 1) % (sizeof(ports) / 2)];
        r->io.count = kind & 32 ? 1 + (u32)take(in, 1) : 1;
        r->io.data_offset = 4096;
        u64 data = take(in, 4);
        memcpy((u8 *)r + 4096, &data, 4);
    }
    return r;
}

static void expect_bytes(void)
{
    u8 got[64];
    u32 n = uart_drain(&machine->uart, got, sizeof(got));
    MUST(n <= sizeof(got));
    for (u32 i = 0; i < n; i++)
        MUST(fifo_out != fifo_in && got[i] == fifo[fifo_out++ % FIFO]);
    MUST(n == sizeof(got) || fifo_out == fifo_in);
}

static void guest_exits(struct input *in)
{
    u32 index = (u32)below(in, VCPUS);
    struct vcpu v = {.run = run[index], .machine = machine, .index = index, .fd = -1, .event_fd = -1};
    struct kvm_run *r = exit_of(in, index);
    enum vcpu_stat kind = STAT_COUNT;
    bool again = take(in, 1) & 1;
    epoch[index]++;
    bool done = finish_natively(&v, r->exit_reason, epoch[index], &kind);
    if (done)
        MUST(kind < STAT_COUNT);
    if (done && kind == STAT_UART_WRITE)
        fifo[fifo_in++ % FIFO] = ((u8 *)r)[4096];
    if (done && again) /* a successor finds the same exit: killed between the effect and the sentinel */
        MUST(finish_natively(&v, r->exit_reason, epoch[index], &kind));
}

static void controller_acts(struct input *in)
{
    u32 *word;
    switch (take(in, 1) % 6) {
    case 0: uart_arm(&machine->uart); break;
    case 1: pci_latch_store(&machine->pci, (u32)take(in, 4)); break;
    case 2: machine->uart.lcr = (u32)take(in, 1); break;
    case 3: machine->uart.mcr = (u32)take(in, 1); break;
    case 4: machine->uart.ier = (u32)take(in, 1); break;
    default:
        word = &machine->pci.dynamic[below(in, PCI_SLOTS)][below(in, PCI_CONFIG_SIZE / 128)];
        *word = (u32)take(in, 4);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    machine = aligned_alloc(64, sizeof(*machine));
    memset(machine, 0, sizeof(*machine));
    for (u32 i = 0; i < VCPUS; i++) {
        run[i] = calloc(1, 4096 + 8); /* the data page ends where KVM's longest access does */
        epoch[i] = 0;
    }
    fifo_in = fifo_out = 0;
    u8 flags = (u8)take(&in, 1);
    machine->uart.present = !(flags & 1);
    machine->uart.irq_fd = machine->uart.tx_fd = -1;
    machine->pci.enabled = !(flags & 2);
    machine->pci.ecam_base = 0xe8000000;
    machine->pci.ecam_size = 1 << 20;
    machine->pci.present = (u32)take(&in, 4);
    machine->timer.present = !(flags & 4);
    while (in.left) {
        u8 op = (u8)take(&in, 1) % 8;
        if (op < 6)
            guest_exits(&in);
        else if (op == 6)
            expect_bytes();
        else
            controller_acts(&in);
    }
    while (fifo_out != fifo_in)
        expect_bytes();
    for (u32 i = 0; i < VCPUS; i++)
        free(run[i]);
    free(machine);
    return 0;
}
