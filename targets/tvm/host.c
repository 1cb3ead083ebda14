/* The host of compiled kernels: a thread pool, the few symbols TVM's generated code asks for, and one call that runs a
 * whole plan. It needs libc and pthreads, nothing of TVM.
 *
 * A parallel region is cut into tasks, more of them than threads. Every thread owns a stretch of neighbouring tasks and
 * takes them in order, so that it reads one stretch of memory; who is done takes the last tasks of the others. A stretch
 * is one atomic word (generation << 32 | end << 16 | next), so a thread that wakes late or lost its core finds nothing
 * to do and is not waited for. Which thread runs a task never changes its result: every loop index belongs to one task.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#define RELAX() _mm_pause()
#define FLUSH_DENORMALS 0x8040u /* FTZ | DAZ: a fading DeltaNet state must not turn slow */
static unsigned fp_enter(void) { unsigned old = _mm_getcsr(); _mm_setcsr(old | FLUSH_DENORMALS); return old; }
static void fp_leave(unsigned old) { _mm_setcsr(old); }
#elif defined(__aarch64__)
#define RELAX() __asm__ __volatile__("yield" ::: "memory")
#define FLUSH_DENORMALS (1u << 24) /* FPCR.FZ */
static unsigned fp_enter(void) {
  uint64_t old;
  __asm__ __volatile__("mrs %0, fpcr" : "=r"(old));
  __asm__ __volatile__("msr fpcr, %0" :: "r"(old | FLUSH_DENORMALS));
  return (unsigned)old;
}
static void fp_leave(unsigned old) { __asm__ __volatile__("msr fpcr, %0" :: "r"((uint64_t)old)); }
#else
#error "qcn_host knows x86-64 and 64-bit Arm"
#endif

#define MAX_THREADS 512
#define TASKS_PER_THREAD 8
#define MOST_TASKS 0xffff
#define SPIN_NS 300000 /* an idle worker spins this long before it sleeps */
#define EXPORT __attribute__((visibility("default")))

typedef struct { int32_t type_index; int32_t padding; union { int64_t i; double f; void* p; } v; } QcnAny;
typedef int (*QcnKernel)(void* self, const QcnAny* args, int32_t n_args, QcnAny* result);
typedef struct { QcnKernel fn; const QcnAny* args; int32_t n_args; int32_t reserved; } QcnLaunch;
typedef struct { void* sync_handle; int32_t num_task; } TaskGroup;           /* TVMParallelGroupEnv */
typedef int (*TaskFn)(int task, TaskGroup* group, void* closure);            /* FTVMParallelLambda */
typedef void (*RaiseFn)(const char* kind, const char** parts, int32_t count);

typedef struct { _Alignas(64) atomic_uint_fast64_t tasks; } Stretch; /* generation << 32 | end << 16 | next */

static struct {
  Stretch stretches[MAX_THREADS];
  _Alignas(64) atomic_uint generation;       /* futex word of sleeping workers */
  _Alignas(64) atomic_int done;
  _Alignas(64) atomic_int sleepers;
  atomic_int failed;
  atomic_int stopping;
  TaskFn fn;
  void* closure;
  TaskGroup group;
  int own;     /* every thread takes the tasks of its own stretch alone */
  int threads; /* 0 before init; the caller of qcn_host_run is one of them */
  pthread_t workers[MAX_THREADS];
  int pinned;
  pid_t caller; /* the thread that was pinned beside the workers */
  cpu_set_t allowed;
} pool;

static pthread_mutex_t run_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t error_lock = PTHREAD_MUTEX_INITIALIZER;
static char error_text[1024];
static atomic_int forked;
static __thread int inside_region;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- errors ---- */

static void set_error(const char* text) {
  pthread_mutex_lock(&error_lock);
  if (!error_text[0]) snprintf(error_text, sizeof error_text, "%s", text);
  pthread_mutex_unlock(&error_lock);
}

void qcn_host_set_error(const char* text) { set_error(text); } /* for ranks.c */

