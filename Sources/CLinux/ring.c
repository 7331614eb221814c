#define _GNU_SOURCE
#include "CLinux.h"

#include <errno.h>
#include <features.h>
#include <liburing.h>
#include <stdlib.h>

struct mg_ring {
    struct io_uring uring;
};

int mg_ring_create(unsigned entries, mg_ring **ring) {
    mg_ring *made = calloc(1, sizeof *made);
    if (!made) return -ENOMEM;
    int error = io_uring_queue_init(entries, &made->uring, 0);
    if (error < 0) {
        free(made);
        return error;
    }
    io_uring_ring_dontfork(&made->uring);
    *ring = made;
    return 0;
}

void mg_ring_destroy(mg_ring *ring) {
    io_uring_queue_exit(&ring->uring);
    free(ring);
}

int mg_ring_fd(const mg_ring *ring) { return ring->uring.ring_fd; }

_Bool mg_ring_readv(mg_ring *ring, int fd, const void *iovecs, unsigned count, uint64_t offset, _Bool away,
                     uint64_t data) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
    if (!sqe) return 0;
    io_uring_prep_readv(sqe, fd, iovecs, count, offset);
    if (away) sqe->flags |= IOSQE_ASYNC;
    io_uring_sqe_set_data64(sqe, data);
    return 1;
}

_Bool mg_ring_writev(mg_ring *ring, int fd, const void *iovecs, unsigned count, uint64_t offset, _Bool away,
                     uint64_t data) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
    if (!sqe) return 0;
    io_uring_prep_writev(sqe, fd, iovecs, count, offset);
    if (away) sqe->flags |= IOSQE_ASYNC;
    io_uring_sqe_set_data64(sqe, data);
    return 1;
}

_Bool mg_ring_fsync(mg_ring *ring, int fd, _Bool data_only, uint64_t data) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
    if (!sqe) return 0;
    io_uring_prep_fsync(sqe, fd, data_only ? IORING_FSYNC_DATASYNC : 0);
    io_uring_sqe_set_data64(sqe, data);
    return 1;
}

int mg_ring_submit(mg_ring *ring) { return io_uring_submit(&ring->uring); }

unsigned mg_ring_reap(mg_ring *ring, mg_completion *completions, unsigned limit) {
    unsigned n = 0;
    struct io_uring_cqe *cqe;
    while (n < limit && io_uring_peek_cqe(&ring->uring, &cqe) == 0 && cqe) {
        completions[n].data = io_uring_cqe_get_data64(cqe);
        completions[n].result = cqe->res;
        io_uring_cqe_seen(&ring->uring, cqe);
        n++;
    }
    return n;
}
