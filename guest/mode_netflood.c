/* `netflood`: traffic without anything to verify, for figures. Sends datagrams (or with `ping` one echo request at a time)
 * to `peer` and counts what comes; payloads are neither written nor read. */
#include "net.h"

#define ARP_RETRY_NS (200 * NS_PER_MS)
#define BURST 64u
#define FIRST_PORT 4000u
#define PING_BYTES 56u
#define LONGEST_US 4096u /* of a round trip that is told apart */

struct flood {
    struct net *net;
    struct net_peer peer;
    bool known, transmit, ping, outstanding;
    u64 asked_ns, sent_ns;
    u32 bytes, next_pair, sent_ticks;
    u64 number, answered, lost, received_bytes;
    u32 took_us[LONGEST_US];
};

static void flood_start(struct task *task)
{
    struct flood *f = task->state = memory_alloc(sizeof(*f), 64);
    f->transmit = word_flag("tx", true);
    f->ping = word_flag("ping", false);
    f->bytes = (u32)word_u64("bytes", 1472);
    f->peer.ip = word_ip("peer", "192.168.249.1");
    f->net = net_open(task->polled);
    u64 largest = f->net->device->features & F_NET_HOST_UFO ? 65507 : f->net->mtu - 28;
    if (f->bytes > largest || f->bytes + NET_HEADERS > f->net->tx_bytes)
        die("netflood: bytes=%u (at most %lu, and 42 less than tx_bytes)", f->bytes, largest);
}

static void flood_answered(struct flood *f, const struct udp *pong)
{
    u64 number, took = (now_ns() - f->sent_ns) / 1000;
    memcpy(&number, pong->payload, sizeof(number));
    if (!f->outstanding || pong->length != PING_BYTES || number != f->number)
        return; /* late: it counts as lost already */
    f->outstanding = false;
    f->answered++;
    f->took_us[took < LONGEST_US ? took : LONGEST_US - 1]++;
}

static void flood_receive(struct flood *f, const struct net_frame *frame)
{
    struct udp udp;
    f->received_bytes += frame->length;
    if (!f->ping && frame->data[12] == 0x08 && frame->data[13] == 0x00) /* IPv4: the flood itself */
        return;
    enum net_kind kind = net_parse(f->net, frame, &udp);
    if (kind == NET_ARP_ASKED) {
        net_answer(f->net, frame, kind);
    } else if (kind == NET_ARP_TOLD && udp.from.ip == f->peer.ip) {
        f->peer = udp.from;
        f->known = true;
    } else if (kind == NET_PONG) {
        flood_answered(f, &udp);
    }
}

static bool flood_ping(struct flood *f)
{
    u32 ticks = this_cpu()->irq_count[VECTOR_TIMER];
    if (f->outstanding && ticks - f->sent_ticks > 10) {
        f->outstanding = false;
        f->lost++;
    }
    struct net_frame *frame = f->outstanding ? NULL : net_transmit_frame(f->net, 0);
    if (!frame)
        return false;
    f->outstanding = true;
    f->sent_ticks = ticks;
    f->sent_ns = now_ns();
    net_send_ping(f->net, frame, &f->peer, ++f->number, PING_BYTES);
    return true;
}

/* Whether it did anything. */
static bool flood_push(struct flood *f)
{
    struct net_frame *frame;
    u32 count = 0, full = 0;
    if (!f->known) {
        if (now_ns() < f->asked_ns + ARP_RETRY_NS || !net_ask_arp(f->net, f->peer.ip, false))
            return false;
        f->asked_ns = now_ns();
        return true;
    }
    if (f->ping)
        return flood_ping(f);
    while (count < BURST && full < f->net->pair_count) {
        u32 pair = f->next_pair;
        f->next_pair = (pair + 1) % f->net->pair_count;
        if (!(frame = net_transmit_frame(f->net, pair))) {
            full++;
            continue;
        }
        full = 0;
        net_send_udp(f->net, frame, &f->peer, (u16)(FIRST_PORT + pair), NET_PORT_SINK, f->bytes);
        count++;
    }
    return count;
}

static u32 flood_quantile(const struct flood *f, u64 percent)
{
    u64 seen = 0;
    for (u32 us = 0; us < LONGEST_US; us++)
        if ((seen += f->took_us[us]) * 100 > f->answered * percent)
            return us;
    return 0;
}

static void flood_report(const struct flood *f)
{
    u64 sent = f->net->sent;
    net_all_sent(f->net); /* takes back what has gone */
    for (u32 i = 0; i < f->net->pair_count; i++)
        sent -= f->net->pairs[i].in_flight;
    say("net flood %lu gone=%lu rx=%lu rx_bytes=%lu answered=%lu lost=%lu p50_us=%u p99_us=%u ns=%lu", f->net->sent, sent,
        f->net->received, f->received_bytes, f->answered, f->lost, flood_quantile(f, 50), flood_quantile(f, 99), now_ns());
}

static enum progress flood_step(struct task *task)
{
    struct flood *f = task->state;
    struct net_frame *frame;
    bool moved = false;
    for (u32 i = 0; i < BURST && (frame = net_receive(f->net)); i++) {
        flood_receive(f, frame);
        net_recycle(f->net, frame);
        moved = true;
    }
    moved |= f->transmit && flood_push(f);
    net_kick(f->net);
    net_tick(f->net);
    if (report_due(task))
        flood_report(f);
    return moved || !net_idle(f->net, f->transmit && f->known && !f->ping) ? BUSY : IDLE;
}

const struct mode mode_netflood = {"netflood", flood_start, flood_step};
