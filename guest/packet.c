/* Ethernet, ARP (RFC 826), IPv4 (RFC 791), ICMP echo (RFC 792), UDP (RFC 768), and payloads that verify themselves. */
#include "net.h"
#include "pattern.h"

enum { ETHERTYPE_IPV4 = 0x0800, ETHERTYPE_ARP = 0x0806 };
enum { PROTOCOL_ICMP = 1, PROTOCOL_UDP = 17 };
enum { ARP_REQUEST = 1, ARP_REPLY = 2 };
enum { ICMP_ECHO_REPLY = 0, ICMP_ECHO_REQUEST = 8 };
#define ETHERNET 14u
#define IPV4 20u
#define UDP_HEADER 8u
#define ICMP_HEADER 8u
#define UDP_CSUM 6u
#define ARP 28u

static u16 get16(const u8 *p) { return (u16)(p[0] << 8 | p[1]); }
static u32 get32(const u8 *p) { return (u32)get16(p) << 16 | get16(p + 2); }

static void put16(u8 *p, u32 value)
{
    p[0] = (u8)(value >> 8);
    p[1] = (u8)value;
}

static void put32(u8 *p, u32 value)
{
    put16(p, value >> 16);
    put16(p + 2, value);
}

/* One's complement sum, not folded: big-endian words. */
static u64 sum(const u8 *p, u32 length, u64 total)
{
    for (; length > 1; p += 2, length -= 2)
        total += get16(p);
    return length ? total + ((u32)p[0] << 8) : total;
}

static u16 fold(u64 total)
{
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return (u16)total;
}

static u64 pseudo_sum(const u8 *ipv4, u32 length)
{
    return sum(ipv4 + 12, 8, PROTOCOL_UDP + (u64)length);
}

static void ethernet(const struct net *net, u8 *frame, const u8 *to, u16 type)
{
    memcpy(frame, to, 6);
    memcpy(frame + 6, net->mac, 6);
    put16(frame + 12, type);
}

static void ipv4(u8 *p, u32 from, u32 to, u8 protocol, u32 length)
{
    static u16 identification;
    memset(p, 0, IPV4);
    p[0] = 0x45;
    put16(p + 2, IPV4 + length);
    put16(p + 4, ++identification); /* whoever cuts it into fragments: they must find each other again */
    p[8] = 64;
    p[9] = protocol;
    put32(p + 12, from);
    put32(p + 16, to);
    put16(p + 10, (u16)~fold(sum(p, IPV4, 0)));
}

/* ---- received ----------------------------------------------------------------------------------------- */

static enum net_kind parse_arp(const struct net *net, const struct net_frame *frame, struct udp *udp)
{
    const u8 *arp = frame->data + ETHERNET;
    static const u8 fixed[] = {0, 1, 8, 0, 6, 4};
    if (frame->length < ETHERNET + ARP || memcmp(arp, fixed, sizeof(fixed)))
        return NET_OTHER;
    memcpy(udp->from.mac, arp + 8, 6);
    udp->from.ip = get32(arp + 14);
    if (get16(arp + 6) == ARP_REPLY)
        return NET_ARP_TOLD;
    return get16(arp + 6) == ARP_REQUEST && get32(arp + 24) == net->ip ? NET_ARP_ASKED : NET_OTHER;
}

static enum net_kind parse_udp(const struct net_frame *frame, const u8 *ip, u32 length, struct udp *udp)
{
    u8 *p = frame->data + ETHERNET + IPV4;
    if (length < UDP_HEADER || get16(p + 4) < UDP_HEADER || get16(p + 4) > length)
        return NET_OTHER;
    length = get16(p + 4);
    bool vouched = frame->header->flags & (NET_NEEDS_CSUM | NET_DATA_VALID);
    if (!vouched && get16(p + UDP_CSUM) && fold(sum(p, length, pseudo_sum(ip, length))) != 0xffff) {
        bad("net BAD udp-checksum length=%u", length);
        return NET_OTHER;
    }
    udp->from.ip = get32(ip + 12);
    memcpy(udp->from.mac, frame->data + 6, 6);
    udp->from_port = get16(p);
    udp->port = get16(p + 2);
    udp->payload = p + UDP_HEADER;
    udp->length = length - UDP_HEADER;
    return NET_UDP;
}

