// Preloaded before Python: counts what anybody in the process asks of the heap, and what of it the core asks.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static atomic_int counting;
static atomic_long total, core;

void counting_malloc_start(void) {
  atomic_store(&total, 0);
  atomic_store(&core, 0);
  atomic_store(&counting, 1);
}

void counting_malloc_stop(long counts[2]) {
  atomic_store(&counting, 0);
  counts[0] = atomic_load(&total);
  counts[1] = atomic_load(&core);
}

// The core's own calls, and the C++ library's, which it makes on behalf of the core.
static int is_core(void *caller) {
  Dl_info info;
  if (!dladdr(caller, &info) || !info.dli_fname) return 0;
  const char *slash = strrchr(info.dli_fname, '/');
  const char *name = slash ? slash + 1 : info.dli_fname;
  return !strncmp(name, "_core", 5) || !strncmp(name, "libstdc++", 9);
}

static void count(void *caller) {
  if (!atomic_load(&counting)) return;
  atomic_fetch_add(&total, 1);
  if (is_core(caller)) atomic_fetch_add(&core, 1);
}

void *malloc(size_t size) {
  count(__builtin_return_address(0));
  return __libc_malloc(size);
}

void *calloc(size_t number, size_t size) {
  count(__builtin_return_address(0));
  return __libc_calloc(number, size);
}

void *realloc(void *old, size_t size) {
  count(__builtin_return_address(0));
  return __libc_realloc(old, size);
}

void *aligned_alloc(size_t alignment, size_t size) {
  count(__builtin_return_address(0));
  return __libc_memalign(alignment, size);
}

int posix_memalign(void **p, size_t alignment, size_t size) {
  count(__builtin_return_address(0));
  *p = __libc_memalign(alignment, size);
  return *p ? 0 : ENOMEM;
}
