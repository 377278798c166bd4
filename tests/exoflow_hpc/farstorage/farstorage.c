/* Makes a directory look as a network file system does to a host that caches badly: preloaded into all its processes.
 *
 * The host remembers in FARSTORAGE_CACHE, a directory outside, for FARSTORAGE_STALE seconds each:
 *   names that weren't there when they were looked for: they go on not being there;
 *   attributes: stat() of a name gives those of the first look, also when the file has grown or is gone;
 *   listings: with what this host itself has changed since, and nothing that others have.
 * It asks the server, as even such a host does (close-to-open), when a file that is there is opened, and to create one: so O_EXCL
 * tells the truth. What is created, opened or removed here is known here. The bytes of an open file are always those that are there.
 *
 * Each answer of the server takes FARSTORAGE_DELAY milliseconds. The wall clock is wrong by FARSTORAGE_CLOCK seconds, and so are the
 * deadlines that are given to the kernel by it, which is right.
 *
 * All is for paths below FARSTORAGE_ROOT only. Calls go to the kernel without the C library, apart from those that keep state in it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "paths.h"

/* room for a name in the cache */
#define PLACE (PATH_MAX + 320)
/* deadlines beyond this many seconds are meant by the wall clock: no machine has run for that long */
#define WALL 1000000000

static char cache[PATH_MAX];
static double stale;
static long delay_ms, clock_offset;
static int on;
static unsigned number;
static DIR *(*real_opendir)(const char *);
static DIR *(*real_fdopendir)(int);
static int (*real_clock_gettime)(clockid_t, struct timespec *);
static int (*real_cond_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*real_sem_timedwait)(sem_t *, const struct timespec *);

static double number_of(const char *variable)
{
    const char *text = getenv(variable);
    return text ? atof(text) : 0;
}

__attribute__((constructor)) static void begin(void)
{
    const char *where = getenv("FARSTORAGE_ROOT"), *memory = getenv("FARSTORAGE_CACHE");
    real_opendir = dlsym(RTLD_NEXT, "opendir");
    real_fdopendir = dlsym(RTLD_NEXT, "fdopendir");
    real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    real_sem_timedwait = dlsym(RTLD_NEXT, "sem_timedwait");
    real_cond_timedwait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2"); /* x86; the name alone gives an old one */
    if (!real_cond_timedwait)
        real_cond_timedwait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    clock_offset = number_of("FARSTORAGE_CLOCK");
    if (!where || !memory || !watch(where))
        return;
    snprintf(cache, sizeof cache, "%s", memory);
    stale = number_of("FARSTORAGE_STALE");
    delay_ms = number_of("FARSTORAGE_DELAY");
    on = 1;
}

/* --- what the host remembers --- */

static int there(const char *path, struct stat *info)
{
    return !syscall(SYS_newfstatat, AT_FDCWD, path, info, AT_SYMLINK_NOFOLLOW);
}

static void answer(void)
{
    int kept = errno;
    struct timespec wait = {delay_ms / 1000, delay_ms % 1000 * 1000000};
    if (delay_ms)
        syscall(SYS_nanosleep, &wait, NULL);
    errno = kept;
}

/* 'n': that there is no such name; 'a': its attributes; 'd': what is in it. */
static void place_of(char kind, const char *path, char *place)
{
    uint64_t hash = 14695981039346656037u;
    for (; *path; path++)
        if (!(path[0] == '/' && (path[1] == '/' || !path[1])))
            hash = (hash ^ (unsigned char)*path) * 1099511628211u;
    snprintf(place, PLACE, "%s/%c%016llx", cache, kind, (unsigned long long)hash);
}

static void new_place(char *place)
{
    snprintf(place, PLACE, "%s/t%d-%u", cache, (int)getpid(), __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED));
}

static int fresh(char kind, const char *path, char *place)
{
    struct stat info;
    struct timespec now;
    place_of(kind, path, place);
    if (stale <= 0 || !there(place, &info))
        return 0;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
    return now.tv_sec - info.st_mtim.tv_sec + (now.tv_nsec - info.st_mtim.tv_nsec) / 1e9 < stale;
}

static void forget(char kind, const char *path)
{
    char place[PLACE];
    int kept = errno;
    place_of(kind, path, place);
    syscall(SYS_unlinkat, AT_FDCWD, place, 0);
    errno = kept;
}

static void remember(char kind, const char *path, const void *data, size_t size)
{
    char place[PLACE], new[PLACE];
    int kept = errno;
    if (stale > 0) {
        place_of(kind, path, place);
        new_place(new);
        int fd = syscall(SYS_openat, AT_FDCWD, new, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || syscall(SYS_write, fd, data, size) != (long)size)
            abort(); /* the test must not pass since nothing was remembered */
        close(fd);
        syscall(SYS_renameat, AT_FDCWD, new, AT_FDCWD, place);
    }
    errno = kept;
}

