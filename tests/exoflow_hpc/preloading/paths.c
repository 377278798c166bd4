/* Which calls are about files below the directory that is watched. What a preloaded library may interpose is not called here. */
#define _GNU_SOURCE
#include "paths.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static dev_t root_device;

int watch(const char *directory)
{
    struct stat info;
    if (syscall(SYS_newfstatat, AT_FDCWD, directory, &info, 0) < 0)
        return 0;
    snprintf(root, sizeof root, "%s", directory);
    root_length = strlen(root);
    root_device = info.st_dev;
    return 1;
}

int inside(const char *path)
{
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

int inside_fd(int fd, char *path)
{
    struct stat info;
    char link[64];
    if (fstat(fd, &info) < 0 || info.st_dev != root_device || !(S_ISREG(info.st_mode) || S_ISDIR(info.st_mode)))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return inside(path);
}

int inside_path(int dirfd, const char *given, char *path)
{
    char link[64], base[PATH_MAX];
    path[0] = 0;
    if (!given)
        return 0;
    if (given[0] == '/') {
        snprintf(path, PATH_MAX, "%s", given);
        return inside(path);
    }
    if (dirfd == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
    ssize_t n = readlink(link, base, sizeof base - 1);
    base[n < 0 ? 0 : n] = 0;
    return snprintf(path, PATH_MAX, "%s/%s", base, given) < PATH_MAX && inside(path);
}

const char *name_of(const char *path)
{
    return strrchr(path, '/') + 1;
}

void parent_of(const char *path, char *parent)
{
    snprintf(parent, PATH_MAX, "%.*s", (int)(name_of(path) - path - 1), path);
}