static void clear_error(void) {
  pthread_mutex_lock(&error_lock);
  error_text[0] = 0;
  pthread_mutex_unlock(&error_lock);
}

EXPORT const char* qcn_host_error(void) { return error_text; }

/* What generated code calls when an argument check fails; also set as the hook of loaded libraries. */
EXPORT void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  char text[sizeof error_text];
  size_t used = (size_t)snprintf(text, sizeof text, "%s: ", kind ? kind : "Error");
  for (int32_t i = 0; i < count && used < sizeof text; ++i)
    if (parts[i]) used += (size_t)snprintf(text + used, sizeof text - used, "%s", parts[i]);
  set_error(text);
}

/* ---- thread pool ---- */

/* Takes a task of a stretch of generation `generation`, its first or its last one; -1 when none is left or a newer
 * region has begun. The region cannot end before a task that was taken is done. */
static int take_task(Stretch* stretch, uint32_t generation, int last) {
  uint64_t word = atomic_load_explicit(&stretch->tasks, memory_order_acquire);
  for (;;) {
    uint32_t next = word & 0xffff, end = word >> 16 & 0xffff;
    if ((uint32_t)(word >> 32) != generation || next >= end) return -1;
    if (atomic_compare_exchange_weak_explicit(&stretch->tasks, &word, last ? word - (1 << 16) : word + 1,
                                              memory_order_acq_rel, memory_order_acquire))
      return (int)(last ? end - 1 : next);
  }
}

static void run_tasks(uint32_t generation, int thread) {
  inside_region = 1;
  for (int i = 0; i < (pool.own ? 1 : pool.threads); ++i) {
    Stretch* stretch = &pool.stretches[(thread + i) % pool.threads];
    for (int task; (task = take_task(stretch, generation, i > 0)) >= 0;) {
      if (pool.fn(task, &pool.group, pool.closure) != 0) atomic_store(&pool.failed, 1);
      atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
    }
  }
  inside_region = 0;
}

static void wait_for_generation(uint32_t seen) {
  int64_t deadline = now_ns() + SPIN_NS;
  for (unsigned spins = 1; atomic_load_explicit(&pool.generation, memory_order_acquire) == seen; ++spins) {
    RELAX();
    if (spins % 1024 || now_ns() < deadline) continue;
    atomic_fetch_add(&pool.sleepers, 1);
    if (atomic_load(&pool.generation) == seen) syscall(SYS_futex, &pool.generation, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
    atomic_fetch_sub(&pool.sleepers, 1);
  }
}

static void* worker_main(void* start) { /* generation << 32 | thread */
  uint32_t seen = (uint32_t)((uintptr_t)start >> 32);
  int thread = (int)(uint32_t)(uintptr_t)start;
  fp_enter();
  for (;;) {
    wait_for_generation(seen);
    seen = atomic_load_explicit(&pool.generation, memory_order_acquire);
    if (atomic_load_explicit(&pool.stopping, memory_order_acquire)) return NULL;
    run_tasks(seen, thread);
  }
}

static void announce(void) {
  atomic_fetch_add(&pool.generation, 1);
  if (atomic_load(&pool.sleepers)) syscall(SYS_futex, &pool.generation, FUTEX_WAKE_PRIVATE, MAX_THREADS, 0, 0, 0);
}

static int run_here(TaskFn fn, void* closure, int tasks) {
  TaskGroup group = {NULL, tasks};
  for (int task = 0; task < tasks; ++task)
    if (fn(task, &group, closure) != 0) return -1;
  return 0;
}

static int run_region(TaskFn fn, void* closure, int tasks, int own) {
  uint32_t generation = atomic_load_explicit(&pool.generation, memory_order_relaxed) + 1;
  pool.fn = fn;
  pool.closure = closure;
  pool.group = (TaskGroup){NULL, tasks};
  pool.own = own;
  atomic_store_explicit(&pool.failed, 0, memory_order_relaxed);
  atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
  for (int i = 0; i < pool.threads; ++i) {
    uint64_t next = (uint64_t)tasks * i / pool.threads, end = (uint64_t)tasks * (i + 1) / pool.threads;
    atomic_store_explicit(&pool.stretches[i].tasks, (uint64_t)generation << 32 | end << 16 | next, memory_order_release);
  }
  announce();
  run_tasks(generation, 0);
  for (unsigned spins = 1; atomic_load_explicit(&pool.done, memory_order_acquire) != tasks; ++spins) {
    if (spins % 4096) RELAX(); else sched_yield();
  }
  return atomic_load(&pool.failed) ? -1 : 0;
}

static int parallel_launch(TaskFn fn, void* closure, int num_task) {
  if (pool.threads <= 1 || inside_region) return run_here(fn, closure, num_task > 0 ? num_task : 1);
  int tasks = num_task > 0 ? num_task : pool.threads * TASKS_PER_THREAD;
  return tasks > MOST_TASKS ? run_here(fn, closure, tasks) : run_region(fn, closure, tasks, 0);
}

/* Tasks are handed out dynamically and may outnumber threads, so they cannot meet at a barrier. No kernel of ours asks. */
static int parallel_barrier(int task, TaskGroup* group) {
  (void)task;
  if (group->num_task <= 1) return 0;
  set_error("a kernel asked for a barrier inside a parallel region, which this host does not offer");
  return -1;
}

static void* workspace_alloc(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static int workspace_free(int device, int id, void* pointer) {
  (void)device, (void)id;
  free(pointer);
  return 0;
}

/* ---- life of the pool ---- */

static void after_fork(void) {
  if (pool.threads > 1) atomic_store(&forked, 1);
  pthread_mutex_init(&run_lock, NULL);
  pthread_mutex_init(&error_lock, NULL);
}

static int nth_cpu(const cpu_set_t* allowed, int n) {
  int count = CPU_COUNT(allowed);
  for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, allowed) && seen++ == n % count) return cpu;
  return 0;
}

