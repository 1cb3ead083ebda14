/* Runs kernels of a build where Python is not: run_kernels HOST KERNELS FILE SYMBOL ARGUMENTS [SYMBOL ARGUMENTS ...]
 *
 * FILE holds a buffer after the other: int64 bytes, then the bytes. ARGUMENTS are their numbers, as in 0,3,1. The buffers
 * are written back to FILE when all kernels have run. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { int32_t type_index, padding; void* pointer; } Any;
typedef struct { void* function; const Any* args; int32_t n_args, reserved; } Launch;
enum { MOST = 64, POINTER = 4 };

static void* buffers[MOST];
static int64_t sizes[MOST];

static int fail(const char* what) {
  fprintf(stderr, "%s\n", what ? what : "no reason given");
  return 1;
}

static int read_buffers(const char* path) {
  FILE* file = fopen(path, "rb");
  int count = 0;
  for (; file && count < MOST && fread(&sizes[count], 8, 1, file) == 1; ++count) {
    buffers[count] = aligned_alloc(64, (size_t)(sizes[count] + 127) / 64 * 64);
    if (fread(buffers[count], 1, (size_t)sizes[count], file) != (size_t)sizes[count]) return 0;
  }
  if (file) fclose(file);
  return count;
}

int main(int argc, char** argv) {
  void* host = argc > 5 ? dlopen(argv[1], RTLD_NOW) : NULL;
  if (!host) return fail(argc > 5 ? dlerror() : "too few arguments");
  int (*init)(int, int) = (int (*)(int, int))dlsym(host, "qcn_host_init");
  void* (*load)(const char*) = (void* (*)(const char*))dlsym(host, "qcn_host_load");
  void* (*symbol)(void*, const char*) = (void* (*)(void*, const char*))dlsym(host, "qcn_host_symbol");
  int (*run)(const Launch*, int, double*) = (int (*)(const Launch*, int, double*))dlsym(host, "qcn_host_run");
  const char* (*error)(void) = (const char* (*)(void))dlsym(host, "qcn_host_error");
  int count = read_buffers(argv[3]);
  void* kernels = init(2, 0) == 0 ? load(argv[2]) : NULL;
  if (!kernels || !count) return fail(kernels ? "no buffers" : error());
  for (int at = 4; at + 1 < argc; at += 2) {
    Any args[MOST];
    Launch launch = {symbol(kernels, argv[at]), args, 0, 0};
    for (char* word = argv[at + 1]; *word; word += *word == ',')
      args[launch.n_args++] = (Any){POINTER, 0, buffers[strtol(word, &word, 10)]};
    if (!launch.function || run(&launch, 1, NULL) != 0) return fail(launch.function ? error() : argv[at]);
  }
  FILE* file = fopen(argv[3], "wb");
  for (int i = 0; i < count; ++i) {
    fwrite(&sizes[i], 8, 1, file);
    fwrite(buffers[i], 1, (size_t)sizes[i], file);
  }
  return fclose(file);
}
