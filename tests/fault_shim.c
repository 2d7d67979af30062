/* Intercepts system calls by LD_PRELOAD: makes the N-th call that concerns a directory fail, or notifies a callback
 * before each such call. Requires Linux with 64-bit file offsets; calls the kernel directly.
 *
 * A call concerns the directory if its path, or the path of its open file, is below it; msync and the populating
 * madvise have neither and always count. Nothing counts before shim_arm or shim_watch. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, CREATE, FTRUNCATE, FALLOCATE, MMAP, MSYNC, FSYNC, RENAME, WRITE, READ, POPULATE, LOCK, MKDIR, UNLINK, NUM_KINDS };
enum { TRANSIENT, PERSISTENT, DEAD, SHORT }; /* once; then all of its kind; then all; half of the bytes, once */

static const int ERRNOS[NUM_KINDS][3] = {
    [OPEN] = {EMFILE, EIO, EACCES}, [CREATE] = {ENOSPC, EDQUOT, EIO},   [FTRUNCATE] = {ENOSPC, EIO, EFBIG},
    [FALLOCATE] = {ENOSPC, EDQUOT, EIO}, [MMAP] = {ENOMEM, EAGAIN, ENOMEM}, [MSYNC] = {EIO, ENOSPC, EIO},
    [FSYNC] = {EIO, ENOSPC, EDQUOT}, [RENAME] = {ENOSPC, EIO, EACCES}, [WRITE] = {ENOSPC, EIO, EDQUOT},
    [READ] = {EIO, EIO, EIO},        [POPULATE] = {EFAULT, ENOMEM, EINVAL}, [LOCK] = {ENOLCK, ENOLCK, EIO},
    [MKDIR] = {ENOSPC, EDQUOT, EACCES}, [UNLINK] = {EIO, EACCES, EROFS},
};

typedef void (*watcher)(int kind, const char *path, const char *new_path);

static char root[4096];
static atomic_long counted, nth;
static atomic_int mode, variant, fired_kind = -1;
static watcher watching;
static _Thread_local int inside;

void shim_arm(const char *directory, long n, int how, int which) {
    snprintf(root, sizeof root, "%s", directory);
    mode = how;
    variant = which;
    counted = 0;
    fired_kind = -1;
    nth = n;
}

/* Returns the kind of the call that failed, or -1. */
int shim_disarm(void) {
    nth = 0;
    return fired_kind;
}

long shim_counted(void) { return counted; }

void shim_watch(const char *directory, watcher callback) {
    snprintf(root, sizeof root, "%s", directory);
    watching = callback;
}

static int is_below(const char *path) {
    const size_t n = strlen(root);
    return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static const char *path_of(int fd, const char *name, char *buffer, size_t size) {
    char link[64];
    ssize_t n = 0;
    if (name && name[0] == '/') return name;
    if (fd == AT_FDCWD) n = syscall(SYS_getcwd, buffer, size) > 0 ? (ssize_t)strlen(buffer) : 0;
    else if (fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        n = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, size - 1);
    }
    buffer[n > 0 ? n : 0] = 0;
    if (name && *name && n > 0) snprintf(buffer + n, size - (size_t)n, "/%s", name);
    return buffer;
}

/* Returns 1, with errno set, if this call is to fail, and -1 if it is to be short. */
static int fails_at(int kind) {
    const long number = atomic_fetch_add(&counted, 1) + 1, at = nth;
    if (mode == SHORT) {
        if (number < at || fired_kind >= 0 || (kind != WRITE && kind != READ)) return 0;
        fired_kind = kind;
        return -1;
    }
    if (number == at) fired_kind = kind;
    else if (number < at || mode == TRANSIENT || (mode == PERSISTENT && kind != fired_kind)) return 0;
    errno = ERRNOS[kind][variant];
    return 1;
}

static int stopped(int kind, int fd, const char *name, const char *new_path) {
    char buffer[8192];
    const int before = errno;
    if (inside || (!nth && !watching)) return 0;
    const char *path = path_of(fd, name, buffer, sizeof buffer);
    errno = before;
    if (kind != MSYNC && kind != POPULATE && !is_below(path)) return 0;
    if (watching) {
        inside = 1;
        watching(kind, path, new_path);
        inside = 0;
        errno = before;
    }
    return nth ? fails_at(kind) : 0;
}

#define RESULT(call, kind, fd, name) (stopped(kind, fd, name, NULL) > 0 ? -1 : (call))

/* ---- files ---- */

static int open_file(int fd, const char *path, int flags, int rights) {
    return RESULT((int)syscall(SYS_openat, fd, path, flags, rights), flags & O_CREAT ? CREATE : OPEN, fd, path);
}

#define RIGHTS(last) \
    int rights = 0; \
    va_list rest; \
    va_start(rest, last); \
    if (flags & O_CREAT) rights = va_arg(rest, int); \
    va_end(rest)