static cpu_set_t one_cpu(const cpu_set_t* allowed, int n) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(nth_cpu(allowed, n), &one);
  return one;
}

/* Binds the thread that runs regions now, and sets the one before free. */
static void pin_caller(void) {
  pid_t self = (pid_t)syscall(SYS_gettid);
  if (!pool.pinned || self == pool.caller) return;
  cpu_set_t first = one_cpu(&pool.allowed, 0);
  if (pool.caller) sched_setaffinity(pool.caller, sizeof pool.allowed, &pool.allowed);
  sched_setaffinity(self, sizeof first, &first);
  pool.caller = self;
}

EXPORT void qcn_host_shutdown(void) {
  pthread_mutex_lock(&run_lock);
  if (!atomic_load(&forked)) { /* after fork() the workers live in the parent only */
    atomic_store(&pool.stopping, 1);
    announce();
    for (int i = 1; i < pool.threads; ++i) pthread_join(pool.workers[i], NULL);
  }
  if (pool.caller) sched_setaffinity(pool.caller, sizeof pool.allowed, &pool.allowed);
  pool.pinned = pool.caller = 0;
  pool.threads = 0;
  atomic_store(&pool.stopping, 0);
  atomic_store(&pool.sleepers, 0);
  atomic_store(&forked, 0);
  pthread_mutex_unlock(&run_lock);
}

static int start_workers(int n_threads, const cpu_set_t* allowed, int pinned) {
  uint64_t generation = atomic_load(&pool.generation);
  for (pool.threads = 1; pool.threads < n_threads; ++pool.threads) {
    int i = pool.threads;
    if (pthread_create(&pool.workers[i], NULL, worker_main, (void*)(generation << 32 | (uint64_t)i)) != 0) return 1;
    cpu_set_t one = one_cpu(allowed, i);
    if (pinned) pthread_setaffinity_np(pool.workers[i], sizeof one, &one);
  }
  return 0;
}

/* Starts n_threads - 1 workers; the thread that calls qcn_host_run is the first. With `pin_threads` the workers and the
 * calling thread, of qcn_host_run later on, are bound to one allowed core each until shutdown. Returns 0, or 1 with qcn_host_error set. */
