// Preloaded before Python: makes the n-th allocation fail that the core, or any code in its process, requests.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long countdown;  // 0: disarmed or done
static atomic_long live;       // bytes that are allocated now
static int every_library;

// The n-th allocation from now on fails. Counts those of all libraries, or only those of the core and of the C++
// library on its behalf.
void failing_malloc_arm(long n, int all_libraries) {
  every_library = all_libraries;
  atomic_store(&countdown, n);
}

// Returns whether the allocation was reached.
int failing_malloc_disarm(void) { return atomic_exchange(&countdown, 0) <= 0; }

long failing_malloc_live(void) { return atomic_load(&live); }

// OpenMP's runtime ends the process when it gets no memory, which cannot be prevented.
static int counts(void *caller) {
  Dl_info info;
  if (!dladdr(caller, &info) || !info.dli_fname) return 0;
  const char *slash = strrchr(info.dli_fname, '/');
  const char *name = slash ? slash + 1 : info.dli_fname;
  if (!strncmp(name, "_core", 5) || !strncmp(name, "libstdc++", 9)) return 1;
  return every_library && strncmp(name, "libgomp", 7) && strncmp(name, "libc.", 5) && strncmp(name, "ld-", 3);
}

static int fails(void *caller) {
  if (atomic_load(&countdown) <= 0 || !counts(caller)) return 0;
  return atomic_fetch_sub(&countdown, 1) == 1;
}

static void *taken(void *p) {
  if (p) atomic_fetch_add(&live, (long)malloc_usable_size(p));
  else errno = ENOMEM;
  return p;
}

void free(void *p) {
  if (p) atomic_fetch_sub(&live, (long)malloc_usable_size(p));
  __libc_free(p);
}

void *malloc(size_t size) {
  return taken(fails(__builtin_return_address(0)) ? NULL : __libc_malloc(size));
}

void *calloc(size_t count, size_t size) {
  return taken(fails(__builtin_return_address(0)) ? NULL : __libc_calloc(count, size));
}

void *realloc(void *old, size_t size) {
  if (fails(__builtin_return_address(0))) return errno = ENOMEM, NULL;
  const long before = old ? (long)malloc_usable_size(old) : 0;
  void *p = __libc_realloc(old, size);
  if (p || size == 0) atomic_fetch_sub(&live, before);
  return taken(p);
}

void *aligned_alloc(size_t alignment, size_t size) {
  return taken(fails(__builtin_return_address(0)) ? NULL : __libc_memalign(alignment, size));
}

int posix_memalign(void **p, size_t alignment, size_t size) {
  *p = taken(fails(__builtin_return_address(0)) ? NULL : __libc_memalign(alignment, size));
  return *p ? 0 : ENOMEM;
}
