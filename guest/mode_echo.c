/* Interrupts by IOAPIC pin: COM1 input is echoed line by line, ACPI GED events are reported. */
#include "probe.h"

enum { UART_IER = COM1 + 1, UART_LSR = COM1 + 5, IER_RECEIVE = 1, LSR_DATA_READY = 1 };
enum { PIN_COM1 = 4, PIN_GED = 13 };
#define GED_POWER_BUTTON 8

struct echo {
    u8 uart_vector, ged_vector;
    u64 ged;      /* address of the event byte; 0 = no GED */
    u32 ged_seen; /* interrupts handled */
    u64 bytes;
    u32 length;
    char line[256];
};

static void start(struct task *task)
{
    struct echo *e = task->state = memory_alloc(sizeof(*e), 64);
    e->uart_vector = irq_vector(task->cpu);
    ioapic_route(PIN_COM1, e->uart_vector);
    out8(COM1 + 4, 0x0b); /* DTR RTS OUT2: on a PC, OUT2 lets the interrupt through */
    out8(UART_IER, IER_RECEIVE);
    if ((e->ged = word_u64("ged", 0))) {
        memory_map_range(e->ged, 1, true);
        e->ged_vector = irq_vector(task->cpu);
        ioapic_route(PIN_GED, e->ged_vector);
    }
    say("echo ready ged=0x%lx", e->ged);
}

static bool receive(struct task *task, struct echo *e)
{
    bool any = false;
    for (; in8(UART_LSR) & LSR_DATA_READY; any = true) {
        char c = (char)in8(COM1);
        e->bytes++;
        if (c != '\n' && c != '\r' && e->length < sizeof(e->line) - 1) {
            e->line[e->length++] = c;
            continue;
        }
        e->line[e->length] = 0;
        e->length = 0;
        say("echo bytes=%lu irqs=%u text=%s", e->bytes, task->cpu->irq_count[e->uart_vector], e->line);
    }
    return any;
}

static void ged_event(struct echo *e)
{
    u8 events = mmio_read8(e->ged);
    say("ged events=0x%02x again=0x%02x", events, mmio_read8(e->ged));
    if (!(events & GED_POWER_BUTTON))
        return;
    say("power button");
    if (word_flag("button_off", false))
        power_off();
}

static enum progress step(struct task *task)
{
    struct echo *e = task->state;
    if (e->ged && task->cpu->irq_count[e->ged_vector] != e->ged_seen) {
        e->ged_seen = task->cpu->irq_count[e->ged_vector];
        ged_event(e);
    }
    return receive(task, e) ? BUSY : IDLE;
}

const struct mode mode_echo = {"echo", start, step};
