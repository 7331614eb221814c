#define _GNU_SOURCE
#include "CLinux.h"

#include <malloc.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

_Static_assert(MG_EPOLL_ADD == EPOLL_CTL_ADD && MG_EPOLL_DELETE == EPOLL_CTL_DEL, "epoll_ctl operations");
_Static_assert(MG_EPOLL_MODIFY == EPOLL_CTL_MOD, "epoll_ctl operations");
_Static_assert(MG_EPOLL_READABLE == EPOLLIN && MG_EPOLL_WRITABLE == EPOLLOUT, "epoll bits");
_Static_assert(MG_EPOLL_HANGUP == (EPOLLRDHUP | EPOLLHUP | EPOLLERR) && MG_EPOLL_EDGE == EPOLLET, "epoll bits");

int mg_epoll_create(void) {
    int fd = epoll_create1(EPOLL_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int mg_epoll_control(int epoll, int operation, int fd, uint32_t events, uint64_t data) {
    struct epoll_event event = {.events = events, .data.u64 = data};
    return epoll_ctl(epoll, operation, fd, &event) < 0 ? -errno : 0;
}

int mg_epoll_wait(int epoll, mg_event *events, int limit, int64_t timeout_ns) {
    struct epoll_event ready[128];
    if (limit > 128) limit = 128;
    int n;
    if (timeout_ns <= 0) {
        n = epoll_wait(epoll, ready, limit, timeout_ns < 0 ? -1 : 0);
    } else {
        struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
        n = epoll_pwait2(epoll, ready, limit, &timeout, NULL);
        if (n < 0 && (errno == ENOSYS || errno == EPERM)) {  // before Linux 5.11, or a sandbox that does not know it
            int64_t ms = timeout_ns / 1000000 + (timeout_ns % 1000000 != 0);
            n = epoll_wait(epoll, ready, limit, ms > 3600000 ? 3600000 : (int)ms);
        }
    }
    if (n < 0) return errno == EINTR ? 0 : -errno;
    for (int i = 0; i < n; i++) {
        events[i].data = ready[i].data.u64;
        events[i].events = ready[i].events;
    }
    return n;
}

int mg_eventfd(void) {
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

void mg_eventfd_signal(int fd) {
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR) {}
}

int mg_thread_start(void *(*body)(void *), void *argument, size_t stack_bytes, const char *name, unsigned long *thread) {
    pthread_attr_t attributes;
    int error = pthread_attr_init(&attributes);
    if (error) return -error;
    error = pthread_attr_setstacksize(&attributes, stack_bytes);

    // What a fault in the thread itself raises stays deliverable; the rest is for the thread that asks for it.
    sigset_t blocked, before;
    sigfillset(&blocked);
    const int kept[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT, SIGPROF};
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) sigdelset(&blocked, kept[i]);
    pthread_sigmask(SIG_BLOCK, &blocked, &before);
    pthread_t started;
    if (!error) error = pthread_create(&started, &attributes, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error) return -error;

    char cut[16];
    strncpy(cut, name, sizeof cut - 1);
    cut[sizeof cut - 1] = 0;
    pthread_setname_np(started, cut);
    *thread = started;
    return 0;
}

int mg_thread_join(unsigned long thread) { return -pthread_join((pthread_t)thread, NULL); }
int mg_thread_detach(unsigned long thread) { return -pthread_detach((pthread_t)thread); }

static _Thread_local void *thread_loop;
void *mg_thread_loop(void) { return thread_loop; }
void mg_thread_set_loop(void *loop) { thread_loop = loop; }

static sigset_t signal_set(const int *signals, int count) {
    sigset_t set;
    sigemptyset(&set);
    for (int i = 0; i < count; i++) sigaddset(&set, signals[i]);
    return set;
}

int mg_signals_block(const int *signals, int count) {
    sigset_t set = signal_set(signals, count);
    return -pthread_sigmask(SIG_BLOCK, &set, NULL);
}

int mg_signalfd(const int *signals, int count) {
    sigset_t set = signal_set(signals, count);
    int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

int mg_signalfd_next(int fd) {
    struct signalfd_siginfo info;
    ssize_t n;
    while ((n = read(fd, &info, sizeof info)) < 0 && errno == EINTR) {}
    return n == sizeof info ? (int)info.ssi_signo : 0;
}

uint64_t mg_monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t mg_boottime_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int64_t mg_realtime_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void mg_random(void *data, size_t length) {
    unsigned char *next = data;
    while (length) {
        ssize_t n = getrandom(next, length, 0);
        if (n < 0) {
            if (errno == EINTR) continue;
            abort();
        }
        next += n;
        length -= (size_t)n;
    }
}

void mg_limit_heaps(int count) { mallopt(M_ARENA_MAX, count); }

void mg_trim_heap(void) { malloc_trim(0); }

int mg_lock_exclusively(int fd) {
    int result;
    while ((result = flock(fd, LOCK_EX | LOCK_NB)) < 0 && errno == EINTR) {}
    return result < 0 ? -errno : 0;
}

int mg_accept(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) < 0 && errno == EINTR) {}
    return fd < 0 ? -errno : fd;
}

int mg_peer_process(int fd, unsigned *uid) {
    struct ucred peer;
    socklen_t length = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0) return -errno;
    *uid = peer.uid;
    return (int)peer.pid;
}
