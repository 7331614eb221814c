// What Glibc's Swift module leaves out: Linux-only calls and function-like macros, as plain functions.
#ifndef MARGARINE_CLINUX_H
#define MARGARINE_CLINUX_H

#include <stdint.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/// CRC-32C (Castagnoli) of `length` bytes, continuing from `crc` (0 to begin). What btrfs calls csum type 0.
uint32_t mg_crc32c(uint32_t crc, const void *data, size_t length);

// Threads.

/// Names the calling thread, at most 15 bytes of it, for `top -H` and debuggers.
void mg_name_thread(const char *name);

// ---- Runtime: threads, polling, signals (linux.c). Where nothing else is said: -errno on failure.

/// A ready descriptor: the number given to `mg_epoll_control`, and EPOLL bits.
typedef struct {
    uint64_t data;
    uint32_t events;
} mg_event;

#define MG_EPOLL_ADD 1
#define MG_EPOLL_DELETE 2
#define MG_EPOLL_MODIFY 3
/// EPOLLIN, EPOLLOUT, EPOLLRDHUP | EPOLLHUP | EPOLLERR, EPOLLET.
#define MG_EPOLL_READABLE 0x001u
#define MG_EPOLL_WRITABLE 0x004u
#define MG_EPOLL_HANGUP 0x2018u
#define MG_EPOLL_EDGE 0x80000000u

int mg_epoll_create(void);
int mg_epoll_control(int epoll, int operation, int fd, uint32_t events, uint64_t data);
/// At most `limit` (128 or fewer) events; waits up to `timeout_ns`, for ever if negative. 0 when interrupted.
int mg_epoll_wait(int epoll, mg_event *events, int limit, int64_t timeout_ns);
/// A non-blocking eventfd.
int mg_eventfd(void);
void mg_eventfd_signal(int fd);

/// Starts a joinable thread with every asynchronous signal blocked; `name` is cut at 15 bytes.
int mg_thread_start(void *(*body)(void *), void *argument, size_t stack_bytes, const char *name, unsigned long *thread);
int mg_thread_join(unsigned long thread);
int mg_thread_detach(unsigned long thread);
/// A pointer of the calling thread: its loop.
void *mg_thread_loop(void);
void mg_thread_set_loop(void *loop);

/// Blocks the signals for the calling thread and those it starts.
int mg_signals_block(const int *signals, int count);
/// A non-blocking signalfd for blocked signals.
int mg_signalfd(const int *signals, int count);
/// The next signal that came, 0 if none.
int mg_signalfd_next(int fd);

uint64_t mg_monotonic_ns(void);
/// CLOCK_BOOTTIME: monotonic, and goes on while the machine is suspended.
uint64_t mg_boottime_ns(void);
int64_t mg_realtime_ms(void);
/// Fills all of `data` from the kernel's random source; crashes if there is none.
void mg_random(void *data, size_t length);
/// Lets all threads share so many heaps: memory that one has freed is then had by the others. Before threads are started.
void mg_limit_heaps(int count);
/// Gives free memory of the heap back to the system. Takes milliseconds.
void mg_trim_heap(void);
/// flock(LOCK_EX | LOCK_NB).
int mg_lock_exclusively(int fd);

/// A connected socket, non-blocking and close-on-exec. -EAGAIN if none waits.
int mg_accept(int listener);
/// Process id of a unix socket's peer when it connected, 0 where it is in a PID namespace that cannot be seen from here, and its
/// user; a negative errno.
int mg_peer_process(int fd, unsigned *uid);

// ---- Runtime: io_uring (ring.c)

typedef struct mg_ring mg_ring;

typedef struct {
    uint64_t data;
    int32_t result;
} mg_completion;

/// A ring of `entries` requests; its descriptor (`mg_ring_fd`) polls readable while completions wait.
int mg_ring_create(unsigned entries, mg_ring **ring);
void mg_ring_destroy(mg_ring *ring);
int mg_ring_fd(const mg_ring *ring);
/// Queue one request for the next submit; false when the queue is full. With `away` a kernel thread makes the copy, not
/// the submitting one.
_Bool mg_ring_readv(mg_ring *ring, int fd, const void *iovecs, unsigned count, uint64_t offset, _Bool away,
                     uint64_t data);
_Bool mg_ring_writev(mg_ring *ring, int fd, const void *iovecs, unsigned count, uint64_t offset, _Bool away,
                     uint64_t data);
_Bool mg_ring_fsync(mg_ring *ring, int fd, _Bool data_only, uint64_t data);
/// One io_uring_enter for all queued requests; gives how many were taken.
int mg_ring_submit(mg_ring *ring);
/// Takes up to `limit` completions; never waits.
unsigned mg_ring_reap(mg_ring *ring, mg_completion *completions, unsigned limit);

#ifdef __cplusplus
}
#endif
#endif
