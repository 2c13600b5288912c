/*
 * The network worker's native loop: one thread per pair of queues. net.c is the API, net_pair.h the threads, net_rx.h and
 * net_tx.h the two directions.
 *
 *             ┌──────────────── one thread per pair ────────────────┐
 *   tx kick ─▶│ pop, parse ─▶ writev(tap) ─▶ used ring ─▶ call      │   TAP full: waits for POLLOUT, the chain stays
 *   TAP ─────▶│ window of parsed buffers ─▶ readv(tap) ─▶ used ring │   no buffers: TAP left alone until the rx kick
 *             └──────────────────────────────────────────────────────┘
 *
 * Packets go straight between guest memory and the TAP, vnet header first. Both directions return chains in the order in
 * which they were taken, so used.idx alone says where a successor goes on and no inflight region is kept: what a killed
 * worker had taken and not returned is taken again. A packet to the host may then be sent twice, one to the guest be lost.
 *
 * A pair's lock is held while its thread touches rings, guest memory, TAP or eventfds, and never while it waits. So whoever
 * holds it has stopped the pair: that is the fence. See net_enter for how it is got in time.
 *
 * Structs marked "ABI" are mirrored in net_worker/native.py, those of shared/ in shared/native_ring.py; tests compare
 * their sizes (net_abi_size).
 */
#ifndef FLOTILLA_NET_H
#define FLOTILLA_NET_H

#include <errno.h>

#include "loop.h"
#include "vring_setup.h"

#define NET_API __attribute__((visibility("default")))
#define NET_MAX_PAIRS 128
#define NET_BATCH 64
/* virtio 1.2, 5.1.6: 12 bytes with num_buffers, which a driver before 1.0 without mergeable buffers does not have. */
#define NET_HEADER 12
#define NET_LEGACY_HEADER 10
#define NET_NUM_BUFFERS_AT 10
/* The longest packet that a TAP gives: 64 KiB of IP, Ethernet, two VLAN tags, the vnet header. */
#define NET_MAX_PACKET (65536 + 14 + 8 + NET_HEADER)
/* readv takes 1024 (UIO_MAXIOV); the last one is the bounce buffer's. */
#define NET_MAX_IOV 1023
#define NET_WINDOW_HEADS 1024

/* ABI. One queue's counters, written by its thread, read by anybody (each word whole). */
struct net_counters {
    uint64_t epoch;   /* turns of the thread: proof of life, see net_nudge */
    uint64_t kicks;
    uint64_t calls;
    uint64_t frames;
    uint64_t bytes;   /* without vnet headers */
    uint64_t dropped; /* tx: the TAP refused it; rx: it did not fit into the guest's buffers */
    uint64_t stalls;  /* tx: the TAP was full; rx: there were no buffers */
    uint64_t malformed; /* how often the queue was broken */
    uint64_t last_malformed; /* enum vring_error */
    uint64_t broken;  /* enum vring_error that stopped the queue until its next start, 0 while it works */
    uint64_t tap_errno; /* of the last failed system call on the TAP but EAGAIN */
    uint64_t tap_gone;  /* rx only: how often the TAP turned out to be unusable */
    uint64_t poisoned;  /* tx only: frames dropped because each had killed its worker time and again */
};

/* ABI. A rehearsed fault, of every queue. All zero: none. */
struct net_fault {
    uint32_t die_at;    /* enum vring_step, at the `die_after`-th occurrence per queue */
    uint32_t die_after;
    uint32_t delay_ms;  /* before each turn of a pair's thread */
    uint32_t freeze;    /* the threads take no turns */
    uint32_t withhold, repeat; /* notifications, per queue: see struct loop_calls */
};

struct net_device;

/* `taps`: one descriptor per pair, borrowed, non-blocking. NULL: errno. No thread is started before the first queue. */
NET_API struct net_device *net_create(uint32_t pairs, const int32_t *taps);
NET_API void net_destroy(struct net_device *device);
/* When it returns nothing uses the former regions any more. */
NET_API int net_set_memory(struct net_device *device, const struct vring_region *regions, uint32_t count);
/* When it returns, no thread uses the old bitmap, and what is written from now on is marked in the new. 0, 0: off. */
NET_API void net_set_log(struct net_device *device, uint64_t address, uint64_t size);
/* `header`: bytes before each packet. `mergeable`: a packet to the guest may take several chains. Queues are stopped. */
NET_API int net_set_format(struct net_device *device, uint32_t header, uint32_t mergeable);
/* Whether the pair's TAP queue is attached: a detached one is not polled. */
NET_API int net_set_attached(struct net_device *device, uint32_t pair, uint32_t attached);
/* Begins at used.idx, whatever the setup's base says: see above. */
NET_API int net_start(struct net_device *device, const struct vring_setup *setup);
/* The fence: afterwards nothing of this queue touches guest memory, TAP or eventfds. Returns the next avail index. */
NET_API int net_stop(struct net_device *device, uint32_t index);
/* Make each thread take a turn, so that its epoch moves though the guest is idle. */
NET_API void net_nudge(struct net_device *device);
/* Signalled when there is something to look at: a broken queue, a TAP that is gone. */
NET_API int net_event_fd(struct net_device *device);
NET_API const struct net_counters *net_counters(struct net_device *device, uint32_t index);
/* A worker of this card died of its own work lately; `blame`: the last one did. Before the first start. */
NET_API void net_set_trial(struct net_device *device, uint32_t blame);
/* For tests: a frame of this EtherType from the guest aborts the process. */
NET_API void net_set_lethal(struct net_device *device, uint32_t ethertype);
NET_API void net_set_fault(struct net_device *device, const struct net_fault *fault);
/*
 * The control queue, which belongs to the caller's thread. net_ctrl_take copies the next command (class, command, data) to
 * `out`, at most `room` bytes, and returns how many; 0: none, the driver kicks for the next; negative: -enum vring_error,
 * the queue is broken. It stays the next one until net_ctrl_answer has returned it with its ack byte.
 */
NET_API int net_ctrl_take(struct net_device *device, uint8_t *out, uint32_t room);
NET_API void net_ctrl_answer(struct net_device *device, uint32_t ack);
/* sizeof of the n-th ABI struct; 0 behind the last. */
NET_API uint32_t net_abi_size(uint32_t which);

#endif
