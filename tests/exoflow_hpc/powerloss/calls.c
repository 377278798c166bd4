/* The calls: each does what the C library's does, and is in the log if it changed something. See recorder.c. */
#include "recorder.h"

#include <sys/mman.h>

/* --- open --- */

static int do_open(int dirfd, const char *given, int flags, mode_t mode)
{
    char path[PATH_MAX];
    struct stat before;
    if (off() || !(flags & (O_CREAT | O_TRUNC)) || !inside_path(dirfd, given, path))
        return syscall(SYS_openat, dirfd, given, flags, mode);
    int there = !lstat(path, &before);
    if (there ? flags & O_EXCL || !(flags & O_TRUNC) || !before.st_size : !(flags & O_CREAT))
        return syscall(SYS_openat, dirfd, given, flags, mode); /* changes nothing */
    int log = enter(path);
    there = !lstat(path, &before); /* now that nobody else changes it */
    int fd = syscall(SYS_openat, dirfd, given, flags, mode);
    if (fd >= 0 && !there)
        put(log, CREATE, inode_of_fd(fd), inode_of_parent(path), name_of(path), "", 0, 0, NULL, 0);
    else if (fd >= 0 && flags & O_TRUNC)
        put(log, TRUNCATE, inode_of_fd(fd), 0, "", "", 0, 0, NULL, 0);
    leave(log);
    return fd;
}

#include "opens.h"

