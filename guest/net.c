/* virtio-net: device, rings, control queue. */
#include "net.h"

enum { CONFIG_MAC = 0, CONFIG_STATUS = 6, CONFIG_PAIRS = 8, CONFIG_MTU = 10 };
enum { CTRL_ANNOUNCE = 3, CTRL_MQ = 4 };
#define WANTED (F_NET_MAC | F_NET_STATUS | F_NET_MTU | F_NET_CTRL_VQ | F_NET_GUEST_ANNOUNCE | F_NET_MQ)
#define FRAME_AT 54u /* of its allocation: room for the header, and a UDP payload is aligned to 8 bytes */
#define ETHERNET 14u
#define CTRL_LOST_TICKS 600

u32 word_ip(const char *key, const char *otherwise)
{
    const char *p = word(key);
    u32 ip = 0, part = 0, parts = 0;
    for (p = p ? p : otherwise; p; p++) {
        if (*p >= '0' && *p <= '9') {
            part = part * 10 + (u32)(*p - '0');
            continue;
        }
        if (part > 255)
            break;
        ip = ip << 8 | part;
        part = 0;
        if (++parts == 4 || *p != '.')
            break;
    }
    if (parts != 4)
        die("net: %s is no IPv4 address", key);
    return ip;
}

static struct net_frame *frame_new(u32 pair, u32 bytes)
{
    struct net_frame *frame = memory_alloc(sizeof(*frame), 16);
    u8 *space = memory_alloc(FRAME_AT + bytes, 64);
    frame->pair = pair;
    frame->data = space + FRAME_AT;
    frame->header = (struct net_header *)(frame->data - sizeof(struct net_header));
    return frame;
}

void net_recycle(struct net *net, struct net_frame *frame)
{
    struct segment s = {frame->header, (u32)sizeof(struct net_header) + net->mtu + ETHERNET};
    virtqueue_add(net->pairs[frame->pair].rx, &s, 0, 1, frame);
}

static void pair_open(struct net *net, u32 index, u32 frames, bool polled)
{
    struct net_pair *pair = &net->pairs[index];
    pair->rx = virtio_queue(net->device, (u16)(2 * index), 1, !polled);
    pair->tx = virtio_queue(net->device, (u16)(2 * index + 1), 1, !polled);
    for (u32 i = 0; i < frames && i < pair->rx->size; i++)
        net_recycle(net, frame_new(index, net->mtu + ETHERNET));
    for (u32 i = 0; i < frames && i < pair->tx->size; i++) {
        struct net_frame *frame = frame_new(index, net->tx_bytes);
        frame->next = pair->free;
        pair->free = frame;
    }
}

/* One command and its answer, waited for: the device may be replaced meanwhile, so only ticks count. */
static void control(struct net *net, u8 class, u8 command, const void *data, u32 length)
{
    static struct {
        u8 class, command, data[6];
        volatile u8 ack;
    } request;
    u32 got, began = this_cpu()->irq_count[VECTOR_TIMER];
    request.class = class;
    request.command = command;
    memcpy(request.data, data, length);
    request.ack = 0xff;
    struct segment s[] = {{&request, 2 + length}, {(void *)&request.ack, 1}};
    virtqueue_add(net->ctrl, s, 1, 1, &request);
    virtqueue_kick(net->ctrl);
    while (!virtqueue_get(net->ctrl, &got)) {
        pause();
        if (this_cpu()->irq_count[VECTOR_TIMER] - began > CTRL_LOST_TICKS)
            die("net: no answer to control command %u.%u", class, command);
    }
    if (request.ack)
        bad("net BAD control class=%u command=%u ack=%u", class, command, request.ack);
}

static void pairs_choose(struct net *net)
{
    u32 offered = net->device->features & F_NET_MQ ? virtio_config_read(net->device, CONFIG_PAIRS, 2) : 1;
    net->pair_count = (u32)word_u64("pairs", 1);
    if (!net->pair_count || net->pair_count > offered || net->pair_count > NET_MAX_PAIRS)
        die("net: pairs=%u, the device has %u", net->pair_count, offered);
    if (net->device->features & F_NET_CTRL_VQ)
        net->ctrl = virtio_queue(net->device, (u16)(2 * offered), 2, false);
}

static u64 features_wanted(void)
{
    u64 wanted = WANTED;
    if (word_flag("csum", true))
        wanted |= F_NET_CSUM | F_NET_GUEST_CSUM | F_NET_HOST_UFO;
    if (word_flag("indirect", true))
        wanted |= F_RING_INDIRECT_DESC;
    if (word_flag("event_idx", true))
        wanted |= F_RING_EVENT_IDX;
    return wanted;
}

