/* `net`: a host on the network that answers ARP, pings and UDP echo, and swallows what comes to the discard port.
 * `netload`: one that sends, as fast as it goes or one datagram at a time, waiting for its echo. */
#include "net.h"

#define ARP_RETRY_NS (200 * NS_PER_MS)
#define BURST 64u
#define OUR_PORT 4000

struct responder {
    struct net *net;
    u64 arp, pings, echoed, sunk, verified, missing, dropped;
    u64 stream, next; /* of what comes to the discard port */
};

static void responder_start(struct task *task)
{
    struct responder *r = task->state = memory_alloc(sizeof(*r), 64);
    r->net = net_open(task->polled);
}

/* False for a damaged one. Anything else that somebody sends is no mistake of the VMM's. */
static bool verify(struct responder *r, const struct udp *udp)
{
    const char *verdict = net_payload_judge(udp->payload, udp->length);
    if (!verdict) {
        r->verified++;
        return true;
    }
    if (str_equal(verdict, "foreign"))
        return true;
    const struct net_payload *p = (const void *)udp->payload;
    bad("net BAD %s stream=%lu number=%lu length=%u", verdict, p->stream, p->number, udp->length);
    return false;
}

static void sink(struct responder *r, const struct udp *udp)
{
    const struct net_payload *p = (const void *)udp->payload;
    r->sunk++;
    if (!verify(r, udp) || net_payload_judge(udp->payload, udp->length))
        return;
    if (p->stream == r->stream && p->number > r->next)
        r->missing += p->number - r->next;
    r->stream = p->stream;
    r->next = p->number + 1;
}

static void echo(struct responder *r, const struct net_frame *received, const struct udp *udp)
{
    struct net_frame *frame;
    if (!verify(r, udp))
        return;
    if (!(frame = net_transmit_frame(r->net, received->pair))) {
        r->dropped++;
        return;
    }
    memcpy(frame->data + NET_HEADERS, udp->payload, udp->length);
    net_send_udp(r->net, frame, &udp->from, udp->port, udp->from_port, udp->length);
    r->echoed++;
}

static void handle(struct responder *r, const struct net_frame *frame)
{
    struct udp udp;
    enum net_kind kind = net_parse(r->net, frame, &udp);
    if (kind == NET_ARP_ASKED || kind == NET_PING) {
        if (!net_answer(r->net, frame, kind))
            r->dropped++;
        else if (kind == NET_PING)
            r->pings++;
        else
            r->arp++;
    } else if (kind == NET_UDP && udp.port == NET_PORT_ECHO) {
        echo(r, frame, &udp);
    } else if (kind == NET_UDP && udp.port == NET_PORT_SINK) {
        sink(r, &udp);
    }
}

static void responder_report(const struct responder *r)
{
    const struct net *n = r->net;
    say("net ok %lu tx=%lu arp=%lu pings=%lu echoed=%lu sunk=%lu verified=%lu missing=%lu dropped=%lu announced=%lu ns=%lu",
        n->received, n->sent, r->arp, r->pings, r->echoed, r->sunk, r->verified, r->missing, r->dropped, n->announced,
        now_ns());
}

static enum progress responder_step(struct task *task)
{
    struct responder *r = task->state;
    struct net_frame *frame;
    u32 done = 0;
    while (done < BURST && (frame = net_receive(r->net))) {
        handle(r, frame);
        net_recycle(r->net, frame);
        done++;
    }
    net_kick(r->net);
    net_tick(r->net);
    bool last = task->passes && r->echoed + r->pings + r->sunk >= task->passes && net_all_sent(r->net);
    if (report_due(task) || last)
        responder_report(r);
    if (last)
        return DONE;
    return done || !net_idle(r->net, task->passes) ? BUSY : IDLE;
}

struct load {
    struct net *net;
    struct net_peer peer;
    bool known, wait; /* the peer's MAC is; one at a time */
    u64 asked_ns;
    u32 bytes, next_pair;
    u16 port;
    u64 sent, answered, lost;
    u64 sent_ns, sum_ns, best_ns, worst_ns;
    bool outstanding;
    u32 deadline_ticks, sent_ticks;
};