EXPORT int qcn_host_init(int n_threads, int pin_threads) {
  static int watching_forks;
  clear_error();
  if (n_threads < 1 || n_threads > MAX_THREADS) return set_error("qcn_host_init: threads must be 1 to 512"), 1;
  if (atomic_load(&forked)) qcn_host_shutdown();
  if (pool.threads == n_threads) return 0;
  if (pool.threads) return set_error("qcn_host_init: running with another thread count; call qcn_host_shutdown"), 1;
  if (!watching_forks && pthread_atfork(NULL, NULL, after_fork) == 0) watching_forks = 1;
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  if (start_workers(n_threads, &allowed, pin_threads)) {
    qcn_host_shutdown();
    return set_error("qcn_host_init: the system refused another thread; lower the thread count"), 1;
  }
  pool.pinned = pin_threads;
  pool.allowed = allowed;
  pin_caller();
  return 0;
}

/* ---- libraries ---- */

static void set_hook(void* library, const char* name, void* value) {
  void** slot = dlsym(library, name);
  if (slot) *slot = value;
}

/* Opens a kernel library and connects it to this host. NULL with qcn_host_error set when it cannot be loaded. */
EXPORT void* qcn_host_load(const char* path) {
  clear_error();
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return set_error(dlerror()), NULL;
  set_hook(library, "__TVMBackendParallelLaunch", (void*)parallel_launch);
  set_hook(library, "__TVMBackendParallelBarrier", (void*)parallel_barrier);
  set_hook(library, "__TVMBackendAllocWorkspace", (void*)workspace_alloc);
  set_hook(library, "__TVMBackendFreeWorkspace", (void*)workspace_free);
  set_hook(library, "qcn_raise_hook", (void*)(RaiseFn)TVMFFIErrorSetRaisedFromCStrParts);
  return library;
}

/* A kernel by its plain name, or NULL. */
EXPORT void* qcn_host_symbol(void* library, const char* name) {
  char symbol[4096];
  if (snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", name) >= (int)sizeof symbol) return NULL;
  return dlsym(library, symbol);
}

/* ---- running ---- */

static int run_all(const QcnLaunch* launches, int n, double* seconds) {
  for (int i = 0; i < n; ++i) {
    int64_t start = seconds ? now_ns() : 0;
    QcnAny result = {0, 0, {0}};
    if (launches[i].fn(NULL, launches[i].args, launches[i].n_args, &result) != 0) return i + 1;
    if (seconds) seconds[i] = (double)(now_ns() - start) * 1e-9;
  }
  return 0;
}

static int not_ready(void) {
  clear_error();
  if (pool.threads == 0) return set_error("qcn_host_run: call qcn_host_init first"), 1;
  if (atomic_load(&forked)) return set_error("qcn_host_run: threads do not survive fork(); call qcn_host_init"), 1;
  return 0;
}

/* `count` regions, for memory.c: one task a thread when `own`, else as many as a kernel has. */
int qcn_host_regions(TaskFn fn, void* closure, int own, int count) {
  if (not_ready()) return 1;
  pthread_mutex_lock(&run_lock);
  pin_caller();
  int failed = 0;
  for (int i = 0; i < count && !failed; ++i)
    failed = own && pool.threads > 1 ? run_region(fn, closure, pool.threads, 1) : parallel_launch(fn, closure, 0);
  pthread_mutex_unlock(&run_lock);
  return failed != 0;
}

/* Runs launches in order. Calls from several threads take turns. Returns 0, or 1 + index of the launch that failed. */
EXPORT int qcn_host_run(const QcnLaunch* launches, int n, double* seconds) {
  if (not_ready()) return 1;
  pthread_mutex_lock(&run_lock);
  pin_caller();
  unsigned fp = fp_enter();
  int failed = run_all(launches, n, seconds);
  fp_leave(fp);
  pthread_mutex_unlock(&run_lock);
  if (failed) set_error("a kernel failed without a message");
  return failed;
}
