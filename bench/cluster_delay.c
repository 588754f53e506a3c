/* Hold every packet that enters some network namespaces back for a fixed time.
 *
 *     cluster_delay MICROSECONDS FD...
 *
 * Each FD is an open /proc/PID/ns/net. In that namespace iptables hands the packets to netfilter queue 0. The kernel
 * keeps the packets; this program gets their ids, notes when each is due, and lets all that are due go with one
 * message a namespace. The delay is the same for all packets, so they fall due in the order in which they came, and
 * one ring serves all namespaces. bench/cluster.py runs it where the kernel has no netem. It prints "ready".
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define MAX_NAMESPACES 256
#define RING (1u << 20) /* packets held at a time, all namespaces together; a power of 2 */
#define QUEUE_LENGTH 65535
#define SOCKET_BUFFER (64 << 20)

struct packet {
    uint64_t due; /* ns */
    uint32_t id;
    uint32_t namespace;
};

static struct packet ring[RING];
static uint32_t first, end; /* ring[first % RING] is due next; first == end: none is held */
static struct pollfd sockets[MAX_NAMESPACES];

static void fail(const char *what) {
    fprintf(stderr, "cluster_delay: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* ---- what the kernel is told ---- */

struct message {
    struct nlmsghdr header;
    struct nfgenmsg family;
    char attributes[64];
};

static struct message begin(int type, int flags) {
    struct message message = {.family = {.nfgen_family = AF_UNSPEC, .version = NFNETLINK_V0, .res_id = htons(0)}};
    message.header.nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | type;
    message.header.nlmsg_flags = NLM_F_REQUEST | flags;
    message.header.nlmsg_len = NLMSG_LENGTH(sizeof message.family);
    return message;
}

static void attach(struct message *message, int type, const void *data, size_t size) {
    struct nlattr *attribute = (struct nlattr *)((char *)message + message->header.nlmsg_len);
    attribute->nla_type = type;
    attribute->nla_len = NLA_HDRLEN + size;
    memcpy((char *)attribute + NLA_HDRLEN, data, size);
    message->header.nlmsg_len += NLA_ALIGN(attribute->nla_len);
}

static void tell(int fd, const struct message *message) {
    while (send(fd, message, message->header.nlmsg_len, 0) < 0)
        if (errno != EINTR && errno != EAGAIN && errno != ENOBUFS)
            fail("netlink send");
}

/* Send a setting and wait for the kernel's yes. */
static void set(int fd, int type, const void *data, size_t size, const char *what) {
    struct message message = begin(NFQNL_MSG_CONFIG, NLM_F_ACK);
    attach(&message, type, data, size);
    if (type == NFQA_CFG_FLAGS)
        attach(&message, NFQA_CFG_MASK, data, size);
    tell(fd, &message);
    char answer[4096];
    if (recv(fd, answer, sizeof answer, 0) < (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr)))
        fail(what);
    errno = -((struct nlmsgerr *)NLMSG_DATA((struct nlmsghdr *)answer))->error;
    if (errno)
        fail(what);
}

static int open_queue(int namespace) {
    if (setns(namespace, CLONE_NEWNET))
        fail("setns");
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER);
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address))
        fail("netlink socket");
    int size = SOCKET_BUFFER, yes = 1;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
    setsockopt(fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, &yes, sizeof yes);

    struct nfqnl_msg_config_cmd bind_queue = {.command = NFQNL_CFG_CMD_BIND, .pf = htons(AF_INET)};
    set(fd, NFQA_CFG_CMD, &bind_queue, sizeof bind_queue, "NFQUEUE");
    uint32_t length = htonl(QUEUE_LENGTH);
    set(fd, NFQA_CFG_QUEUE_MAXLEN, &length, sizeof length, "NFQUEUE length");
    /* GSO: a packet of several segments stays one. FAIL_OPEN: a full queue lets packets pass instead of losing them. */
    uint32_t flags = htonl(NFQA_CFG_F_GSO | NFQA_CFG_F_FAIL_OPEN);
    set(fd, NFQA_CFG_FLAGS, &flags, sizeof flags, "NFQUEUE flags");
    /* Last, because from here on packets come: nothing but what is said about them, none of their bytes. */
    struct nfqnl_msg_config_params copy = {.copy_range = htonl(0), .copy_mode = NFQNL_COPY_META};
    struct message message = begin(NFQNL_MSG_CONFIG, 0);
    attach(&message, NFQA_CFG_PARAMS, &copy, sizeof copy);
    tell(fd, &message);
    return fd;
}

