/* What both C programs need: exact transfers over a stream socket, a clock, and a loud way to stop. */
#ifndef LUNA_BENCH_LINK_H
#define LUNA_BENCH_LINK_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>

static inline void stop(const char *what) {
    perror(what);
    exit(1);
}

static inline uint64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

/* 0 when the peer closed before the first byte, 1 when all bytes arrived; anything else ends the program. */
static inline int recv_exact(int socket, void *into, size_t length) {
    size_t done = 0;
    while (done < length) {
        ssize_t part = recv(socket, (char *)into + done, length - done, MSG_WAITALL);
        if (part == 0 && done == 0)
            return 0;
        if (part < 0 && errno == EINTR)
            continue;
        if (part < 0 && errno == ECONNRESET)
            return 0;
        if (part <= 0)
            stop("recv");
        done += (size_t)part;
    }
    return 1;
}

/* 0 when the peer is gone. */
static inline int send_exact(int socket, const void *from, size_t length) {
    size_t done = 0;
    while (done < length) {
        ssize_t part = send(socket, (const char *)from + done, length - done, MSG_NOSIGNAL);
        if (part < 0 && errno == EINTR)
            continue;
        if (part < 0 && (errno == EPIPE || errno == ECONNRESET))
            return 0;
        if (part <= 0)
            stop("send");
        done += (size_t)part;
    }
    return 1;
}

#endif