int creat(const char *path, mode_t mode) { return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* --- data --- */

/* *at*: where, or -1 for the file's own offset. */
static ssize_t do_write(int fd, const struct iovec *parts, int count, off_t at)
{
    char path[PATH_MAX];
    int log = -1;
    off_t where = at;
    if (!off() && inside_fd(fd, path)) {
        struct stat info;
        log = enter(path);
        if (at < 0)
            where = fcntl(fd, F_GETFL) & O_APPEND && !fstat(fd, &info) ? info.st_size : lseek(fd, 0, SEEK_CUR);
    }
    ssize_t done = at < 0 ? syscall(SYS_writev, fd, parts, count) : syscall(SYS_pwritev, fd, parts, count, at, 0L);
    if (log < 0)
        return done;
    ssize_t left = done;
    for (int i = 0; i < count && left > 0; i++) {
        ssize_t size = (ssize_t)parts[i].iov_len < left ? (ssize_t)parts[i].iov_len : left;
        put(log, WRITE, inode_of_fd(fd), 0, "", "", where, size, parts[i].iov_base, size);
        where += size;
        left -= size;
    }
    leave(log);
    return done;
}

ssize_t write(int fd, const void *data, size_t size)
{
    struct iovec part = {(void *)data, size};
    return do_write(fd, &part, 1, -1);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    struct iovec part = {(void *)data, size};
    return do_write(fd, &part, 1, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { return pwrite(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *parts, int count) { return do_write(fd, parts, count, -1); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) { return do_write(fd, parts, count, at); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) { return do_write(fd, parts, count, at); }

int ftruncate(int fd, off_t length)
{
    char path[PATH_MAX];
    if (off() || !inside_fd(fd, path))
        return syscall(SYS_ftruncate, fd, length);
    int log = enter(path), result = syscall(SYS_ftruncate, fd, length);
    if (!result)
        put(log, TRUNCATE, inode_of_fd(fd), 0, "", "", 0, length, NULL, 0);
    leave(log);
    return result;
}

int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    char path[PATH_MAX];
    if (off() || !inside_fd(fd, path))
        return syscall(SYS_fallocate, fd, mode, offset, length);
    if (mode)
        unknown("fallocate with a mode", path);
    int log = enter(path), result = syscall(SYS_fallocate, fd, mode, offset, length);
    if (!result)
        put(log, ALLOCATE, inode_of_fd(fd), 0, "", "", offset, length, NULL, 0);
    leave(log);
    return result;
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return fallocate(fd, mode, offset, length); }

int posix_fallocate(int fd, off_t offset, off_t length)
{
    int kept = errno, result = fallocate(fd, 0, offset, length) < 0 ? errno : 0;
    errno = kept;
    return result;
}

int posix_fallocate64(int fd, off64_t offset, off64_t length) { return posix_fallocate(fd, offset, length); }

static int do_sync(int fd, long call)
{
    char path[PATH_MAX];
    if (off() || !inside_fd(fd, path))
        return syscall(call, fd);
    int log = enter(path);
    put(log, SYNC, inode_of_fd(fd), 0, "", "", 0, 0, NULL, 0);
    leave(log);
    return 0;
}

int fsync(int fd) { return do_sync(fd, SYS_fsync); }
int fdatasync(int fd) { return do_sync(fd, SYS_fdatasync); }

/* --- names --- */

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    char path[PATH_MAX], path2[PATH_MAX];
    if (off() || !(inside_path(from, old, path) | inside_path(to, new, path2)))
        return syscall(SYS_renameat2, from, old, to, new, flags);
    if (inode_of_parent(path) != inode_of_parent(path2) || flags & ~RENAME_NOREPLACE)
        unknown("rename between directories, or an exchange", path);
    int log = enter(path), result = syscall(SYS_renameat2, from, old, to, new, flags);
    if (!result)
        put(log, RENAME, inode(path2), inode_of_parent(path), name_of(path), name_of(path2), 0, 0, NULL, 0);
    leave(log);
    return result;
}

int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int linkat(int from, const char *old, int to, const char *new, int flags)
{
    char path[PATH_MAX];
    if (off() || !inside_path(to, new, path))
        return syscall(SYS_linkat, from, old, to, new, flags);
    int log = enter(path), result = syscall(SYS_linkat, from, old, to, new, flags);
    if (!result)
        put(log, LINK, inode(path), inode_of_parent(path), name_of(path), "", 0, 0, NULL, 0);
    leave(log);
    return result;
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int dirfd, const char *given, int flags)
{
    char path[PATH_MAX];
    if (off() || !inside_path(dirfd, given, path) || !inode(path))
        return syscall(SYS_unlinkat, dirfd, given, flags);
    int log = enter(path);
    uint64_t ino = inode(path);
    int result = syscall(SYS_unlinkat, dirfd, given, flags);
    if (!result)
        put(log, flags & AT_REMOVEDIR ? RMDIR : UNLINK, ino, inode_of_parent(path), name_of(path), "", 0, 0, NULL, 0);
    leave(log);
    return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dirfd, const char *given, mode_t mode)
{
    char path[PATH_MAX];
    if (off() || !inside_path(dirfd, given, path) || inode(path) || !inode_of_parent(path))
        return syscall(SYS_mkdirat, dirfd, given, mode); /* outside, or it fails */
    int log = enter(path), result = syscall(SYS_mkdirat, dirfd, given, mode);
    if (!result)
        put(log, MKDIR, inode(path), inode_of_parent(path), name_of(path), "", 0, 0, NULL, 0);
    leave(log);
    return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* --- what exoflow_hpc doesn't do; if that changes, the harness says so --- */

int truncate(const char *given, off_t length)
{
    char path[PATH_MAX];
    if (!off() && inside_path(AT_FDCWD, given, path))
        unknown("truncate", path);
    return syscall(SYS_truncate, given, length);
}

int truncate64(const char *given, off64_t length) { return truncate(given, length); }

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *at2, size_t size, unsigned flags)
{
    char path[PATH_MAX];
    if (!off() && inside_fd(to, path))
        unknown("copy_file_range", path);
    return syscall(SYS_copy_file_range, from, at, to, at2, size, flags);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t size)
{
    char path[PATH_MAX];
    if (!off() && inside_fd(to, path))
        unknown("sendfile", path);
    return syscall(SYS_sendfile, to, from, at, size);
}

ssize_t sendfile(int to, int from, off_t *at, size_t size) { return sendfile64(to, from, at, size); }

int symlinkat(const char *target, int dirfd, const char *given)
{
    char path[PATH_MAX];
    if (!off() && inside_path(dirfd, given, path))
        unknown("symlink", path);
    return syscall(SYS_symlinkat, target, dirfd, given);
}

int symlink(const char *target, const char *given) { return symlinkat(target, AT_FDCWD, given); }

void *mmap(void *where, size_t size, int protection, int flags, int fd, off_t at)
{
    char path[PATH_MAX];
    if (flags & MAP_SHARED && protection & PROT_WRITE && !(flags & MAP_ANONYMOUS) && !off() && inside_fd(fd, path))
        unknown("mmap", path);
    return (void *)syscall(SYS_mmap, where, size, protection, flags, fd, at);
}

void *mmap64(void *where, size_t size, int protection, int flags, int fd, off64_t at)
{
    return mmap(where, size, protection, flags, fd, at);
}
