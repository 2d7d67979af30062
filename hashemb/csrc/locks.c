/* Byte-range locks between processes, on the file `lock`. They belong to the open file description (Linux OFD locks),
 * so two tables opened in one process exclude each other as well, and the kernel drops them when their holder dies. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>

#include "portability.h"
#include "sharing.h"

/* `kind` is F_RDLCK, F_WRLCK or F_UNLCK; a length of 0 extends to the largest offset. Returns 0 or an errno: EAGAIN if
 * another holds the lock and `wait` is 0, EINTR if a signal arrived first. */
int he_lock(int fd, int kind, int64_t begin, int64_t length, int wait) {
    struct flock request = {.l_type = (short)kind, .l_whence = SEEK_SET, .l_start = begin, .l_len = length};
    if (!fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &request)) return 0;
    return errno == EACCES ? EAGAIN : errno;
}

/* Like he_lock, but spins first: locks are usually released within 0.1 ms, about the cost of a wake-up. */
int he_lock_spinning(int fd, int kind, int64_t begin, int64_t length) {
    int error = EAGAIN;
    for (int i = 0; i < 64 && error == EAGAIN; i++) {
        error = he_lock(fd, kind, begin, length, 0);
        for (int j = 0; j < 32 && error == EAGAIN; j++) he_pause();
    }
    return error == EAGAIN ? he_lock(fd, kind, begin, length, 1) : error;
}

/* For the middle of a batch, which cannot be abandoned: waits through signals and through a lack of lock records. */
void he_lock_retrying(int fd, int kind, int64_t begin, int64_t length) {
    const struct timespec pause = {0, 1000000};
    int error;
    while ((error = he_lock_spinning(fd, kind, begin, length)))
        if (error != EINTR) nanosleep(&pause, NULL);
}

/* A batch holds the gate shared from its first mark to its last row. A process that wants it exclusively sets a flag in
 * the control page and holds the turnstile meanwhile: otherwise overlapping batches would keep the gate shared for
 * ever.
 *
 * This function never waits: it returns HE_GATE_CLOSED, on which the caller releases everything and calls he_gate_look;
 * `waited` records that this has been done. */
int he_gate_enter(const he_control *c, int fd, int waited) {
    if (!waited && __atomic_load_n(&c->gate_closing, __ATOMIC_ACQUIRE)) return HE_GATE_CLOSED;
    const int error = he_lock(fd, F_RDLCK, HE_LOCK_GATE, 1, 0);
    return error == EAGAIN ? HE_GATE_CLOSED : error;
}

/* Looks for 0.1 ms whether the gate has been opened, as most are closed for less. Returns 0, EAGAIN or an errno. */
int he_gate_look(int fd) {
    int error = EAGAIN;
    for (int i = 0; i < 64 && error == EAGAIN; i++) {
        error = he_lock(fd, F_RDLCK, HE_LOCK_TURNSTILE, 1, 0);
        for (int j = 0; j < 32 && error == EAGAIN; j++) he_pause();
    }
    if (!error) he_lock(fd, F_UNLCK, HE_LOCK_TURNSTILE, 1, 0);
    return error;
}

void he_gate_leave(int fd) { he_lock(fd, F_UNLCK, HE_LOCK_GATE, 1, 0); }

int he_gate_close(he_control *c, int fd) {
    int error = he_lock(fd, F_WRLCK, HE_LOCK_TURNSTILE, 1, 1);
    if (error) return error;
    __atomic_store_n(&c->gate_closing, 1, __ATOMIC_RELEASE);
    error = he_lock(fd, F_WRLCK, HE_LOCK_GATE, 1, 1);
    if (error) he_gate_open(c, fd);
    return error;
}

void he_gate_open(he_control *c, int fd) {
    __atomic_store_n(&c->gate_closing, 0, __ATOMIC_RELEASE);
    he_lock(fd, F_UNLCK, HE_LOCK_GATE, 1, 0);
    he_lock(fd, F_UNLCK, HE_LOCK_TURNSTILE, 1, 0);
}

/* Begins a point in time: no batch is in flight between closing the gate and opening it. Copies the control page to
 * `page`, tells writers to save rows of its epoch from now on, and raises the epoch. Returns 0 or an errno: ERANGE if
 * there is no next epoch. */
int he_begin_point(he_control *c, int fd, char *page, int64_t page_bytes) {
    int error = he_gate_close(c, fd);
    if (error) return error;
    const uint64_t epoch = he_epoch(c);
    memcpy(page, c, (size_t)page_bytes);
    if (epoch >= UINT32_MAX) error = ERANGE;
    else {
        __atomic_store_n(&c->save_failed, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&c->save_errno, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&c->saving, epoch, __ATOMIC_RELEASE);
        __atomic_store_n(&c->epoch, epoch + 1, __ATOMIC_RELEASE);
    }
    he_gate_open(c, fd);
    return error;
}
