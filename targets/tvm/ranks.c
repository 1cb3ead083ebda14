/* Collectives of rank processes on one host, over shared memory. A plan calls them like kernels.
 *
 * Every collective is one meeting: a rank copies its part into its slot, raises its counter and waits until all counters
 * stand there. Slots are double: a rank can be one meeting ahead, and then nobody reads its old slot any more. All ranks
 * add up the slots in the same order, so they get the same bits. A rank that is dead, late or in another collective ends
 * the wait with an error; nothing waits for ever.
 *
 * Stages of a pipeline meet in pairs, in a room of two. Who sends goes on at once, up to one meeting ahead of the other.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_RANKS 64
#define SPINS 200
#define SLICE_NS 50000000 /* a sleeping rank looks this often whether others still live */

typedef struct { int32_t type_index; int32_t padding; union { int64_t i; double f; void* p; } v; } QcnAny;
typedef struct {
  _Alignas(64) atomic_uint count; /* meetings this rank has come to: a futex word */
  uint64_t tag[2];                /* what it came for: kind << 56 | bytes */
} Seat;
typedef struct { /* the shared memory; slots follow: [ranks][2][capacity] bytes */
  atomic_uint failed;
  char reason[508];
  Seat seats[MAX_RANKS];
} Room;
typedef struct { Room* room; int64_t capacity; int64_t deadline_ns; int32_t rank, ranks, parent; uint32_t meetings; } QcnRanks;
typedef struct { QcnRanks* ranks; int32_t kind, rows; int64_t width; } QcnCollective; /* rows: index into counts */
enum { ALL_REDUCE, ALL_GATHER, BROADCAST, BARRIER, SEND, RECV };

void qcn_host_set_error(const char* text);

static int64_t clock_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static char* slot(const QcnRanks* r, int rank, unsigned parity) {
  return (char*)r->room + (sizeof(Room) + 63) / 64 * 64 + ((int64_t)rank * 2 + parity) * r->capacity;
}

EXPORT int64_t qcn_ranks_bytes(int ranks, int64_t capacity) {
  return (int64_t)((sizeof(Room) + 63) / 64 * 64) + 2 * ranks * capacity;
}

/* Ends every wait, present and future, with a reason; the first one given stays. */
EXPORT void qcn_ranks_fail(QcnRanks* r, const char* reason) {
  unsigned none = 0;
  if (!atomic_compare_exchange_strong(&r->room->failed, &none, 1)) return;
  snprintf(r->room->reason, sizeof r->room->reason, "%s", reason);
  atomic_store(&r->room->failed, 2);
  for (int i = 0; i < r->ranks; ++i) syscall(SYS_futex, &r->room->seats[i].count, FUTEX_WAKE, MAX_RANKS, 0, 0, 0);
}

static int refuse(QcnRanks* r, const char* text) {
  qcn_ranks_fail(r, text);
  while (atomic_load(&r->room->failed) == 1) sched_yield();
  qcn_host_set_error(r->room->reason);
  return 1;
}

static int wait_for(QcnRanks* r, int other, unsigned meeting) {
  atomic_uint* word = &r->room->seats[other].count;
  int64_t deadline = 0;
  char text[200];
  for (unsigned spins = 0;; ++spins) {
    unsigned seen = atomic_load_explicit(word, memory_order_acquire);
    if ((int32_t)(seen - meeting) >= 0) return 0;
    if (atomic_load(&r->room->failed)) return refuse(r, "");
    if (spins < SPINS) { sched_yield(); continue; }
    if (!deadline) deadline = clock_ns() + r->deadline_ns;
    if (r->parent && getppid() != r->parent) return refuse(r, "rank 0 is gone");
    if (clock_ns() > deadline) {
      snprintf(text, sizeof text, "rank %d did not come to collective %u within %.0f s", other, meeting,
               (double)r->deadline_ns * 1e-9);
      return refuse(r, text);
    }
    struct timespec slice = {0, SLICE_NS};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &slice, 0, 0);
  }
}

/* Comes to the next meeting with `bytes` of `data` (NULL: with none). Returns what it came for. */
static uint64_t come(QcnRanks* r, int kind, const void* data, int64_t bytes) {
  unsigned parity = r->meetings & 1;
  Seat* seat = &r->room->seats[r->rank];
  if (data) memcpy(slot(r, r->rank, parity), data, (size_t)bytes);
  uint64_t tag = seat->tag[parity] = (uint64_t)kind << 56 | (uint64_t)bytes;
  atomic_store_explicit(&seat->count, r->meetings, memory_order_release);
  syscall(SYS_futex, &seat->count, FUTEX_WAKE, MAX_RANKS, 0, 0, 0);
  return tag;
}

static int check(QcnRanks* r, int other, uint64_t tag) {
  if (r->room->seats[other].tag[r->meetings & 1] == tag) return 0;
  return refuse(r, "the ranks came to different collectives: their plans do not belong together");
}

