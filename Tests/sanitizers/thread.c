// Tells Thread Sanitizer what it cannot see in libraries that are not instrumented. Scripts/sanitize.sh loads this in front of
// them. Without it every contended Mutex and every resumed task would be reported.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>

#define SWIFT __attribute__((swiftcall))
#define SELF __attribute__((swift_context))

void __tsan_acquire(void *) __attribute__((weak));
void __tsan_release(void *) __attribute__((weak));

// Tasks. The runtime tells of each switch from thread to thread where it finds these set (stdlib/public/runtime/
// ThreadSanitizer.cpp). Its own way to set them is a function that a program linked with the sanitizer has as well.

static void *awaitNext __asm__("awaitNext") __attribute__((used));

__attribute__((constructor)) static void enable(void) {
  awaitNext = dlsym(RTLD_NEXT, "swift_continuation_await");
  _Bool *enabled = dlsym(RTLD_DEFAULT, "_swift_tsan_enabled");
  void (**acquire)(void *) = dlsym(RTLD_DEFAULT, "_swift_tsan_acquire");
  void (**release)(void *) = dlsym(RTLD_DEFAULT, "_swift_tsan_release");
  if (!__tsan_acquire || !enabled || !acquire || !release) return;
  *acquire = __tsan_acquire;
  *release = __tsan_release;
  *enabled = 1;
}

// What it does not tell of: a continuation that was resumed before it is awaited, where the task goes on at once. Its result
// is held against the task, so the task is taken where it is seen to be resumed (the status of a ContinuationAsyncContext is its
// fourth word, 2: resumed), and where it goes on after all. A resumption in the few instructions between is missed.

void *swift_task_getCurrent(void) __attribute__((weak));

static void acquireTask(void) __asm__("acquireTask") __attribute__((used));
static void acquireTask(void) {
  void *task = swift_task_getCurrent ? swift_task_getCurrent() : 0;
  if (task && __tsan_acquire) __tsan_acquire(task);
}

// An asynchronous function of Swift: its registers and its stack are left as they came.
__asm__(
    ".globl swift_continuation_await\n"
    ".type swift_continuation_await, @function\n"
    "swift_continuation_await:\n"
    "  cmpq $2, 24(%rdi)\n  jne 1f\n"
    "  push %rbp\n  mov %rsp, %rbp\n  push %rdi\n  push %rsi\n  and $-16, %rsp\n"
    "  call acquireTask\n"
    "  lea -16(%rbp), %rsp\n  pop %rsi\n  pop %rdi\n  pop %rbp\n"
    "1: jmp *awaitNext(%rip)\n");

void swift_task_enterThreadLocalContext(char *context) {
  static void (*next)(char *);
  if (!next) next = (void (*)(char *))dlsym(RTLD_NEXT, "swift_task_enterThreadLocalContext");
  next(context);
  acquireTask();
}

// Mutex. Its fast path is inlined and seen; the path taken where two threads meet is in libswiftSynchronization
// (stdlib/public/Synchronization/Mutex/LinuxImpl.swift).

typedef SWIFT void (*LockSlow)(uint32_t, SELF void *);
typedef SWIFT void (*UnlockSlow)(SELF void *);

SWIFT void lockSlow(uint32_t thread, SELF void *self) __asm__("$s15Synchronization12_MutexHandleV9_lockSlowyys6UInt32VF");
SWIFT void unlockSlow(SELF void *self) __asm__("$s15Synchronization12_MutexHandleV11_unlockSlowyyF");

SWIFT void lockSlow(uint32_t thread, SELF void *self) {
  static LockSlow next;
  if (!next) next = (LockSlow)dlsym(RTLD_NEXT, "$s15Synchronization12_MutexHandleV9_lockSlowyys6UInt32VF");
  next(thread, self);
  if (__tsan_acquire) __tsan_acquire(self);
}

SWIFT void unlockSlow(SELF void *self) {
  static UnlockSlow next;
  if (!next) next = (UnlockSlow)dlsym(RTLD_NEXT, "$s15Synchronization12_MutexHandleV11_unlockSlowyyF");
  if (__tsan_release) __tsan_release(self);
  next(self);
}
