/* A disk that fails on purpose: loaded before libc with LD_PRELOAD, it counts the calls that change
 * files under a path, and at a chosen one does what disks and power supplies do.
 *
 *   FAULT_PATH   part of the paths that are meant; the others are left alone
 *   FAULT_AT     which call, from 1; none for never
 *   FAULT_COUNT  how many calls from there on, 1 if left out, 0 for all
 *   FAULT_CALLS  which calls count: "all" (the default), "write" or "sync"
 *   FAULT_DO     kill    the process dies by SIGKILL before the call
 *                torn    half of what is written is, then the process dies
 *                short   half of what is written is, as the call says
 *                lose    nothing is written, and the call says that all was
 *                flip    one bit of what is written is another
 *                slow    the call takes FAULT_MS milliseconds longer
 *                ENOSPC, EIO, EROFS, EDQUOT   the call fails with this
 *   FAULT_LOG    a file that gets the number of calls at the end
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FILES = 4096 };

static atomic_int ours[FILES]; /* descriptors of files under FAULT_PATH */
static atomic_long calls;

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

static int meant(const char *path) {
    const char *part = getenv("FAULT_PATH");
    return part && path && strstr(path, part) != NULL;
}

static int is_ours(int fd) { return fd >= 0 && fd < FILES && ours[fd]; }

/* Counts a call of a kind; whether it is one that shall fail. */
static int strikes(const char *kind) {
    const char *which = setting("FAULT_CALLS", "all");
    if (strcmp(which, "all") != 0 && strcmp(which, kind) != 0) return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    long at = atol(setting("FAULT_AT", "0")), count = atol(setting("FAULT_COUNT", "1"));
    return at > 0 && number >= at && (count == 0 || number < at + count);
}

/* What most calls do when they are struck: die, wait, or fail. Returns whether the call fails. */
static int struck(void) {
    const char *what = setting("FAULT_DO", "");
    if (!strcmp(what, "kill") || !strcmp(what, "torn")) kill(getpid(), SIGKILL);
    if (!strcmp(what, "slow")) usleep(1000 * atoi(setting("FAULT_MS", "100")));
    errno = !strcmp(what, "ENOSPC")   ? ENOSPC
            : !strcmp(what, "EIO")    ? EIO
            : !strcmp(what, "EROFS")  ? EROFS
            : !strcmp(what, "EDQUOT") ? EDQUOT
                                      : 0;
    return errno != 0;
}

#define REAL(type, name, ...)                                       \
    static type (*real)(__VA_ARGS__);                               \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int note(int fd, const char *path) {
    if (fd >= 0 && fd < FILES) ours[fd] = meant(path);
    return fd;
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);
    if ((flags & (O_CREAT | O_TRUNC)) && meant(path) && strikes("open") && struck()) return -1;
    return note(real(path, flags, mode), path);
}

#define MODE(flags)                            \
    mode_t mode = 0;                           \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {   \
        va_list list;                          \
        va_start(list, flags);                 \
        mode = (mode_t)va_arg(list, int);      \
        va_end(list);                          \
    }

int open(const char *path, int flags, ...) {
    MODE(flags)
    return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE(flags)
    return opened("open64", path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags)
    REAL(int, "openat64", int, const char *, int, ...);
    int under = is_ours(folder);
    int fd = real(folder, path, flags, mode);
    if (fd >= 0 && fd < FILES) ours[fd] = under || meant(path);
    return fd;
}

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < FILES) ours[fd] = 0;
    return real(fd);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!is_ours(fd) || !strikes("write")) return real(fd, bytes, count);
    const char *what = setting("FAULT_DO", "");
    if (!strcmp(what, "torn")) real(fd, bytes, count / 2);
    if (!strcmp(what, "short") && count > 1) return real(fd, bytes, count / 2);
    if (!strcmp(what, "lose")) return (ssize_t)count;
    if (!strcmp(what, "flip") && count > 0) {
        char *copy = malloc(count);
        memcpy(copy, bytes, count);
        copy[count / 2] ^= 1;
        ssize_t done = real(fd, copy, count);
        free(copy);
        return done;
    }
    return struck() ? -1 : real(fd, bytes, count);
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    return is_ours(fd) && strikes("sync") && struck() ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return is_ours(fd) && strikes("sync") && struck() ? -1 : real(fd);
}

int ftruncate64(int fd, off64_t length) {
    REAL(int, "ftruncate64", int, off64_t);
    return is_ours(fd) && strikes("truncate") && struck() ? -1 : real(fd, length);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return meant(path) && strikes("mkdir") && struck() ? -1 : real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return meant(to) && strikes("rename") && struck() ? -1 : real(from, to);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return meant(path) && strikes("unlink") && struck() ? -1 : real(path);
}

/* Folders are emptied relative to their descriptor. */
int unlinkat(int fd, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    int under = is_ours(fd) || meant(path);
    return under && strikes("unlink") && struck() ? -1 : real(fd, path, flags);
}

__attribute__((destructor)) static void report(void) {
    const char *path = getenv("FAULT_LOG");
    if (!path) return;
    FILE *log = fopen(path, "w");
    if (!log) return;
    fprintf(log, "%ld\n", (long)calls);
    fclose(log);
}
