/* Which calls of a preloaded library are about files below one directory. See paths.c. */
#ifndef PATHS_H
#define PATHS_H

#include <sys/types.h>

#pragma GCC visibility push(hidden)

/* Take a directory, an absolute path without symbolic links; return whether it is there. */
int watch(const char *directory);

/* Whether a path, an open file or a name below a directory is in it; the two last give its path (PATH_MAX bytes). */
int inside(const char *path);
int inside_fd(int fd, char *path);
int inside_path(int dirfd, const char *given, char *path);

const char *name_of(const char *path);
void parent_of(const char *path, char *parent);

#pragma GCC visibility pop
#endif