/* Whether a name, or one on the way to it, is remembered not to be there. */
static int absent(const char *path)
{
    char part[PATH_MAX], place[PLACE];
    size_t length = strlen(path);
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i])
            continue;
        snprintf(part, sizeof part, "%.*s", (int)i, path);
        if (inside(part) && fresh('n', part, place)) {
            errno = ENOENT;
            return 1;
        }
    }
    return 0;
}

static int parent_absent(const char *path)
{
    char parent[PATH_MAX];
    parent_of(path, parent);
    return inside(parent) && absent(parent);
}

/* A name in a listing: a file or directory without content. */
static void list(const char *directory, const char *name, int is_directory)
{
    char entry[2 * PLACE];
    snprintf(entry, sizeof entry, "%s/d/%s", directory, name);
    if (is_directory)
        syscall(SYS_mkdirat, AT_FDCWD, entry, 0700);
    else
        syscall(SYS_mknodat, AT_FDCWD, entry, S_IFREG | 0600, 0);
}

/* This host has made *path*, or sees that it is there. */
static void made(const char *path)
{
    char parent[PATH_MAX], place[PLACE];
    struct stat info;
    int kept = errno;
    forget('n', path);
    forget('a', path);
    parent_of(path, parent);
    place_of('d', parent, place);
    if (there(place, &info) && there(path, &info))
        list(place, name_of(path), S_ISDIR(info.st_mode));
    errno = kept;
}

/* This host has removed *path*. */
static void removed(const char *path)
{
    char parent[PATH_MAX], place[PLACE], entry[2 * PLACE];
    int kept = errno;
    forget('a', path);
    parent_of(path, parent);
    place_of('d', parent, place);
    snprintf(entry, sizeof entry, "%s/d/%s", place, name_of(path));
    if (syscall(SYS_unlinkat, AT_FDCWD, entry, 0) < 0)
        syscall(SYS_unlinkat, AT_FDCWD, entry, AT_REMOVEDIR);
    errno = kept;
}

/* Give, in *place*, a directory that has the names that are remembered of *path*, as they are now if none are. */
static int listing(const char *path, char *place)
{
    char new[PLACE], inner[2 * PLACE];
    struct dirent *entry;
    if (stale <= 0)
        return 0;
    if (!fresh('d', path, place)) {
        DIR *now = real_opendir(path);
        if (!now)
            return 0;
        new_place(new);
        syscall(SYS_renameat, AT_FDCWD, place, AT_FDCWD, new); /* what was remembered for too long */
        new_place(new);
        snprintf(inner, sizeof inner, "%s/d", new);
        if (syscall(SYS_mkdirat, AT_FDCWD, new, 0700) < 0 || syscall(SYS_mkdirat, AT_FDCWD, inner, 0700) < 0)
            abort();
        while ((entry = readdir(now)))
            if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
                list(new, entry->d_name, entry->d_type == DT_DIR);
        closedir(now);
        syscall(SYS_renameat, AT_FDCWD, new, AT_FDCWD, place); /* fails if another process was faster */
        answer();
    }
    strcat(place, "/d");
    return 1;
}

/* --- names --- */

static int do_open(int dirfd, const char *given, int flags, mode_t mode)
{
    char path[PATH_MAX];
    if (!on || !inside_path(dirfd, given, path))
        return syscall(SYS_openat, dirfd, given, flags, mode);
    if (flags & O_CREAT ? parent_absent(path) : absent(path))
        return -1;
    int fd = syscall(SYS_openat, dirfd, given, flags, mode);
    answer();
    if (fd < 0 && errno == ENOENT && !(flags & O_CREAT))
        remember('n', path, "", 0);
    else if (flags & O_CREAT)
        made(path); /* also when it was there already: so the host has learnt of it */
    else
        forget('a', path);
    return fd;
}

#include "opens.h"

static int do_stat(int dirfd, const char *given, struct stat *info, int flags)
{
    char path[PATH_MAX], place[PLACE];
    if (!on || !given || !*given || !inside_path(dirfd, given, path))
        return syscall(SYS_newfstatat, dirfd, given, info, flags);
    if (absent(path))
        return -1;
    if (fresh('a', path, place)) {
        int fd = syscall(SYS_openat, AT_FDCWD, place, O_RDONLY | O_CLOEXEC, 0);
        ssize_t size = fd < 0 ? 0 : syscall(SYS_read, fd, info, sizeof *info);
        if (fd >= 0)
            close(fd);
        if (size == sizeof *info)
            return 0;
    }
    int result = syscall(SYS_newfstatat, dirfd, given, info, flags);
    answer();
    if (!result)
        remember('a', path, info, sizeof *info);
    else if (errno == ENOENT)
        remember('n', path, "", 0);
    return result;
}

