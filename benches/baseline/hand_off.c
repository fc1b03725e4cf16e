/*
 * The hand-off server that a broker is measured against: one thread per connection, one blocking read and
 * one blocking write per request, memory laid out once and reused.
 * Usage: hand_off SOCKET_PATH
 *
 * A client opens with `struct opening`. In the two shared modes the server answers with one byte and a memfd
 * (SCM_RIGHTS) that holds two image slots and one latent slot, each on a page boundary; then requests and
 * replies are two integers each. In raw mode the bytes themselves follow: latent in, image out, no framing.
 */
#define _GNU_SOURCE
#include "link.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/un.h>
#include <unistd.h>

enum mode { IN_PLACE = 0, ONE_COPY = 1, RAW = 2 };
enum { MARKS = 16, PAGE = 4096, PATTERN_PERIOD = 251, SOCKET_BYTES = 4 << 20 };

struct opening {
    uint32_t mode;
    uint32_t latent_bytes;
    uint64_t image_bytes;
};
struct request {
    uint64_t sequence;
    uint64_t latent_bytes;
};
struct reply {
    uint64_t sequence;
    uint64_t offset;
};

static size_t whole_pages(size_t length) { return (length + PAGE - 1) / PAGE * PAGE; }

static float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu, fraction = half & 0x3ffu, bits;
    if (exponent == 0x1f) {
        bits = sign | 0x7f800000u | (fraction << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        float magnitude = (float)fraction / 16777216.0f;
        memcpy(&bits, &magnitude, sizeof bits);
        bits |= sign;
    }
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void mark(float *image, size_t image_bytes, const uint16_t *latent) {
    size_t step = image_bytes / sizeof *image / MARKS;
    for (size_t i = 0; i < MARKS; i++)
        image[i * step] = half_to_float(latent[i]);
}

/* Faults every page in, and gives the client something to compare the unmarked elements with. */
static void lay_pattern(float *image, size_t image_bytes) {
    for (size_t i = 0; i < image_bytes / sizeof *image; i++)
        image[i] = (float)(i % PATTERN_PERIOD);
}

static void *map(int memory, size_t length) {
    int flags = memory < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, flags | MAP_POPULATE, memory, 0);
    if (at == MAP_FAILED)
        stop("mmap");
    return at;
}

static void send_memory(int socket, int memory) {
    char byte = 0;
    struct iovec part = {.iov_base = &byte, .iov_len = 1};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &memory, sizeof memory);
    if (sendmsg(socket, &message, MSG_NOSIGNAL) != 1)
        stop("sendmsg");
}

static void serve_shared(int socket, struct opening open) {
    size_t stride = whole_pages(open.image_bytes);
    size_t total = 2 * stride + whole_pages(open.latent_bytes);
    int memory = memfd_create("hand-off", MFD_CLOEXEC);
    if (memory < 0 || ftruncate(memory, (off_t)total) != 0)
        stop("memfd");
    char *shared = map(memory, total);
    char *born = open.mode == ONE_COPY ? map(-1, stride) : NULL;
    if (born != NULL)
        lay_pattern((float *)born, open.image_bytes);
    lay_pattern((float *)shared, open.image_bytes);
    lay_pattern((float *)(shared + stride), open.image_bytes);
    send_memory(socket, memory);
    close(memory);

    const uint16_t *latent = (const uint16_t *)(shared + 2 * stride);
    struct request request;
    while (recv_exact(socket, &request, sizeof request)) {
        struct reply reply = {.sequence = request.sequence, .offset = (request.sequence & 1) * stride};
        char *slot = shared + reply.offset;
        if (born == NULL) {
            mark((float *)slot, open.image_bytes, latent);
        } else {
            mark((float *)born, open.image_bytes, latent);
            memcpy(slot, born, open.image_bytes);
        }
        if (!send_exact(socket, &reply, sizeof reply))
            break;
    }
    munmap(shared, total);
    if (born != NULL)
        munmap(born, stride);
}

static void serve_raw(int socket, struct opening open) {
    int length = SOCKET_BYTES;
    setsockopt(socket, SOL_SOCKET, SO_SNDBUF, &length, sizeof length);
    setsockopt(socket, SOL_SOCKET, SO_RCVBUF, &length, sizeof length);
    char *latent = map(-1, whole_pages(open.latent_bytes));
    char *image = map(-1, whole_pages(open.image_bytes));
    lay_pattern((float *)image, open.image_bytes);
    while (recv_exact(socket, latent, open.latent_bytes)) {
        mark((float *)image, open.image_bytes, (const uint16_t *)latent);
        if (!send_exact(socket, image, open.image_bytes))
            break;
    }
    munmap(latent, whole_pages(open.latent_bytes));
    munmap(image, whole_pages(open.image_bytes));
}

static void *serve(void *argument) {
    int socket = (int)(intptr_t)argument;
    struct opening open;
    if (recv_exact(socket, &open, sizeof open)) {
        if (open.latent_bytes < MARKS * sizeof(uint16_t) || open.image_bytes < MARKS * sizeof(float))
            fprintf(stderr, "hand_off: a tensor too small for %d marks\n", MARKS);
        else if (open.mode == RAW)
            serve_raw(socket, open);
        else
            serve_shared(socket, open);
    }
    close(socket);
    return NULL;
}

int main(int count, char **arguments) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (count != 2 || strlen(arguments[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: hand_off SOCKET_PATH (at most %zu bytes)\n", sizeof address.sun_path - 1);
        return 2;
    }
    memcpy(address.sun_path, arguments[1], strlen(arguments[1]));
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 16) != 0)
        stop("listen");
    for (;;) {
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0)
            stop("accept");
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)connection) != 0)
            stop("pthread_create");
        pthread_detach(thread);
    }
}