int open(const char *path, int flags, ...) { RIGHTS(flags); return open_file(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) { RIGHTS(flags); return open_file(AT_FDCWD, path, flags, rights); }
int openat(int fd, const char *path, int flags, ...) { RIGHTS(flags); return open_file(fd, path, flags, rights); }
int openat64(int fd, const char *path, int flags, ...) { RIGHTS(flags); return open_file(fd, path, flags, rights); }

int ftruncate(int fd, off_t n) { return RESULT((int)syscall(SYS_ftruncate, fd, n), FTRUNCATE, fd, NULL); }
int ftruncate64(int fd, off_t n) { return ftruncate(fd, n); }
int fallocate(int fd, int how, off_t at, off_t n) {
    return RESULT((int)syscall(SYS_fallocate, fd, how, at, n), FALLOCATE, fd, NULL);
}
int fallocate64(int fd, int how, off_t at, off_t n) { return fallocate(fd, how, at, n); }
int fsync(int fd) { return RESULT((int)syscall(SYS_fsync, fd), FSYNC, fd, NULL); }
int fdatasync(int fd) { return RESULT((int)syscall(SYS_fdatasync, fd), FSYNC, fd, NULL); }
int flock(int fd, int how) { return RESULT((int)syscall(SYS_flock, fd, how), LOCK, fd, NULL); }

int fcntl(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    const int takes = (command == F_OFD_SETLK || command == F_OFD_SETLKW) && ((struct flock *)argument)->l_type != F_UNLCK;
    if (takes && stopped(LOCK, fd, NULL, NULL) > 0) return -1;
    return (int)syscall(SYS_fcntl, fd, command, argument);
}
int fcntl64(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return fcntl(fd, command, argument);
}

/* ---- directories ---- */

static int rename_file(int fd, const char *path, int new_fd, const char *new_path) {
    char buffer[8192];
    if (stopped(RENAME, fd, path, path_of(new_fd, new_path, buffer, sizeof buffer)) > 0) return -1;
    return (int)syscall(SYS_renameat2, fd, path, new_fd, new_path, 0);
}

int rename(const char *path, const char *new_path) { return rename_file(AT_FDCWD, path, AT_FDCWD, new_path); }
int renameat(int fd, const char *path, int new_fd, const char *new_path) { return rename_file(fd, path, new_fd, new_path); }
int mkdirat(int fd, const char *path, mode_t rights) {
    return RESULT((int)syscall(SYS_mkdirat, fd, path, rights), MKDIR, fd, path);
}
int mkdir(const char *path, mode_t rights) { return mkdirat(AT_FDCWD, path, rights); }
int unlinkat(int fd, const char *path, int flags) {
    return RESULT((int)syscall(SYS_unlinkat, fd, path, flags), UNLINK, fd, path);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

/* ---- bytes ---- */

/* Returns n, half of it if the call is to be short, or -1. */
static int64_t allowed(int kind, int fd, size_t n) {
    const int answer = stopped(kind, fd, NULL, NULL);
    return answer > 0 ? -1 : answer < 0 && n > 1 ? (int64_t)(n / 2) : (int64_t)n;
}

ssize_t write(int fd, const void *data, size_t n) {
    const int64_t m = allowed(WRITE, fd, n);
    return m < 0 ? -1 : syscall(SYS_write, fd, data, m);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    const int64_t m = allowed(WRITE, fd, n);
    return m < 0 ? -1 : syscall(SYS_pwrite64, fd, data, m, at);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) { return pwrite(fd, data, n, at); }
ssize_t read(int fd, void *data, size_t n) {
    const int64_t m = allowed(READ, fd, n);
    return m < 0 ? -1 : syscall(SYS_read, fd, data, m);
}
ssize_t pread(int fd, void *data, size_t n, off_t at) {
    const int64_t m = allowed(READ, fd, n);
    return m < 0 ? -1 : syscall(SYS_pread64, fd, data, m, at);
}
ssize_t pread64(int fd, void *data, size_t n, off_t at) { return pread(fd, data, n, at); }

static ssize_t read_vectors(int fd, const struct iovec *parts, int n, off_t at, int flags) {
    if (n == 1 && !flags) return pread(fd, parts->iov_base, parts->iov_len, at);
    return stopped(READ, fd, NULL, NULL) > 0 ? -1 : syscall(SYS_preadv2, fd, parts, n, at, 0, flags);
}
ssize_t preadv(int fd, const struct iovec *parts, int n, off_t at) { return read_vectors(fd, parts, n, at, 0); }
ssize_t preadv64(int fd, const struct iovec *parts, int n, off_t at) { return read_vectors(fd, parts, n, at, 0); }
ssize_t preadv2(int fd, const struct iovec *p, int n, off_t at, int flags) { return read_vectors(fd, p, n, at, flags); }
ssize_t preadv64v2(int fd, const struct iovec *p, int n, off_t at, int flags) { return read_vectors(fd, p, n, at, flags); }

/* ---- mappings ---- */

void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    if (fd >= 0 && stopped(MMAP, fd, NULL, NULL) > 0) return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, n, prot, flags, fd, offset);
}
void *mmap64(void *at, size_t n, int prot, int flags, int fd, off_t offset) { return mmap(at, n, prot, flags, fd, offset); }

int msync(void *at, size_t n, int flags) {
    char address[32];
    snprintf(address, sizeof address, "/%lx", (unsigned long)at); /* the watcher looks up what is mapped there */
    return RESULT((int)syscall(SYS_msync, at, n, flags), MSYNC, -1, address);
}

int madvise(void *at, size_t n, int advice) {
    const int populates = advice == 22 || advice == 23; /* MADV_POPULATE_READ, _WRITE */
    if (populates && stopped(POPULATE, -1, NULL, NULL) > 0) return -1;
    return (int)syscall(SYS_madvise, at, n, advice);
}
