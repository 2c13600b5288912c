/*
 * Effects of an exit that happen once, whoever is killed while they do: a byte for the transmit ring, the CF8 latch.
 * Part of vcpu.c, whose rules hold here.
 *
 * Each is published by one compare-and-swap that carries a tag, and recorded in a done table before the tag can be
 * overwritten. So a successor can tell whether its predecessor's effect has happened.
 */
#ifndef FLOTILLA_ONCE_H
#define FLOTILLA_ONCE_H

/* A tag names one exit of one vCPU and, in the ring, carries its byte. 45 bits of epoch are a year of a million
 * exits a second. An empty ring slot holds the number of its lap, so zeros are lap 0. */
#define TAG_FULL (1ull << 63)
#define TAG(vcpu, epoch, byte) (TAG_FULL | (u64)(epoch) << 18 | (u64)(vcpu) << 8 | (byte))
#define TAG_EPOCH(tag) (((tag) & ~TAG_FULL) >> 18)
#define TAG_VCPU(tag) ((u32)((tag) >> 8) & (MAX_VCPUS - 1))

static bool cas(u64 *word, u64 expected, u64 value)
{
    return __atomic_compare_exchange_n(word, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE);
}

static bool cas16(void *word, u64 low, u64 high, u64 new_low, u64 new_high)
{
    bool done;
    __asm__ volatile("lock cmpxchg16b %1"
                     : "=@ccz"(done), "+m"(*(unsigned __int128 *)word), "+a"(low), "+d"(high)
                     : "b"(new_low), "c"(new_high)
                     : "memory");
    return done;
}

/* Record that the tagged exit has taken effect. Never backwards: the caller may have been asleep since it read the tag. */
static void settle(u64 *done, u64 tag)
{
    u64 *entry = &done[TAG_VCPU(tag)], epoch = TAG_EPOCH(tag), seen;
    while ((seen = LOAD(*entry)) < epoch && !cas(entry, seen, epoch)) {
    }
}

static bool tx_full(struct uart_page *uart, u64 position)
{
    return (__s64)(position - LOAD(uart->tx_tail)) >= TX_SLOTS;
}

/* Finish the append that lies half-way at the head, whoever began it: it is in the ring once its tag is in the slot,
 * but only a settled tag may be passed. */
static void tx_help(struct uart_page *uart)
{
    u64 head = LOAD(uart->tx_head);
    if (tx_full(uart, head))
        return; /* the slot still holds the byte of a lap ago */
    u64 tag = LOAD(uart->tx_slots[head % TX_SLOTS]);
    if (!(tag & TAG_FULL))
        return;
    settle(uart->tx_done, tag);
    cas(&uart->tx_head, head, head + 1);
}

/* True when the byte of this exit is in the ring; false when it is for the controller. */
static bool tx_append(struct uart_page *uart, u32 vcpu, u64 epoch, u8 byte)
{
    tx_help(uart);
    if (LOAD(uart->tx_done[vcpu]) >= epoch)
        return true; /* before the registers are looked at: they may have changed since the byte went in */
    if (LOAD(uart->lcr) & LCR_DLAB || LOAD(uart->mcr) & MCR_LOOP)
        return false;
    do {
        u64 head = LOAD(uart->tx_head);
        if (tx_full(uart, head))
            return false;
        /* Succeeds only at the head: the slot keeps this lap's number until it is filled. */
        cas(&uart->tx_slots[head % TX_SLOTS], head / TX_SLOTS, TAG(vcpu, epoch, byte));
        tx_help(uart);
    } while (LOAD(uart->tx_done[vcpu]) < epoch);
    return true;
}

static bool uart_transmit(struct uart_page *uart, u32 vcpu, u64 epoch, u8 byte)
{
    if (!tx_append(uart, vcpu, epoch, byte))
        return false;
    u64 wanted = LOAD(uart->tx_wanted);
    if (wanted) {
        notify(uart->tx_fd); /* before the wish is cleared: a kill in between wakes twice, not never */
        cas(&uart->tx_wanted, wanted, 0);
    }
    if (LOAD(uart->ier) & IER_THRI) { /* a repeated edge only makes the guest look once more */
        STORE(uart->thr_irq_pending, 1);
        if (uart->irq_fd)
            notify(uart->irq_fd);
    }
    return true;
}

static void latch_store(struct pci_page *pci, u64 tag, u32 value)
{
    for (;;) {
        u64 old = LOAD(pci->latch), old_tag = LOAD(pci->latch_tag);
        settle(pci->latch_done, old_tag);
        if (tag && LOAD(pci->latch_done[TAG_VCPU(tag)]) >= TAG_EPOCH(tag))
            return;
        if (cas16(&pci->latch, old, old_tag, value, tag))
            return;
    }
}

#endif