enum net_kind net_parse(const struct net *net, const struct net_frame *frame, struct udp *udp)
{
    const u8 *ip = frame->data + ETHERNET;
    if (frame->length < ETHERNET)
        return NET_OTHER;
    if (get16(frame->data + 12) == ETHERTYPE_ARP)
        return parse_arp(net, frame, udp);
    if (get16(frame->data + 12) != ETHERTYPE_IPV4 || frame->length < ETHERNET + IPV4 || ip[0] != 0x45)
        return NET_OTHER;
    u32 total = get16(ip + 2);
    bool fragment = get16(ip + 6) & 0x3fff;
    if (get32(ip + 16) != net->ip || total < IPV4 || total > frame->length - ETHERNET || fragment)
        return NET_OTHER;
    if (fold(sum(ip, IPV4, 0)) != 0xffff) {
        bad("net BAD ipv4-checksum length=%u", total);
        return NET_OTHER;
    }
    if (ip[9] == PROTOCOL_UDP)
        return parse_udp(frame, ip, total - IPV4, udp);
    bool answer = ip[IPV4] == ICMP_ECHO_REPLY;
    if (ip[9] != PROTOCOL_ICMP || total < IPV4 + ICMP_HEADER || (!answer && ip[IPV4] != ICMP_ECHO_REQUEST))
        return NET_OTHER;
    if (fold(sum(ip + IPV4, total - IPV4, 0)) != 0xffff) {
        bad("net BAD icmp-checksum length=%u", total);
        return NET_OTHER;
    }
    udp->payload = frame->data + ETHERNET + IPV4 + ICMP_HEADER;
    udp->length = total - IPV4 - ICMP_HEADER;
    return answer ? NET_PONG : NET_PING;
}

/* ---- sent --------------------------------------------------------------------------------------------- */

static void arp(struct net *net, struct net_frame *frame, u16 operation, const struct net_peer *to, const u8 *target)
{
    u8 *p = frame->data + ETHERNET;
    static const u8 fixed[] = {0, 1, 8, 0, 6, 4};
    ethernet(net, frame->data, target, ETHERTYPE_ARP);
    memcpy(p, fixed, sizeof(fixed));
    put16(p + 6, operation);
    memcpy(p + 8, net->mac, 6);
    put32(p + 14, net->ip);
    memcpy(p + 18, to->mac, 6);
    put32(p + 24, to->ip);
    frame->length = ETHERNET + ARP;
    net_send(net, frame);
}