/* ---- packets ---- */

static void release_due(int num_namespaces) {
    uint32_t last[MAX_NAMESPACES];
    char any[MAX_NAMESPACES] = {0};
    uint64_t time = now();
    for (; first != end && ring[first % RING].due <= time; first++) {
        struct packet *packet = &ring[first % RING];
        last[packet->namespace] = packet->id;
        any[packet->namespace] = 1;
    }
    for (int i = 0; i < num_namespaces; i++) {
        if (!any[i])
            continue;
        struct nfqnl_msg_verdict_hdr accept = {htonl(NF_ACCEPT), last[i]}; /* this id and all before it */
        struct message message = begin(NFQNL_MSG_VERDICT_BATCH, 0);
        attach(&message, NFQA_VERDICT_HDR, &accept, sizeof accept);
        tell(sockets[i].fd, &message);
    }
}

static void hold(const struct nlmsghdr *header, int namespace, uint64_t due) {
    if (header->nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET))
        return;
    const char *attributes = (const char *)NLMSG_DATA(header) + NLMSG_ALIGN(sizeof(struct nfgenmsg));
    const char *stop = (const char *)header + header->nlmsg_len;
    while (stop - attributes >= NLA_HDRLEN) {
        const struct nlattr *attribute = (const struct nlattr *)attributes;
        if (attribute->nla_len < NLA_HDRLEN || attribute->nla_len > stop - attributes)
            return;
        if ((attribute->nla_type & NLA_TYPE_MASK) == NFQA_PACKET_HDR) {
            const struct nfqnl_msg_packet_hdr *packet = (const void *)(attributes + NLA_HDRLEN);
            ring[end++ % RING] = (struct packet){due, packet->packet_id, namespace};
            return;
        }
        attributes += NLA_ALIGN(attribute->nla_len);
    }
}

static void read_packets(int namespace, uint64_t delay) {
    static char buffer[1 << 17];
    ssize_t size;
    while (end - first < RING / 2 && (size = recv(sockets[namespace].fd, buffer, sizeof buffer, MSG_DONTWAIT)) > 0) {
        uint64_t due = now() + delay;
        unsigned left = size;
        for (struct nlmsghdr *header = (void *)buffer; NLMSG_OK(header, left); header = NLMSG_NEXT(header, left))
            hold(header, namespace, due);
    }
}

/* Sleep until a packet comes or the next one is due. */
static void wait_for_packets(int num_namespaces) {
    struct timespec timeout = {0, 0};
    if (first != end) {
        uint64_t time = now(), due = ring[first % RING].due, left = due > time ? due - time : 0;
        timeout.tv_sec = left / 1000000000;
        timeout.tv_nsec = left % 1000000000;
    }
    ppoll(sockets, num_namespaces, first != end ? &timeout : NULL, NULL);
}

int main(int argc, char **argv) {
    int num_namespaces = argc - 2;
    if (num_namespaces < 1 || num_namespaces > MAX_NAMESPACES) {
        fprintf(stderr, "usage: cluster_delay MICROSECONDS FD...\n");
        return 2;
    }
    uint64_t delay = atof(argv[1]) * 1000;
    for (int i = 0; i < num_namespaces; i++)
        sockets[i] = (struct pollfd){.fd = open_queue(atoi(argv[i + 2])), .events = POLLIN};
    /* Before all ordinary processes: a delay that waits for a free core would be longer under load. */
    struct sched_param priority = {.sched_priority = 50};
    if (sched_setscheduler(0, SCHED_FIFO, &priority))
        fprintf(stderr, "cluster_delay: no real-time priority: %s\n", strerror(errno));
    puts("ready");
    fflush(stdout);
    for (;;) {
        release_due(num_namespaces);
        wait_for_packets(num_namespaces);
        for (int i = 0; i < num_namespaces; i++)
            if (sockets[i].revents)
                read_packets(i, delay);
    }
}
