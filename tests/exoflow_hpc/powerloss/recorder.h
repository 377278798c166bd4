/* What calls.c has from recorder.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "paths.h"

#pragma GCC visibility push(hidden)

/* what a line of the log says; as in preload.py */
enum { CREATE = 1, MKDIR, WRITE, TRUNCATE, ALLOCATE, RENAME, LINK, UNLINK, RMDIR, SYNC, NOTE, UNKNOWN };

/* then the two names, without a zero, and the data */
struct line {
    uint32_t size, pid;
    uint16_t op, unused, name, name2;
    uint64_t ino, dir;
    int64_t offset, length;
};

/* First in each call: whether this process is left alone. Without power there is no return. */
int off(void);

uint64_t inode(const char *path);
uint64_t inode_of_parent(const char *path);
uint64_t inode_of_fd(int fd);

/* Take the lock before a call on *path* is made; no return if this is the fatal one. NULL: it isn't a call. */
int enter(const char *path);
void leave(int log);

/* Write a line, under the lock; *data* are its bytes. */
void put(int log, int op, uint64_t ino, uint64_t dir, const char *name, const char *name2, int64_t offset,
         int64_t length, const void *data, size_t size);
/* Say that a call is about to be made that the log can't express. */
void unknown(const char *call, const char *path);

#pragma GCC visibility pop