bool net_ask_arp(struct net *net, u32 ip, bool gratuitous)
{
    static const u8 everybody[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    struct net_frame *frame = net_transmit_frame(net, 0);
    struct net_peer to = {.ip = gratuitous ? net->ip : ip};
    if (!frame)
        return false;
    arp(net, frame, ARP_REQUEST, &to, everybody);
    return true;
}

bool net_answer(struct net *net, const struct net_frame *received, enum net_kind kind)
{
    struct net_frame *frame = net_transmit_frame(net, received->pair);
    const u8 *ip = received->data + ETHERNET;
    if (!frame)
        return false;
    if (kind == NET_ARP_ASKED) {
        struct net_peer to = {.ip = get32(ip + 14)};
        memcpy(to.mac, ip + 8, 6);
        arp(net, frame, ARP_REPLY, &to, to.mac);
        return true;
    }
    u32 length = get16(ip + 2) - IPV4;
    u8 *icmp = frame->data + ETHERNET + IPV4;
    ethernet(net, frame->data, received->data + 6, ETHERTYPE_IPV4);
    ipv4(frame->data + ETHERNET, net->ip, get32(ip + 12), PROTOCOL_ICMP, length);
    memcpy(icmp, ip + IPV4, length);
    icmp[0] = ICMP_ECHO_REPLY;
    put16(icmp + 2, 0);
    put16(icmp + 2, (u16)~fold(sum(icmp, length, 0)));
    frame->length = ETHERNET + IPV4 + length;
    net_send(net, frame);
    return true;
}

void net_send_ping(struct net *net, struct net_frame *frame, const struct net_peer *to, u64 number, u32 length)
{
    u8 *icmp = frame->data + ETHERNET + IPV4;
    length += ICMP_HEADER;
    ethernet(net, frame->data, to->mac, ETHERTYPE_IPV4);
    ipv4(frame->data + ETHERNET, net->ip, to->ip, PROTOCOL_ICMP, length);
    memset(icmp, 0, ICMP_HEADER);
    icmp[0] = ICMP_ECHO_REQUEST;
    memcpy(icmp + ICMP_HEADER, &number, sizeof(number));
    put16(icmp + 2, (u16)~fold(sum(icmp, length, 0)));
    frame->length = ETHERNET + IPV4 + length;
    net_send(net, frame);
}

void net_send_udp(struct net *net, struct net_frame *frame, const struct net_peer *to, u16 from_port, u16 port, u32 length)
{
    u8 *ip = frame->data + ETHERNET, *p = ip + IPV4;
    length += UDP_HEADER;
    ethernet(net, frame->data, to->mac, ETHERTYPE_IPV4);
    ipv4(ip, net->ip, to->ip, PROTOCOL_UDP, length);
    put16(p, from_port);
    put16(p + 2, port);
    put16(p + 4, length);
    put16(p + UDP_CSUM, 0);
    frame->length = ETHERNET + IPV4 + length;
    if (net->device->features & F_NET_CSUM) {
        put16(p + UDP_CSUM, fold(pseudo_sum(ip, length)));
        frame->header->flags = NET_NEEDS_CSUM;
        frame->header->csum_start = ETHERNET + IPV4;
        frame->header->csum_offset = UDP_CSUM;
    } else {
        u16 checksum = (u16)~fold(sum(p, length, pseudo_sum(ip, length)));
        put16(p + UDP_CSUM, checksum ? checksum : 0xffff);
    }
    if (IPV4 + length > net->mtu) { /* the host cuts it into fragments */
        frame->header->gso_type = NET_GSO_UDP;
        frame->header->hdr_len = NET_HEADERS;
        frame->header->gso_size = (u16)((net->mtu - IPV4) & ~7u);
    }
    net_send(net, frame);
}

/* ---- payloads ------------------------------------------------------------------------------------------ */

static u64 payload_key(u64 stream, u64 number) { return mix64(stream ^ mix64(number)); }

void net_payload_fill(void *payload, u32 length, u64 stream, u64 number)
{
    struct net_payload *p = payload;
    u32 words = (u32)((length - sizeof(*p)) / 8);
    p->magic = NET_MAGIC;
    p->stream = stream;
    p->number = number;
    pattern_fill(p->words, words, payload_key(stream, number));
    memset((u8 *)&p->words[words], 0, length - sizeof(*p) - 8ul * words);
}

const char *net_payload_judge(const void *payload, u32 length)
{
    const struct net_payload *p = payload;
    if (length < NET_PAYLOAD_MIN || p->magic != NET_MAGIC)
        return "foreign";
    u32 words = (u32)((length - sizeof(*p)) / 8);
    if (pattern_check(p->words, words, payload_key(p->stream, p->number)) != words)
        return "corrupt";
    for (u32 at = (u32)sizeof(*p) + 8 * words; at < length; at++)
        if (((const u8 *)payload)[at])
            return "corrupt";
    return NULL;
}
