/* Byte-range locks between processes, on the file `lock`. They belong to the open file description (Linux OFD locks), so
 * two tables opened in one process exclude each other as well, and the kernel drops them when their holder dies. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>

#include "portability.h"
#include "table.h"

/* kind: F_RDLCK, F_WRLCK or F_UNLCK. length 0: to the end of all files. 0, or an errno: EAGAIN where it is held by
 * somebody else and `wait` is 0, EINTR where a signal came first. */
int he_lock(int fd, int kind, int64_t begin, int64_t length, int wait) {
    struct flock request = {.l_type = (short)kind, .l_whence = SEEK_SET, .l_start = begin, .l_len = length};
    if (!fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &request)) return 0;
    return errno == EACCES ? EAGAIN : errno;
}

/* Waits like he_lock, but awake at first: what is waited for is usually given up within a tenth of a millisecond, and to be
 * woken takes as long. */
int he_lock_soon(int fd, int kind, int64_t begin, int64_t length) {
    int error = EAGAIN;
    for (int i = 0; i < 64 && error == EAGAIN; i++) {
        error = he_lock(fd, kind, begin, length, 0);
        for (int j = 0; j < 32 && error == EAGAIN; j++) he_pause();
    }
    return error == EAGAIN ? he_lock(fd, kind, begin, length, 1) : error;
}

/* For the middle of a batch, which cannot be given up: waits through signals and through a lack of lock records. */
void he_lock_surely(int fd, int kind, int64_t begin, int64_t length) {
    const struct timespec pause = {0, 1000000};
    int error;
    while ((error = he_lock_soon(fd, kind, begin, length)))
        if (error != EINTR) nanosleep(&pause, NULL);
}

/* A batch holds the gate shared from its first mark to its last row. Whoever wants it exclusively says so in the control
 * page and holds the turnstile meanwhile: without it, batches that overlap would keep the gate shared for ever.
 *
 * Never waits: HE_GATE_CLOSED, and he_gate_look then, with nothing held; `waited` says that this has been done. */
int he_gate_enter(const he_control *c, int fd, int waited) {
    if (!waited && __atomic_load_n(&c->gate_closing, __ATOMIC_ACQUIRE)) return HE_GATE_CLOSED;
    const int error = he_lock(fd, F_RDLCK, HE_LOCK_GATE, 1, 0);
    return error == EAGAIN ? HE_GATE_CLOSED : error;
}

/* Looks for a tenth of a millisecond whether the gate has been opened: most are closed for less. 0, EAGAIN or an errno. */
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

/* The moment that a snapshot holds: no batch is in flight between closing the gate and opening it. Copies the control page
 * to `page`, tells writers that rows of its epoch are wanted from now on, and raises the epoch. 0, an errno, or ERANGE where
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
