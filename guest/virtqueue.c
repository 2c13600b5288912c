/* Split virtqueues, driver side. Virtio 1.2 §2.7. */
#include "virtio.h"

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
enum { USED_NO_NOTIFY = 1, AVAIL_NO_INTERRUPT = 1 };

static volatile u16 *used_event(struct virtqueue *q) { return &q->avail[2 + q->size]; }
static volatile u16 *avail_event(struct virtqueue *q) { return &q->used[2 + 4 * q->size]; }

static volatile struct vring_used_elem *used_ring(struct virtqueue *q)
{
    return (volatile struct vring_used_elem *)&q->used[2];
}

static void fill(volatile struct vring_desc *desc, const struct segment *s, bool in, bool more, u16 next)
{
    desc->address = (u64)s->data;
    desc->length = s->length;
    desc->flags = (u16)((in ? DESC_WRITE : 0) | (more ? DESC_NEXT : 0));
    desc->next = next;
}

static u16 add_indirect(struct virtqueue *q, const struct segment *segments, u32 out, u32 count)
{
    u16 head = q->free_head;
    struct vring_desc *table = q->indirect_tables + (u64)head * q->max_segments;
    for (u32 i = 0; i < count; i++)
        fill(&table[i], &segments[i], i >= out, i + 1 < count, (u16)(i + 1));
    q->free_head = q->desc[head].next;
    q->free_count--;
    q->desc[head].address = (u64)table;
    q->desc[head].length = count * (u32)sizeof(*table);
    q->desc[head].flags = DESC_INDIRECT;
    return head;
}

static u16 add_chain(struct virtqueue *q, const struct segment *segments, u32 out, u32 count)
{
    u16 head = q->free_head, at = head;
    for (u32 i = 0; i < count; i++) {
        u16 next = q->desc[at].next;
        fill(&q->desc[at], &segments[i], i >= out, i + 1 < count, next);
        at = next;
    }
    q->free_head = at;
    q->free_count = (u16)(q->free_count - count);
    return head;
}

bool virtqueue_add(struct virtqueue *q, const struct segment *segments, u32 out, u32 in, void *cookie)
{
    u32 count = out + in;
    bool indirect = q->indirect && count > 1;
    if (count > q->max_segments)
        die("a chain of %u segments, at most %u were announced", count, q->max_segments);
    if (q->free_count < (indirect ? 1 : count))
        return false;
    u16 head = indirect ? add_indirect(q, segments, out, count) : add_chain(q, segments, out, count);
    q->cookies[head] = cookie;
    q->avail[2 + (q->avail_index & (q->size - 1))] = head;
    compiler_barrier(); /* x86 keeps stores in order: the entry is visible before the index */
    q->avail[1] = ++q->avail_index;
    return true;
}

void virtqueue_kick(struct virtqueue *q)
{
    u16 old = q->kicked_index, new = q->avail_index;
    if (old == new)
        return;
    full_barrier(); /* the index must be visible before the device's wish is read */
    q->kicked_index = new;
    bool wanted = q->event_idx ? (u16)(new - *avail_event(q) - 1) < (u16)(new - old)
                               : !(q->used[0] & USED_NO_NOTIFY);
    if (!wanted)
        return;
    q->kicks++;
    mmio_write16(q->notify_address, q->index);
}

static void chain_free(struct virtqueue *q, u16 head)
{
    u16 last = head;
    u16 count = 1;
    while (q->desc[last].flags & DESC_NEXT) {
        last = q->desc[last].next;
        count++;
    }
    q->desc[last].next = q->free_head;
    q->free_head = head;
    q->free_count = (u16)(q->free_count + count);
    q->cookies[head] = NULL;
}

/* A used entry that was found although an interrupt had been asked for and has not come: the interrupt may be on
 * its way, so it is lost only if two timer ticks later, or as many as the word says, this queue's count has still not
 * moved. Ticks, not time: a paused or migrated guest sees its clock jump but no tick. */
static void watch_interrupt(struct virtqueue *q)
{
    if (!q->watching)
        return;
    if (q->cpu->irq_count[q->vector] != q->armed_irqs) {
        q->watching = false;
    } else if (q->cpu->irq_count[VECTOR_TIMER] - q->watch_ticks > q->lost_irq_ticks) {
        bad("irq BAD lost queue=%u vector=0x%02x used=%u", q->index, q->vector, q->last_used);
        q->watching = false;
    }
}

void *virtqueue_get(struct virtqueue *q, u32 *length)
{
    watch_interrupt(q);
    for (;;) {
        u16 ahead = (u16)(q->used[1] - q->last_used);
        if (!ahead)
            return NULL;
        compiler_barrier(); /* x86 keeps loads in order */
        if (ahead > q->size) {
            bad("virtio BAD used-index queue=%u used=%u last=%u", q->index, q->used[1], q->last_used);
            return NULL;
        }
        if (q->armed && !q->watching) {
            q->watching = true;
            q->watch_ticks = q->cpu->irq_count[VECTOR_TIMER];
        }
        q->armed = false;
        volatile struct vring_used_elem *element = &used_ring(q)[q->last_used++ & (q->size - 1)];
        u32 id = element->id;
        *length = element->length;
        if (id >= q->size || !q->cookies[id]) {
            bad("virtio BAD used-id queue=%u id=%u used=%u", q->index, id, (u16)(q->last_used - 1));
            continue;
        }
        void *cookie = q->cookies[id];
        chain_free(q, (u16)id);
        q->completions++;
        return cookie;
    }
}

bool virtqueue_arm(struct virtqueue *q)
{
    if (!q->vector || q->armed)
        return q->used[1] == q->last_used;
    if (!q->watching)
        q->armed_irqs = q->cpu->irq_count[q->vector];
    if (q->event_idx)
        *used_event(q) = q->last_used;
    full_barrier(); /* the wish must be visible before the index is read */
    if (q->used[1] != q->last_used)
        return false;
    q->armed = true;
    return true;
}
