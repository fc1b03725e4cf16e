/*
 * The control floor: 64 bytes there and 64 bytes back between two C processes over a Unix stream socket.
 * Usage: floor ITERATIONS WARM_UP CORE     (CORE -1 leaves placement to the scheduler)
 * Prints one JSON object.
 */
#define _GNU_SOURCE
#include "link.h"

#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

enum { MESSAGE_BYTES = 64 };

static void confine(int core) {
    cpu_set_t cores;
    if (core < 0)
        return;
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    if (sched_setaffinity(0, sizeof cores, &cores) != 0)
        stop("sched_setaffinity");
}

static void answer_until_closed(int socket) {
    char message[MESSAGE_BYTES];
    while (recv_exact(socket, message, sizeof message))
        if (!send_exact(socket, message, sizeof message))
            return;
}

static int ascending(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

int main(int count, char **arguments) {
    if (count != 4) {
        fprintf(stderr, "usage: floor ITERATIONS WARM_UP CORE\n");
        return 2;
    }
    long iterations = atol(arguments[1]), warm_up = atol(arguments[2]);
    if (iterations < 1 || warm_up < 0) {
        fprintf(stderr, "floor: ITERATIONS must be at least 1, WARM_UP at least 0\n");
        return 2;
    }
    confine(atoi(arguments[3]));

    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
        stop("socketpair");
    pid_t server = fork();
    if (server < 0)
        stop("fork");
    if (server == 0) {
        /* A client that is killed must not leave its server behind. */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(ends[0]);
        answer_until_closed(ends[1]);
        return 0;
    }
    close(ends[1]);

    uint64_t *durations = malloc((size_t)iterations * sizeof *durations);
    if (durations == NULL)
        stop("malloc");
    char message[MESSAGE_BYTES] = {0};
    for (long i = -warm_up; i < iterations; i++) {
        message[0] = (char)i;
        uint64_t started = now_ns();
        if (!send_exact(ends[0], message, sizeof message) || !recv_exact(ends[0], message, sizeof message))
            stop("the server is gone");
        uint64_t stopped = now_ns();
        if (message[0] != (char)i) {
            fprintf(stderr, "floor: the reply belongs to another request\n");
            return 1;
        }
        if (i >= 0)
            durations[i] = stopped - started;
    }
    close(ends[0]);
    waitpid(server, NULL, 0);

    qsort(durations, (size_t)iterations, sizeof *durations, ascending);
    printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"samples\": %ld}\n",
           (double)durations[iterations / 2] / 1e3,
           (double)durations[(long)((double)iterations * 0.99)] / 1e3, iterations);
    return 0;
}
