// Counts allocations by the hooks of Address Sanitizer; without it they are not there, and nothing is counted.
#include "CFuzzer.h"
#include <stdatomic.h>

extern int __sanitizer_install_malloc_and_free_hooks(
    void (*on_malloc)(const volatile void *, size_t), void (*on_free)(const volatile void *)) __attribute__((weak));
extern size_t __sanitizer_get_allocated_size(const volatile void *) __attribute__((weak));

static atomic_int counting, installed;
static atomic_long live, peak;

static void on_malloc(const volatile void *block, size_t size) {
  (void)block;
  if (!atomic_load_explicit(&counting, memory_order_relaxed)) return;
  long now = atomic_fetch_add_explicit(&live, (long)size, memory_order_relaxed) + (long)size;
  long most = atomic_load_explicit(&peak, memory_order_relaxed);
  while (now > most && !atomic_compare_exchange_weak(&peak, &most, now)) {}
}

static void on_free(const volatile void *block) {
  if (!block || !atomic_load_explicit(&counting, memory_order_relaxed)) return;
  atomic_fetch_sub_explicit(&live, (long)__sanitizer_get_allocated_size(block), memory_order_relaxed);
}

void mg_fuzz_begin_counting(void) {
  if (!__sanitizer_install_malloc_and_free_hooks) return;
  if (!atomic_exchange(&installed, 1)) __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
  atomic_store(&live, 0);
  atomic_store(&peak, 0);
  atomic_store(&counting, 1);
}

size_t mg_fuzz_end_counting(void) {
  atomic_store(&counting, 0);
  return (size_t)atomic_load(&peak);
}