int stat(const char *path, struct stat *info) { return do_stat(AT_FDCWD, path, info, 0); }
int lstat(const char *path, struct stat *info) { return do_stat(AT_FDCWD, path, info, AT_SYMLINK_NOFOLLOW); }
int fstatat(int dirfd, const char *path, struct stat *info, int flags) { return do_stat(dirfd, path, info, flags); }
int stat64(const char *path, struct stat64 *info) { return stat(path, (struct stat *)info); }
int lstat64(const char *path, struct stat64 *info) { return lstat(path, (struct stat *)info); }
int fstatat64(int dirfd, const char *path, struct stat64 *info, int flags)
{
    return do_stat(dirfd, path, (struct stat *)info, flags);
}
/* of programs that were built for an older C library */
int __xstat(int version, const char *path, struct stat *info) { return (void)version, stat(path, info); }
int __lxstat(int version, const char *path, struct stat *info) { return (void)version, lstat(path, info); }
int __xstat64(int version, const char *path, struct stat64 *info) { return (void)version, stat64(path, info); }
int __lxstat64(int version, const char *path, struct stat64 *info) { return (void)version, lstat64(path, info); }

int faccessat(int dirfd, const char *given, int mode, int flags)
{
    char path[PATH_MAX];
    int far = on && inside_path(dirfd, given, path);
    if (far && absent(path))
        return -1;
    int result = flags ? syscall(SYS_faccessat2, dirfd, given, mode, flags) : syscall(SYS_faccessat, dirfd, given, mode);
    if (far) {
        answer();
        if (result < 0 && errno == ENOENT)
            remember('n', path, "", 0);
    }
    return result;
}

int access(const char *path, int mode) { return faccessat(AT_FDCWD, path, mode, 0); }

DIR *opendir(const char *given)
{
    char path[PATH_MAX], place[PLACE + 2];
    if (!on || !inside_path(AT_FDCWD, given, path))
        return real_opendir(given);
    if (absent(path))
        return NULL;
    return real_opendir(listing(path, place) ? place : given);
}

DIR *fdopendir(int fd)
{
    char path[PATH_MAX], place[PLACE + 2];
    if (on && inside_fd(fd, path) && listing(path, place)) {
        int shown = syscall(SYS_openat, AT_FDCWD, place, O_RDONLY | O_DIRECTORY, 0);
        if (shown < 0 || dup3(shown, fd, O_CLOEXEC) < 0)
            abort();
        close(shown);
    }
    return real_fdopendir(fd);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    char path[PATH_MAX], path2[PATH_MAX];
    int far = on && (inside_path(from, old, path) & inside_path(to, new, path2));
    int result = syscall(SYS_renameat2, from, old, to, new, flags);
    if (far) {
        answer();
        if (!result)
            removed(path), made(path2);
    }
    return result;
}

int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int linkat(int from, const char *old, int to, const char *new, int flags)
{
    char path[PATH_MAX];
    int far = on && inside_path(to, new, path), result = syscall(SYS_linkat, from, old, to, new, flags);
    if (far)
        answer(), made(path);
    return result;
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int dirfd, const char *given, int flags)
{
    char path[PATH_MAX];
    int far = on && inside_path(dirfd, given, path), result = syscall(SYS_unlinkat, dirfd, given, flags);
    if (far) {
        answer();
        if (!result)
            removed(path);
    }
    return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dirfd, const char *given, mode_t mode)
{
    char path[PATH_MAX];
    int far = on && inside_path(dirfd, given, path), result = syscall(SYS_mkdirat, dirfd, given, mode);
    if (far)
        answer(), made(path);
    return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

static int do_sync(int fd, long call)
{
    char path[PATH_MAX];
    int result = syscall(call, fd);
    if (on && delay_ms && inside_fd(fd, path))
        answer();
    return result;
}

int fsync(int fd) { return do_sync(fd, SYS_fsync); }
int fdatasync(int fd) { return do_sync(fd, SYS_fdatasync); }

/* --- the wall clock --- */

int clock_gettime(clockid_t id, struct timespec *time)
{
    int result = real_clock_gettime ? real_clock_gettime(id, time) : (int)syscall(SYS_clock_gettime, id, time);
    if (!result && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE || id == CLOCK_TAI))
        time->tv_sec += clock_offset;
    return result;
}

int timespec_get(struct timespec *time, int base)
{
    return base == TIME_UTC && !clock_gettime(CLOCK_REALTIME, time) ? base : 0;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    *time = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *where)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where)
        *where = now.tv_sec;
    return now.tv_sec;
}

static struct timespec right(const struct timespec *deadline)
{
    struct timespec time = *deadline;
    if (time.tv_sec > WALL)
        time.tv_sec -= clock_offset;
    return time;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict deadline)
{
    struct timespec time = right(deadline);
    return real_cond_timedwait(condition, mutex, &time);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline)
{
    struct timespec time = right(deadline);
    return real_sem_timedwait(semaphore, &time);
}