/* Comes to the next meeting and waits for all. Returns the parity, or -1. */
static int meet(QcnRanks* r, int kind, const void* data, int64_t bytes) {
  ++r->meetings;
  uint64_t tag = come(r, kind, data, bytes);
  for (int other = 0; other < r->ranks; ++other)
    if (other != r->rank && (wait_for(r, other, r->meetings) || check(r, other, tag))) return -1;
  return (int)(r->meetings & 1);
}

/* The next meeting of two. The other must have come to the one before: it then reads nothing that this one replaces. */
static int next(QcnRanks* r) {
  return ++r->meetings > 1 && wait_for(r, 1 - r->rank, r->meetings - 1);
}

static int hand_over(QcnRanks* r, const char* x, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += r->capacity) {
    if (next(r)) return 1;
    come(r, SEND, x + at, bytes - at < r->capacity ? bytes - at : r->capacity);
  }
  return 0;
}

static int take(QcnRanks* r, char* y, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += r->capacity) {
    int64_t count = bytes - at < r->capacity ? bytes - at : r->capacity;
    if (next(r)) return 1;
    come(r, RECV, NULL, count);
    if (wait_for(r, 1 - r->rank, r->meetings) || check(r, 1 - r->rank, (uint64_t)SEND << 56 | (uint64_t)count)) return 1;
    memcpy(y + at, slot(r, 1 - r->rank, r->meetings & 1), (size_t)count);
  }
  return 0;
}

static int reduce(QcnRanks* r, const float* x, float* y, int64_t n) {
  for (int64_t at = 0; at < n;) {
    int64_t count = n - at < r->capacity / 4 ? n - at : r->capacity / 4;
    int parity = meet(r, ALL_REDUCE, x + at, 4 * count);
    if (parity < 0) return 1;
    memcpy(y + at, slot(r, 0, (unsigned)parity), (size_t)(4 * count));
    for (int other = 1; other < r->ranks; ++other) {
      const float* part = (const float*)slot(r, other, (unsigned)parity);
      for (int64_t i = 0; i < count; ++i) y[at + i] += part[i];
    }
    at += count;
  }
  return 0;
}

/* x [rows, width] of every rank -> y [rows, ranks*width]; as many rows at a time as a slot holds. */
static int gather(QcnRanks* r, const char* x, char* y, int64_t rows, int64_t width) {
  int64_t most = r->capacity / width;
  if (most < 1) return refuse(r, "one row of an all_gather is larger than a slot");
  for (int64_t at = 0; at < rows;) {
    int64_t count = rows - at < most ? rows - at : most;
    int parity = meet(r, ALL_GATHER, x + at * width, count * width);
    if (parity < 0) return 1;
    for (int other = 0; other < r->ranks; ++other)
      for (int64_t i = 0; i < count; ++i)
        memcpy(y + ((at + i) * r->ranks + other) * width, slot(r, other, (unsigned)parity) + i * width, (size_t)width);
    at += count;
  }
  return 0;
}

/* For Python: all_reduce of n f32; all_gather of rows of `n` bytes; broadcast of n bytes of rank 0; barrier; n bytes from or
 * to the other of two. */
EXPORT int qcn_ranks_collective(QcnRanks* r, int kind, const void* x, void* y, int64_t rows, int64_t n) {
  if (kind == ALL_REDUCE) return reduce(r, x, y, n);
  if (kind == ALL_GATHER) return gather(r, x, y, rows, n);
  if (kind == SEND) return hand_over(r, x, n);
  if (kind == RECV) return take(r, y, n);
  if (n > r->capacity) return qcn_host_set_error("a broadcast is larger than a slot"), 1;
  int parity = meet(r, kind, kind == BROADCAST && r->rank == 0 ? x : NULL, n);
  if (parity < 0) return 1;
  if (kind == BROADCAST && r->rank != 0) memcpy(y, slot(r, 0, (unsigned)parity), (size_t)n);
  return 0;
}

/* As a row of a launch table: descriptor, x, y, counts. f32. */
EXPORT int qcn_ranks_launch(void* self, const QcnAny* args, int32_t n_args, QcnAny* result) {
  (void)self, (void)n_args, (void)result;
  const QcnCollective* c = args[0].v.p;
  int64_t rows = ((const int32_t*)args[3].v.p)[c->rows];
  if (c->kind == SEND) return hand_over(c->ranks, args[1].v.p, 4 * rows * c->width);
  if (c->kind == RECV) return take(c->ranks, args[2].v.p, 4 * rows * c->width);
  if (c->kind == ALL_REDUCE) return reduce(c->ranks, args[1].v.p, args[2].v.p, rows * c->width);
  return gather(c->ranks, args[1].v.p, args[2].v.p, rows, 4 * c->width);
}
