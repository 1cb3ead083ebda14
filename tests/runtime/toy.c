/* A toy model behind the kernel ABI. Its logits depend on a running state per slot and on every cached token,
 * so that wrong caching, chunking or batching shows. Built twice: with -DHOST as the host library, without as kernels. */
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct { int32_t type_index; int32_t padding; union { int64_t i; double f; void* p; } v; } QcnAny;
typedef int (*QcnKernel)(void* self, const QcnAny* args, int32_t n_args, QcnAny* result);
typedef struct { QcnKernel fn; const QcnAny* args; int32_t n_args; int32_t reserved; } QcnLaunch;

#ifdef HOST

static char message[256];
static int started = 0;

int qcn_host_init(int n_threads, int pin) { (void)pin; started = n_threads; return 0; }
void qcn_host_shutdown(void) { started = 0; }
const char* qcn_host_error(void) { return message; }

void* qcn_host_load(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) snprintf(message, sizeof message, "%s", dlerror());
  return library;
}

int qcn_host_read(int file, int64_t at, void* into, int64_t bytes) {
  return pread(file, into, (size_t)bytes, at) == bytes ? 0 : (strcpy(message, "the file has ended"), 1);
}

double qcn_host_region_seconds(int count) { return 0.0 * count; }

void* qcn_host_symbol(void* library, const char* name) { return dlsym(library, name); }

int qcn_host_run(const QcnLaunch* launches, int n, double* seconds) {
  if (!started) { snprintf(message, sizeof message, "not started"); return 1; }
  for (int i = 0; i < n; i++) {
    struct timespec a, b;
    QcnAny result;
    clock_gettime(CLOCK_MONOTONIC, &a);
    if (launches[i].fn(0, launches[i].args, launches[i].n_args, &result)) {
      snprintf(message, sizeof message, "toy kernel refused");
      return 1 + i;
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    if (seconds) seconds[i] = (b.tv_sec - a.tv_sec) + 1e-9 * (b.tv_nsec - a.tv_nsec);
  }
  return 0;
}

#else

#define I32(k) ((const int32_t*)args[k].v.p)
#define F32(k) ((float*)args[k].v.p)

/* counts, tokens, positions, weight u [vocab] -> x [T]; fails on token 3 at position 77 */
int toy_embed(void* self, const QcnAny* args, int32_t n_args, QcnAny* result) {
  for (int t = 0; t < I32(0)[0]; t++) {
    if (I32(1)[t] == 3 && I32(2)[t] == 77) return -1;
    F32(4)[t] = F32(3)[I32(1)[t]] * (1.0f + 0.01f * (I32(2)[t] % 7));
  }
  return 0;
}

/* counts, cu_seqlens, context_lens, slots, into, state [slots, 16], x [T] -> y [T]: y = s = 0.7 s + x, s from zero at position 0 */
int toy_state(void* self, const QcnAny* args, int32_t n_args, QcnAny* result) {
  for (int i = 0; i < I32(0)[1]; i++) {
    float s = I32(2)[i] ? F32(5)[16 * I32(3)[i]] : 0.0f;
    for (int t = I32(1)[i]; t < I32(1)[i + 1]; t++) F32(7)[t] = s = 0.7f * s + F32(6)[t];
    F32(5)[16 * I32(4)[i]] = s;
  }
  return 0;
}

/* counts, positions, token_seq, context_lens, block_table, k [pages, 16], v [pages, 16], x [T] -> z [T]
 * pages of 4 tokens; z is a weighted mean over all tokens of the sequence so far */
int toy_attention(void* self, const QcnAny* args, int32_t n_args, QcnAny* result) {
  int width = I32(0)[3];
  for (int t = 0; t < I32(0)[0]; t++) {
    int position = I32(1)[t];
    const int32_t* table = I32(4) + I32(2)[t] * width;
    F32(5)[16 * table[position / 4] + position % 4] = F32(7)[t];
    F32(6)[16 * table[position / 4] + position % 4] = 1.0f + 0.1f * (position % 5);
    double sum = 0, weight = 0;
    for (int p = 0; p <= position; p++) {
      double w = F32(6)[16 * table[p / 4] + p % 4];
      sum += w * F32(5)[16 * table[p / 4] + p % 4];
      weight += w;
    }
    F32(8)[t] = (float)(sum / weight);
  }
  return 0;
}

/* counts, rows, y, z, weight w [vocab] -> logits [R, VOCAB] */
int toy_logits(void* self, const QcnAny* args, int32_t n_args, QcnAny* result) {
  const float* w = F32(4);
  for (int r = 0; r < I32(0)[2]; r++) {
    int t = I32(1)[r];
    float h = F32(2)[t] + 3.0f * F32(3)[t];
    for (int v = 0; v < VOCAB; v++) F32(5)[(long)r * VOCAB + v] = 4.0f * sinf(w[v] * (1.0f + h) + 0.1f * v);
  }
  return 0;
}

#endif
