/* Stands between processes and a directory, and takes their power away at a given call.
 *
 * Preloaded into all processes of a run (LD_PRELOAD), those in which HDF5 writes included. Each call that changes
 * something under POWERLOSS_ROOT is written to POWERLOSS_LOG, with its bytes, in the one order in which all processes
 * made them; disk.py makes of that log what a disk could hold. Before call number POWERLOSS_CALL of the processes
 * with the role POWERLOSS_ROLE, POWERLOSS_MODE says what happens: "power": that process is killed, and from that
 * instant every other one dies by its next call of those in calls.c, whatever file it is for; "kill": that process
 * alone is killed.
 *
 * Nothing is flushed to the real disk: an fsync is a line of the log. A call that the log can't express is in it as
 * "unknown", and the harness refuses such a log. Calls for the heartbeat are logged and not counted, as it beats by
 * the clock.
 *
 * One lock, on the log file, is held over a call and its line; it ends with whoever holds it. No file stays open
 * between calls, since processes close descriptors that they don't know. Calls go to the kernel without the C library,
 * so that nothing here has to be looked up before it is called for the first time.
 */
#include "recorder.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>

/* shared by all processes of the run: POWERLOSS_STATE; as in preload.py */
struct state {
    volatile uint32_t lost;
    volatile uint32_t calls; /* of the role that is counted */
};

static char log_path[PATH_MAX], role[64];
static struct state *state;
static long fatal_call;
static int counted, kill_only;

static void die(void)
{
    for (;;)
        syscall(SYS_kill, getpid(), SIGKILL);
}

/* The writer of rank 0 is "writer0", the rank itself "rank0", what the user types "cli". */
static void find_role(void)
{
    static char text[65536];
    int fd = syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY | O_CLOEXEC, 0);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    char *at = text, *end = text + (n > 0 ? n : 0);
    const char *words[3] = {"", "", ""}, *rank = getenv("HOPLITE_RANK"), *script = "checkpoint/_boot.py";
    for (int i = 0; i < 3 && at < end; i++, at += strlen(at) + 1)
        words[i] = at;
    const char *tail = strstr(words[1], script);
    if (tail && !tail[strlen(script)])
        snprintf(role, sizeof role, "writer%s", rank ? rank : "");
    else if (!strcmp(words[1], "-m") && !strcmp(words[2], "exoflow_hpc.rank"))
        snprintf(role, sizeof role, "rank%s", rank ? rank : "");
    else if (!strcmp(words[1], "-m") && !strcmp(words[2], "exoflow_hpc"))
        snprintf(role, sizeof role, "cli");
    else
        snprintf(role, sizeof role, "other");
}

__attribute__((constructor)) static void begin(void)
{
    const char *where = getenv("POWERLOSS_ROOT"), *log = getenv("POWERLOSS_LOG"), *shared = getenv("POWERLOSS_STATE");
    const char *who = getenv("POWERLOSS_ROLE"), *call = getenv("POWERLOSS_CALL"), *mode = getenv("POWERLOSS_MODE");
    if (!where || !log || !shared || !watch(where))
        return;
    int fd = syscall(SYS_openat, AT_FDCWD, shared, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0)
        return;
    void *mapped = (void *)syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED)
        return;
    snprintf(log_path, sizeof log_path, "%s", log);
    find_role();
    counted = who && !strcmp(who, role);
    fatal_call = call ? atol(call) : 0;
    kill_only = mode && !strcmp(mode, "kill");
    state = mapped;
    if (state->lost)
        die();
}

int off(void)
{
    if (state && state->lost)
        die();
    return !state;
}

uint64_t inode(const char *path)
{
    struct stat info;
    return lstat(path, &info) < 0 ? 0 : info.st_ino;
}

uint64_t inode_of_parent(const char *path)
{
    char parent[PATH_MAX];
    parent_of(path, parent);
    return inode(parent);
}

uint64_t inode_of_fd(int fd)
{
    struct stat info;
    return fstat(fd, &info) < 0 ? 0 : info.st_ino;
}

int enter(const char *path)
{
    int log = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
    while (flock(log, LOCK_EX) < 0)
        if (errno != EINTR)
            die(); /* the harness took its files away */
    if (state->lost)
        die();
    if (counted && path && strcmp(name_of(path), "heartbeat") && ++state->calls == fatal_call) {
        if (!kill_only)
            state->lost = 1;
        die();
    }
    return log;
}

void leave(int log)
{
    int kept = errno;
    close(log);
    errno = kept;
}

void put(int log, int op, uint64_t ino, uint64_t dir, const char *name, const char *name2, int64_t offset,
         int64_t length, const void *data, size_t size)
{
    int kept = errno;
    struct line line = {0, getpid(), op, 0, strlen(name), strlen(name2), ino, dir, offset, length};
    line.size = sizeof line + line.name + line.name2 + size;
    struct iovec parts[4] = {
        {&line, sizeof line}, {(void *)name, line.name}, {(void *)name2, line.name2}, {(void *)data, size}};
    if (syscall(SYS_writev, log, parts, 4) != (long)line.size)
        die(); /* a log with a hole would prove nothing */
    errno = kept;
}

void unknown(const char *call, const char *path)
{
    int log = enter(path);
    put(log, UNKNOWN, 0, 0, call, path, 0, 0, NULL, 0);
    leave(log);
}

/* For scripts: say something at this place of the log. */
__attribute__((visibility("default"))) void powerloss_note(const char *text)
{
    if (off())
        return;
    int log = enter(NULL);
    put(log, NOTE, 0, 0, text, "", 0, 0, NULL, 0);
    leave(log);
}