struct net *net_open(bool polled)
{
    struct net *net = memory_alloc(sizeof(*net), 64);
    struct virtio_device *d = NULL;
    for (u32 n = 0; (d = virtio_find(VIRTIO_NET, n)) && !pci_claim(d->pci); n++)
        ;
    if (!d)
        die("net: no virtio-net device, or other tasks drive them all");
    net->device = d;
    virtio_negotiate(d, features_wanted());
    for (u32 i = 0; i < sizeof(net->mac); i++)
        net->mac[i] = (u8)virtio_config_read(d, CONFIG_MAC + i, 1);
    net->mtu = d->features & F_NET_MTU ? virtio_config_read(d, CONFIG_MTU, 2) : 1500;
    net->tx_bytes = (u32)word_u64("tx_bytes", net->mtu + ETHERNET);
    net->ip = word_ip("ip", "192.168.249.2");
    pairs_choose(net);
    for (u32 i = 0; i < net->pair_count; i++)
        pair_open(net, i, (u32)word_u64("frames", 128), polled);
    virtio_start(d);
    for (u32 i = 0; i < net->pair_count; i++)
        virtqueue_kick(net->pairs[i].rx);
    u16 count = (u16)net->pair_count;
    if (count > 1)
        control(net, CTRL_MQ, 0, &count, sizeof(count));
    line_add("net open slot=%u mac=", d->pci->slot >> 3);
    line_hex(net->mac, sizeof(net->mac));
    line_add(" mtu=%u features=0x%lx pairs=%u size=%u link=%u irq=%u", net->mtu, d->features, net->pair_count,
             net->pairs[0].rx->size, net_status(net) & NET_LINK_UP, !polled);
    line_end();
    return net;
}

u16 net_status(const struct net *net)
{
    return net->device->features & F_NET_STATUS ? (u16)virtio_config_read(net->device, CONFIG_STATUS, 2) : NET_LINK_UP;
}

void net_tick(struct net *net)
{
    u32 ticks = this_cpu()->irq_count[VECTOR_TIMER];
    if (ticks == net->seen_ticks || !net->ctrl || !(net->device->features & F_NET_GUEST_ANNOUNCE))
        return;
    net->seen_ticks = ticks;
    if (!(net_status(net) & NET_ANNOUNCE) || !net_ask_arp(net, net->ip, true))
        return;
    net_kick(net);
    control(net, CTRL_ANNOUNCE, 0, NULL, 0);
    net->announced++;
}

struct net_frame *net_receive(struct net *net)
{
    for (u32 i = 0; i < net->pair_count; i++) {
        u32 length;
        struct net_frame *frame = virtqueue_get(net->pairs[i].rx, &length);
        if (!frame)
            continue;
        net->received++;
        if (length < sizeof(struct net_header) + ETHERNET ||
            length > sizeof(struct net_header) + ETHERNET + net->mtu) {
            bad("net BAD used-length pair=%u length=%u", i, length);
            length = sizeof(struct net_header);
        }
        frame->length = length - (u32)sizeof(struct net_header);
        return frame;
    }
    return NULL;
}

static void reclaim(struct net_pair *pair)
{
    struct net_frame *frame;
    u32 length;
    while ((frame = virtqueue_get(pair->tx, &length))) {
        frame->next = pair->free;
        pair->free = frame;
        pair->in_flight--;
    }
}

bool net_all_sent(struct net *net)
{
    bool sent = true;
    for (u32 i = 0; i < net->pair_count; i++) {
        reclaim(&net->pairs[i]);
        sent &= !net->pairs[i].in_flight;
    }
    return sent;
}

struct net_frame *net_transmit_frame(struct net *net, u32 index)
{
    struct net_pair *pair = &net->pairs[index];
    struct net_frame *frame;
    reclaim(pair);
    if ((frame = pair->free)) {
        pair->free = frame->next;
        *frame->header = (struct net_header){0};
    }
    return frame;
}

void net_send(struct net *net, struct net_frame *frame)
{
    struct segment s = {frame->header, (u32)sizeof(struct net_header) + frame->length};
    virtqueue_add(net->pairs[frame->pair].tx, &s, 1, 0, frame);
    net->pairs[frame->pair].in_flight++;
    net->sent++;
}

void net_kick(struct net *net)
{
    for (u32 i = 0; i < net->pair_count; i++) {
        virtqueue_kick(net->pairs[i].tx);
        virtqueue_kick(net->pairs[i].rx);
    }
}

bool net_idle(struct net *net, bool transmit)
{
    bool idle = true;
    for (u32 i = 0; i < net->pair_count; i++) {
        idle &= virtqueue_arm(net->pairs[i].rx);
        if (transmit)
            idle &= virtqueue_arm(net->pairs[i].tx);
    }
    return idle;
}
