/* Lets an MPICH process outlive its peers.
 *
 * When the peer of an endpoint is gone, UCX answers the start of an operation with a status in place of a request. The UCX
 * netmod of MPICH (seen in 5.0.2) takes that status for the address of a request and writes to it: the process that wanted
 * to send dies of SIGSEGV. This library stands between the two, under the names that the netmod calls, and turns "the
 * peer is gone" into "done at once": the message is dropped, as it would be if the peer had died a moment later.
 *
 * Any other failure (no memory, a bad argument) goes through as it is: to drop a message to a live peer without a word would
 * be worse than to die. With Open MPI, which handles these answers itself, everything goes through.
 *
 * It has to be in the process's global scope before the first call is bound. It links against nothing but libdl.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* The values of ucs_status_t (ucs/type/status.h), which are part of UCX's binary interface since 1.0. */
enum {
    IO_ERROR = -3,
    UNREACHABLE = -6,
    CANCELED = -16,
    TIMED_OUT = -20,
    REJECTED = -23,
    NOT_CONNECTED = -24,
    CONNECTION_RESET = -25,
    FIRST_LINK_FAILURE = -40, /* from here on down: link and endpoint failures, endpoint timeout */
    LAST = -100
};

static int peer_is_gone(intptr_t status)
{
    switch (status) {
    case IO_ERROR:
    case UNREACHABLE:
    case CANCELED:
    case TIMED_OUT:
    case REJECTED:
    case NOT_CONNECTED:
    case CONNECTION_RESET:
        return 1;
    default:
        return LAST < status && status <= FIRST_LINK_FAILURE;
    }
}

static int in_open_mpi(void)
{
    static int answer = -1; /* two threads may both find out: they find the same */
    if (answer < 0)
        answer = dlopen("libmpi.so.40", RTLD_NOLOAD | RTLD_LAZY) != NULL;
    return answer;
}

static void *answer(void *request)
{
    /* NULL is UCS_OK: complete, no request, no callback. */
    return peer_is_gone((intptr_t) request) && !in_open_mpi() ? NULL : request;
}

static void *real(const char *name)
{
    /* By name of the library first: when MPI was loaded into a local scope, RTLD_NEXT does not see it. */
    void *ucp = dlopen("libucp.so.0", RTLD_NOLOAD | RTLD_LAZY);
    void *function = ucp ? dlsym(ucp, name) : NULL;
    if (!function)
        function = dlsym(RTLD_NEXT, name);
    if (!function) {
        fprintf(stderr, "hoplite_mpi: %s was called, but no libucp.so.0 is loaded\n", name);
        abort();
    }
    return function;
}

#define GUARDED(name, parameters, arguments)                       \
    void *name parameters                                          \
    {                                                              \
        static void *(*function) parameters;                       \
        if (!function)                                             \
            function = (void *(*) parameters) real(#name);         \
        return answer(function arguments);                         \
    }

GUARDED(ucp_tag_send_nbx, (void *ep, const void *data, size_t count, uint64_t tag, const void *param),
        (ep, data, count, tag, param))
GUARDED(ucp_tag_send_sync_nbx, (void *ep, const void *data, size_t count, uint64_t tag, const void *param),
        (ep, data, count, tag, param))
GUARDED(ucp_am_send_nbx,
        (void *ep, unsigned id, const void *header, size_t header_size, const void *data, size_t count, const void *param),
        (ep, id, header, header_size, data, count, param))
GUARDED(ucp_put_nbx, (void *ep, const void *data, size_t count, uint64_t remote, void *key, const void *param),
        (ep, data, count, remote, key, param))
GUARDED(ucp_get_nbx, (void *ep, void *data, size_t count, uint64_t remote, void *key, const void *param),
        (ep, data, count, remote, key, param))
GUARDED(ucp_ep_flush_nbx, (void *ep, const void *param), (ep, param))
