/* virtio-net driver (virtio 1.2 §5.1), and as much of Ethernet, ARP, IPv4, ICMP and UDP as the net modes need. */
#ifndef NET_H
#define NET_H

#include "virtio.h"

#define NET_MAX_PAIRS 8

#define F_NET_CSUM (1ull << 0)
#define F_NET_GUEST_CSUM (1ull << 1)
#define F_NET_MTU (1ull << 3)
#define F_NET_MAC (1ull << 5)
#define F_NET_HOST_UFO (1ull << 14)
#define F_NET_STATUS (1ull << 16)
#define F_NET_CTRL_VQ (1ull << 17)
#define F_NET_GUEST_ANNOUNCE (1ull << 21)
#define F_NET_MQ (1ull << 22)

enum { NET_LINK_UP = 1, NET_ANNOUNCE = 2 }; /* bits of the status */

struct net_header { /* struct virtio_net_hdr, always with num_buffers */
    u8 flags, gso_type;
    u16 hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
enum { NET_NEEDS_CSUM = 1, NET_DATA_VALID = 2, NET_GSO_UDP = 3 };

/* The header and the frame behind it are one buffer for the device. */
struct net_frame {
    struct net_frame *next;
    u32 pair;
    u32 length; /* of what is at `data` */
    struct net_header *header;
    u8 *data;
};

struct net_pair {
    struct virtqueue *rx, *tx;
    struct net_frame *free; /* transmit frames */
    u32 in_flight;          /* the others */
};

struct net {
    struct virtio_device *device;
    u8 mac[6];
    u32 ip; /* ours, in host order */
    u32 mtu;
    u32 pair_count;
    u32 tx_bytes; /* room in a transmit frame */
    struct net_pair pairs[NET_MAX_PAIRS];
    struct virtqueue *ctrl; /* NULL: not offered */
    u64 received, sent, announced;
    u32 seen_ticks;
};

/* The first unclaimed device, started, its receive rings full. Words: ip csum pairs frames tx_bytes indirect event_idx. */
struct net *net_open(bool polled);
u32 word_ip(const char *key, const char *otherwise); /* host order */

struct net_frame *net_receive(struct net *net);                   /* NULL: nothing there */
void net_recycle(struct net *net, struct net_frame *frame);       /* a received frame's buffer goes back into its ring */
struct net_frame *net_transmit_frame(struct net *net, u32 pair);  /* NULL: all are on their way */
void net_send(struct net *net, struct net_frame *frame);          /* to be followed by net_kick() */
void net_kick(struct net *net);
bool net_all_sent(struct net *net); /* no transmit frame is on its way: the VMM may end without losing one */
bool net_idle(struct net *net, bool transmit); /* interrupts asked for and nothing to do; transmit: also for free frames */

/* Looks at the status once per timer tick; a pending announcement is carried out and acknowledged. */
void net_tick(struct net *net);
u16 net_status(const struct net *net);

/* Packets. Addresses and ports in host order. */
#define NET_HEADERS 42u /* Ethernet, IPv4 and UDP */
enum { NET_PORT_ECHO = 7, NET_PORT_SINK = 9 };
struct net_peer {
    u32 ip;
    u8 mac[6];
};
struct udp {
    struct net_peer from;
    u16 port, from_port;
    u8 *payload;
    u32 length;
};

enum net_kind { NET_OTHER, NET_ARP_ASKED, NET_ARP_TOLD, NET_PING, NET_PONG, NET_UDP };
/* What a received frame is, if it is meant for us; BAD for a wrong checksum. For NET_ARP_TOLD and NET_UDP, `udp` (at
 * least its `from`) is filled in; for NET_PONG its payload, the echo's number in front. */
enum net_kind net_parse(const struct net *net, const struct net_frame *frame, struct udp *udp);
/* Answers to a received ARP request or ping; false when no transmit frame is free. */
bool net_answer(struct net *net, const struct net_frame *received, enum net_kind kind);
bool net_ask_arp(struct net *net, u32 ip, bool gratuitous);
/* An ICMP echo request with `length` bytes of payload (8 or more), the first of them `number`. */
void net_send_ping(struct net *net, struct net_frame *frame, const struct net_peer *to, u64 number, u32 length);
/* Payload goes to frame->data + NET_HEADERS, `length` bytes; then this puts the headers in front and sends. */
void net_send_udp(struct net *net, struct net_frame *frame, const struct net_peer *to, u16 from_port, u16 port, u32 length);

/* Payloads that say whether they are whole: guest/payload.py. */
struct net_payload {
    u64 magic, stream, number;
    u64 words[];
};
#define NET_MAGIC 0x3154454e544f4c46ul /* "FLOTNET1" */
#define NET_PAYLOAD_MIN (sizeof(struct net_payload) + 8) /* one word at least */
void net_payload_fill(void *payload, u32 length, u64 stream, u64 number);
/* NULL: whole; "foreign" for other payloads. */
const char *net_payload_judge(const void *payload, u32 length);

#endif
