/* All names under which the C library opens files: for a preloaded library that has defined do_open() before. */
#ifndef OPENS_H
#define OPENS_H

#include <fcntl.h>
#include <stdarg.h>

#define OPEN(dirfd, path, flags)                                                                                       \
    va_list rest;                                                                                                      \
    va_start(rest, flags);                                                                                             \
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;                                                          \
    va_end(rest);                                                                                                      \
    return do_open(dirfd, path, flags, mode);

int open(const char *path, int flags, ...) { OPEN(AT_FDCWD, path, flags) }
int open64(const char *path, int flags, ...) { OPEN(AT_FDCWD, path, flags) }
int openat(int dirfd, const char *path, int flags, ...) { OPEN(dirfd, path, flags) }
int openat64(int dirfd, const char *path, int flags, ...) { OPEN(dirfd, path, flags) }

/* what the compiler makes of a call without a mode when it is told to be careful */
int __open_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int __openat_2(int dirfd, const char *path, int flags) { return do_open(dirfd, path, flags, 0); }
int __openat64_2(int dirfd, const char *path, int flags) { return do_open(dirfd, path, flags, 0); }

#undef OPEN
#endif
