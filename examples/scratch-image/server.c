/* An HTTP server in one static program: answers every request with a line of text.
   One thread, epoll, keep-alive; bodies by Content-Length are read and counted. */

#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HEAD_MAX = 65536, CONNECTIONS_MAX = 1024 };

struct connection {
    char head[HEAD_MAX + 1]; /* what has come of the present request's head */
    size_t used;
    size_t body_left; /* bytes of its body still to come */
    size_t body;      /* its whole length */
    int in_body;
};

static struct connection *connections[CONNECTIONS_MAX];
static unsigned long served;

/* The value of Content-Length in a head that ends in an empty line; -1 when it cannot be used. */
static long body_length(const char *head)
{
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, "content-length:", 15) == 0)
            return strtol(line + 17, NULL, 10);
        if (strncasecmp(line + 2, "transfer-encoding:", 18) == 0)
            return -1;
    }
    return 0;
}

static int answer(int fd, const char *status, size_t body, int head_only)
{
    char text[128], all[256];
    int length = snprintf(text, sizeof text, "hello from scratch: request %lu, %zu bytes\n", ++served, body);
    int size = snprintf(all, sizeof all, "HTTP/1.1 %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%s",
                        status, length, text);
    if (head_only)
        size -= length;
    return send(fd, all, (size_t)size, MSG_NOSIGNAL) == size;
}

/* Takes what has come. 0 when the connection is over. */
static int take(int fd, struct connection *c, char *data, size_t size)
{
    while (size > 0) {
        if (c->in_body) {
            size_t part = size < c->body_left ? size : c->body_left;
            c->body_left -= part;
            data += part;
            size -= part;
        } else {
            /* One byte at a time is plenty here: heads are short. */
            if (c->used == HEAD_MAX)
                return 0;
            c->head[c->used++] = *data++;
            size--;
            if (c->used < 4 || memcmp(c->head + c->used - 4, "\r\n\r\n", 4) != 0)
                continue;
            c->head[c->used] = '\0';
            long length = body_length(c->head);
            if (length < 0) {
                answer(fd, "411 Length Required", 0, 0);
                return 0;
            }
            c->body = c->body_left = (size_t)length;
            c->in_body = 1;
        }
        if (c->in_body && c->body_left == 0) {
            c->used = 0;
            c->in_body = 0;
            if (!answer(fd, "200 OK", c->body, strncmp(c->head, "HEAD ", 5) == 0))
                return 0;
        }
    }
    return 1;
}

static void end(int fd)
{
    free(connections[fd]);
    connections[fd] = NULL;
    close(fd);
}

int main(void)
{
    const char *text = getenv("PORT");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(text ? text : "8080"))};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 512)) {
        perror("cannot listen");
        return 1;
    }
    struct epoll_event wanted = {.events = EPOLLIN, .data.fd = listener}, ready[64];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &wanted);
    printf("listening on port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(poll, ready, 64, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) {
                int accepted = accept(listener, NULL, NULL);
                if (accepted < 0)
                    continue;
                if (accepted >= CONNECTIONS_MAX || !(connections[accepted] = calloc(1, sizeof **connections))) {
                    close(accepted);
                    continue;
                }
                setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                wanted.data.fd = accepted;
                epoll_ctl(poll, EPOLL_CTL_ADD, accepted, &wanted);
                continue;
            }
            static char data[65536];
            ssize_t size = read(fd, data, sizeof data);
            if (size < 0 && (errno == EINTR || errno == EAGAIN))
                continue;
            if (size <= 0 || !take(fd, connections[fd], data, (size_t)size))
                end(fd);
        }
    }
}