static void load_start(struct task *task)
{
    struct load *l = task->state = memory_alloc(sizeof(*l), 64);
    l->wait = word_flag("wait", false);
    l->bytes = (u32)word_u64("bytes", 1472);
    l->port = (u16)word_u64("port", l->wait ? NET_PORT_ECHO : NET_PORT_SINK);
    l->peer.ip = word_ip("peer", "192.168.249.1");
    l->deadline_ticks = (u32)word_u64("lost_ticks", 10);
    l->net = net_open(task->polled);
    l->best_ns = ~0ul;
    u64 largest = l->net->device->features & F_NET_HOST_UFO ? 65507 : l->net->mtu - 28;
    if (l->bytes < NET_PAYLOAD_MIN || l->bytes > largest || l->bytes + NET_HEADERS > l->net->tx_bytes)
        die("netload: bytes=%u (%u to %lu, and 42 less than tx_bytes)", l->bytes, (u32)NET_PAYLOAD_MIN, largest);
}

static void load_receive(struct load *l, const struct net_frame *frame)
{
    struct udp udp;
    enum net_kind kind = net_parse(l->net, frame, &udp);
    if (kind == NET_ARP_ASKED) {
        net_answer(l->net, frame, kind);
    } else if (kind == NET_ARP_TOLD && udp.from.ip == l->peer.ip) {
        l->peer = udp.from;
        l->known = true;
    } else if (kind == NET_UDP && udp.port == OUR_PORT && l->outstanding) {
        const struct net_payload *p = (const void *)udp.payload;
        const char *verdict = udp.length == l->bytes ? net_payload_judge(udp.payload, udp.length) : "cut";
        if (!verdict && p->number != l->sent - 1)
            return; /* late: it counts as lost already */
        if (verdict)
            bad("net BAD echo %s number=%lu length=%u", verdict, l->sent - 1, udp.length);
        u64 took = now_ns() - l->sent_ns;
        l->outstanding = false;
        l->answered++;
        l->sum_ns += took;
        l->best_ns = took < l->best_ns ? took : l->best_ns;
        l->worst_ns = took > l->worst_ns ? took : l->worst_ns;
    }
}

static bool load_send(struct load *l)
{
    struct net_frame *frame = net_transmit_frame(l->net, l->next_pair);
    if (!frame)
        return false;
    l->next_pair = (l->next_pair + 1) % l->net->pair_count;
    net_payload_fill(frame->data + NET_HEADERS, l->bytes, 1, l->sent++);
    net_send_udp(l->net, frame, &l->peer, OUR_PORT, l->port, l->bytes);
    l->outstanding = l->wait;
    l->sent_ns = now_ns();
    l->sent_ticks = this_cpu()->irq_count[VECTOR_TIMER];
    return true;
}

/* Whether it did anything. */
static bool load_push(struct load *l)
{
    u32 count = 0;
    if (!l->known) {
        if (now_ns() < l->asked_ns + ARP_RETRY_NS || !net_ask_arp(l->net, l->peer.ip, false))
            return false;
        l->asked_ns = now_ns();
        return true;
    }
    if (l->outstanding && this_cpu()->irq_count[VECTOR_TIMER] - l->sent_ticks > l->deadline_ticks) {
        l->outstanding = false;
        l->lost++;
    }
    while (count < (l->wait ? 1 : BURST) && !l->outstanding && load_send(l))
        count++;
    return count;
}

static void load_report(const struct load *l)
{
    u64 mean = l->answered ? l->sum_ns / l->answered : 0, best = l->answered ? l->best_ns : 0;
    say("net load %lu bytes=%lu answered=%lu lost=%lu best_us=%lu mean_us=%lu worst_us=%lu ns=%lu", l->sent,
        l->sent * l->bytes, l->answered, l->lost, best / 1000, mean / 1000, l->worst_ns / 1000, now_ns());
}

static enum progress load_step(struct task *task)
{
    struct load *l = task->state;
    struct net_frame *frame;
    bool moved = false;
    for (u32 i = 0; i < BURST && (frame = net_receive(l->net)); i++) {
        load_receive(l, frame);
        net_recycle(l->net, frame);
        moved = true;
    }
    bool enough = task->passes && (l->wait ? l->answered : l->sent) >= task->passes;
    moved |= enough || load_push(l);
    net_kick(l->net);
    net_tick(l->net);
    bool last = enough && net_all_sent(l->net);
    if (last || report_due(task))
        load_report(l);
    if (last)
        return DONE;
    return moved || !net_idle(l->net, l->known && !l->wait) ? BUSY : IDLE;
}

const struct mode mode_net = {"net", responder_start, responder_step};
const struct mode mode_netload = {"netload", load_start, load_step};
