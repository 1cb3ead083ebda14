/* Memory near the threads that use it, and what a parallel region costs.
 *
 * Linux puts a page on the node of the thread that touches it first. Thread i of n computes the i-th part of every
 * product (see host.c), so it also reads the i-th part of every blob of weights from the file.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct { void* sync_handle; int32_t num_task; } TaskGroup;
typedef int (*TaskFn)(int task, TaskGroup* group, void* closure);
int qcn_host_regions(TaskFn fn, void* closure, int own, int count);
void qcn_host_set_error(const char* text);

typedef struct { int file; int64_t at, bytes; char* into; } Blob;

static int read_part(int task, TaskGroup* group, void* closure) {
  const Blob* blob = closure;
  int64_t done = blob->bytes * task / group->num_task, end = blob->bytes * (task + 1) / group->num_task;
  while (done < end) {
    ssize_t count = pread(blob->file, blob->into + done, (size_t)(end - done), blob->at + done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return qcn_host_set_error(count ? strerror(errno) : "the file has ended"), -1;
    done += count;
  }
  return 0;
}

/* Bytes of a file from `at` on, every thread its part. Returns 0, or 1 with qcn_host_error set. */
EXPORT int qcn_host_read(int file, int64_t at, void* into, int64_t bytes) {
  Blob blob = {file, at, bytes, into};
  return qcn_host_regions(read_part, &blob, 1, 1);
}

static int nothing(int task, TaskGroup* group, void* closure) {
  (void)task, (void)group, (void)closure;
  return 0;
}

/* Seconds that a parallel region takes in which nothing is done, the mean of `count` in a row; less than 0 when no
 * threads run. */
EXPORT double qcn_host_region_seconds(int count) {
  struct timespec from, to;
  clock_gettime(CLOCK_MONOTONIC, &from);
  int failed = qcn_host_regions(nothing, NULL, 0, count);
  clock_gettime(CLOCK_MONOTONIC, &to);
  double seconds = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
  return failed ? -1.0 : seconds / count;
}
