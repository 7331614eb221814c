// nbdload: an NBD client that asks faster than servers answer.
//
// One thread a connection. All requests that are free to go leave in one sendmsg; one large receive takes in all replies
// that have come; the clock is read once for each of these, not for each request. Every reply is checked: magic, known
// cookie, no error; with --verify its bytes too, against a pattern of (offset, generation) that no other write has.
//
//   nbdload --uri nbd://HOST:PORT/EXPORT | nbd+unix:///EXPORT?socket=PATH
//           [--mode read|write|randread|randwrite|randrw] [--write-percent 50] [--connections 1] [--depth 32] [--block 4096]
//           [--seconds 5] [--warmup 0.5] [--requests N] [--range BYTES] [--seed N] [--flush-every N] [--fua-percent P]
//           [--structured] [--fill] [--verify] [--pid SERVER]
//   nbdload --uri ... --idle N [--hold SECONDS] [--pid SERVER]       opens N connections (a %d in the export name counts)
//
// Prints one JSON object. Exit status: 0; 1 a wrong reply, a wrong byte or an error reply; 64 bad usage.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH };
enum { RECEIVE_BYTES = 256 << 10, MAX_DEPTH = 1024, MAX_CONNECTIONS = 4096, BUCKETS = 64 * 32 };

struct __attribute__((packed)) request { uint32_t magic; uint16_t flags, type; uint64_t cookie, offset; uint32_t length; };

static struct {
  char host[256], port[16], path[108], name[4097];
  bool is_unix, structured, fill, verify, random, pid_set;
  int connections, depth, write_percent, fua_percent, idle;
  uint32_t block;
  uint64_t range, seed, flush_every, requests;
  double seconds, warmup, hold;
  long pid;
} o = { .connections = 1, .depth = 32, .block = 4096, .seconds = 5, .warmup = 0.5, .seed = 1, .hold = 1, .random = true };

static atomic_int phase;  // 0 warming up, 1 measured, 2 over

static void die(int status, const char *format, ...) {
  va_list a;
  va_start(a, format);
  fputs("nbdload: ", stderr);
  vfprintf(stderr, format, a);
  fputc('\n', stderr);
  exit(status);
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static uint64_t next_random(uint64_t *s) { return mix(*s += 0x9e3779b97f4a7c15u); }

// The bytes of generation `generation` of the block at `offset`; half of them compress, as file-system data does.
static void pattern(void *to, uint64_t offset, uint64_t generation, uint32_t length) {
  uint64_t base = mix(offset ^ mix(generation ^ o.seed << 32)), *w = to;
  for (uint32_t i = 0; i < length / 8; i++) w[i] = i & 1 ? base + i : mix(base + i);
}

static bool matches(const void *bytes, uint64_t offset, uint64_t generation, uint32_t length) {
  uint64_t base = mix(offset ^ mix(generation ^ o.seed << 32));
  const uint64_t *w = bytes;
  for (uint32_t i = 0; i < length / 8; i++) if (w[i] != (i & 1 ? base + i : mix(base + i))) return false;
  return true;
}

// ---- the other process

static double cpu_seconds(long pid) {
  char path[64], line[1024];
  unsigned long user = 0, system = 0;
  snprintf(path, sizeof path, "/proc/%ld/stat", pid);
  FILE *f = fopen(path, "r");
  if (!f || !fgets(line, sizeof line, f)) die(1, "no process %ld", pid);
  fclose(f);
  char *p = strrchr(line, ')');
  if (!p || sscanf(p + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2) die(1, "cannot read %s", path);
  return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static long rss_kib(long pid) {
  char path[64], line[256];
  long kib = -1;
  snprintf(path, sizeof path, "/proc/%ld/status", pid);
  FILE *f = fopen(path, "r");
  if (!f) die(1, "no process %ld", pid);
  while (fgets(line, sizeof line, f)) if (sscanf(line, "VmRSS: %ld", &kib) == 1) break;
  fclose(f);
  return kib;
}

// ---- handshake

static void read_all(int fd, void *to, size_t n) {
  for (char *p = to; n;) {
    ssize_t k = recv(fd, p, n, 0);
    if (k == 0) die(1, "the server closed the connection in the handshake");
    if (k < 0) { if (errno == EINTR) continue; die(1, "handshake: %s", strerror(errno)); }
    p += k, n -= (size_t)k;
  }
}

static void write_all(int fd, const void *from, size_t n) {
  for (const char *p = from; n;) {
    ssize_t k = send(fd, p, n, MSG_NOSIGNAL);
    if (k < 0) { if (errno == EINTR) continue; die(1, "handshake: %s", strerror(errno)); }
    p += k, n -= (size_t)k;
  }
}

static int dial(void) {
  int fd = -1, one = 1;
  if (o.is_unix) {
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    strcpy(a.sun_path, o.path);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&a, sizeof a)) die(1, "%s: %s", o.path, strerror(errno));
    return fd;
  }
  struct addrinfo hint = { .ai_socktype = SOCK_STREAM }, *list, *a;
  int e = getaddrinfo(o.host, o.port, &hint, &list);
  if (e) die(1, "%s: %s", o.host, gai_strerror(e));
  for (a = list; a; a = a->ai_next) {
    fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && !connect(fd, a->ai_addr, a->ai_addrlen)) break;
    if (fd >= 0) close(fd);
    fd = -1;
  }
  freeaddrinfo(list);
  if (fd < 0) die(1, "%s:%s: %s", o.host, o.port, strerror(errno));
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

static void option(int fd, uint32_t number, const void *data, uint32_t length) {
  struct __attribute__((packed)) { uint64_t magic; uint32_t number, length; } h
    = { htobe64(0x49484156454f5054u), htobe32(number), htobe32(length) };
  write_all(fd, &h, sizeof h);
  write_all(fd, data, length);
}

// One reply to an option: its type; up to `room` bytes of its data go to `data`.
static uint32_t option_reply(int fd, uint32_t number, void *data, uint32_t room, uint32_t *length) {
  struct __attribute__((packed)) { uint64_t magic; uint32_t number, type, length; } h;
  read_all(fd, &h, sizeof h);
  if (be64toh(h.magic) != 0x3e889045565a9u || be32toh(h.number) != number) die(1, "not an answer to option %u", number);
  *length = be32toh(h.length);
  if (*length > room) die(1, "an option reply of %u bytes", *length);
  read_all(fd, data, *length);
  return be32toh(h.type);
}

// Connects and negotiates; the size of the export goes to *size.
static int attach(const char *name, uint64_t *size) {
  int fd = dial();
  struct __attribute__((packed)) { uint64_t magic, option; uint16_t flags; } hello;
  read_all(fd, &hello, sizeof hello);
  if (be64toh(hello.magic) != 0x4e42444d41474943u || be64toh(hello.option) != 0x49484156454f5054u) die(1, "not a newstyle NBD server");
  uint32_t flags = htobe32(be16toh(hello.flags) & 3), length;
  write_all(fd, &flags, 4);
  unsigned char data[8192];
  if (o.structured) {
    option(fd, 8, "", 0);
    if (option_reply(fd, 8, data, sizeof data, &length) != 1) die(1, "no structured replies here");
  }
  uint32_t n = (uint32_t)strlen(name), net = htobe32(n);
  memcpy(data, &net, 4), memcpy(data + 4, name, n), memset(data + 4 + n, 0, 2);
  option(fd, 7, data, 6 + n);
  for (*size = 0;;) {
    uint32_t type = option_reply(fd, 7, data, sizeof data - 1, &length);
    if (type == 1) break;
    if (type & 0x80000000u) data[length] = 0, die(1, "export %s refused (%#x): %s", name, type, data);
    if (type == 3 && length >= 12 && data[0] == 0 && data[1] == 0) memcpy(size, data + 2, 8), *size = be64toh(*size);
  }
  if (!*size) die(1, "the server told no size");
  return fd;
}

// ---- one connection's load

struct slot { uint64_t offset, sent_ns; uint32_t block, generation; uint8_t type; bool busy, measured; unsigned char *bytes; };

struct worker {
  pthread_t thread;
  int fd, index, in_flight;
  uint64_t random, size, first_block, blocks, next_block, issued, reading_back;
  struct slot *slots;
  int *free_slots, free_count;
  struct request *headers;
  int next_header;
  struct iovec *out;
  int out_first, out_count;
  unsigned char *received, *junk;
  uint32_t *generations;  // by block of this worker's part; 0 never written
  unsigned char *taken;
  uint64_t histogram[BUCKETS], max_ns;
  atomic_ullong done, bytes;
  uint64_t errors, mismatches, checked;
};

static int bucket(uint64_t ns) {  // 32 steps for each power of two: 3 %
  if (ns < 32) return (int)ns;
  int top = 63 - __builtin_clzll(ns);
  return (top - 4) * 32 + (int)((ns >> (top - 5)) & 31);
}

static uint64_t bucket_ns(int b) { return b < 32 ? (uint64_t)b : (uint64_t)(32 + b % 32) << (b / 32 - 1); }

static void enqueue(struct worker *w, void *bytes, size_t length) {
  if (w->out_count) {
    struct iovec *last = &w->out[w->out_first + w->out_count - 1];
    if ((char *)last->iov_base + last->iov_len == bytes) { last->iov_len += length; return; }
  } else w->out_first = 0;
  w->out[w->out_first + w->out_count++] = (struct iovec){ bytes, length };
}

static void start(struct worker *w, uint8_t type, uint64_t block, bool fua, bool measured) {
  int i = w->free_slots[--w->free_count];
  struct slot *s = &w->slots[i];
  s->type = type, s->block = (uint32_t)block, s->busy = true, s->measured = measured, s->sent_ns = 0;
  s->offset = type == CMD_FLUSH ? 0 : (w->first_block + block) * o.block;
  struct request *h = &w->headers[w->next_header];
  w->next_header = (w->next_header + 1) % (2 * o.depth);
  *h = (struct request){ htobe32(0x25609513), htobe16(fua), htobe16(type), (uint64_t)i | (uint64_t)s->offset << 12,
    htobe64(s->offset), htobe32(type == CMD_FLUSH ? 0 : o.block) };
  enqueue(w, h, sizeof *h);
  if (o.verify && type != CMD_FLUSH) w->taken[block] = 1;
  if (type == CMD_WRITE) {
    if (o.verify) s->generation = w->generations[block] + 1, pattern(s->bytes, s->offset, s->generation, o.block);
    enqueue(w, o.verify ? s->bytes : w->junk + (s->offset / o.block & 15) * 64, o.block);
  } else if (o.verify) s->generation = w->generations[block];
  w->in_flight++, w->issued++;
}

// Fills the free slots with what the mode asks for.
static void issue(struct worker *w, int now) {
  while (w->free_count) {
    if (w->reading_back) {  // the last pass: every block that was written
      while (w->next_block < w->blocks && !w->generations[w->next_block]) w->next_block++;
      if (w->next_block == w->blocks) return;
      start(w, CMD_READ, w->next_block++, false, false);
      continue;
    }
    if (now == 2 || (o.requests && w->issued >= o.requests)) return;
    if (o.flush_every && w->issued % o.flush_every == o.flush_every - 1) { start(w, CMD_FLUSH, 0, false, false); continue; }
    uint64_t r = next_random(&w->random), b = o.random ? (uint64_t)(((__uint128_t)r * w->blocks) >> 64) : w->next_block++ % w->blocks;
    if (o.verify) while (w->taken[b]) b = (b + 1) % w->blocks;
    bool write = (int)(mix(r) % 100) < o.write_percent;
    start(w, write ? CMD_WRITE : CMD_READ, b, write && (int)(mix(r + 1) % 100) < o.fua_percent, now == 1);
  }
}

static void finish(struct worker *w, struct slot *s, uint64_t now, bool failed) {
  if (failed) w->errors++;
  else if (s->type == CMD_READ && o.verify && s->generation) {
    w->checked++;
    if (!matches(s->bytes, s->offset, s->generation, o.block)) {
      if (w->mismatches++ < 5) fprintf(stderr, "nbdload: wrong bytes at %lu (generation %u)\n", s->offset, s->generation);
    }
  } else if (s->type == CMD_WRITE && o.verify) w->generations[s->block] = s->generation;
  if (o.verify && s->type != CMD_FLUSH) w->taken[s->block] = 0;
  if (s->measured) {
    uint64_t ns = now - s->sent_ns;
    w->histogram[bucket(ns)]++;
    if (ns > w->max_ns) w->max_ns = ns;
  }
  if (s->type != CMD_FLUSH) {
    atomic_fetch_add_explicit(&w->done, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&w->bytes, o.block, memory_order_relaxed);
  }
  s->busy = false, w->in_flight--;
  w->free_slots[w->free_count++] = (int)(s - w->slots);
}

static void flush_out(struct worker *w, uint64_t now) {
  while (w->out_count) {
    struct msghdr m = { .msg_iov = w->out + w->out_first, .msg_iovlen = (size_t)(w->out_count < 1024 ? w->out_count : 1024) };
    ssize_t k = sendmsg(w->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (k < 0) {
      if (errno == EAGAIN) break;
      if (errno == EINTR) continue;
      die(1, "send: %s", strerror(errno));
    }
    while (k) {
      struct iovec *v = &w->out[w->out_first];
      size_t n = (size_t)k < v->iov_len ? (size_t)k : v->iov_len;
      v->iov_base = (char *)v->iov_base + n, v->iov_len -= n, k -= (ssize_t)n;
      if (!v->iov_len) w->out_first++, w->out_count--;
    }
  }
  if (w->out_first > 2 * MAX_DEPTH) {
    memmove(w->out, w->out + w->out_first, sizeof *w->out * (size_t)w->out_count);
    w->out_first = 0;
  }
  for (int i = 0; i < o.depth; i++) if (w->slots[i].busy && !w->slots[i].sent_ns) w->slots[i].sent_ns = now;
}

static struct slot *slot_of(struct worker *w, uint64_t cookie) {
  uint64_t i = cookie & 4095;
  if (i >= (uint64_t)o.depth || !w->slots[i].busy || cookie != (i | w->slots[i].offset << 12)) die(1, "a reply with an unknown cookie %#lx", cookie);
  return &w->slots[i];
}

// Runs until the phase is 2 (or the number of requests is reached) and every reply is in.
static void drive(struct worker *w) {
  size_t have = 0;             // bytes in w->received
  struct slot *current = NULL; // whose payload is coming
  uint64_t left = 0;           // of that payload
  unsigned char *to = NULL;    // where it goes; NULL: nowhere
  bool ends = false, failed = false;
  for (;;) {
    issue(w, atomic_load_explicit(&phase, memory_order_relaxed));
    if (!w->in_flight) return;
    if (w->out_count) flush_out(w, now_ns());
    if (w->out_count) {
      struct pollfd p = { w->fd, POLLIN | POLLOUT, 0 };
      if (poll(&p, 1, -1) < 0 && errno != EINTR) die(1, "poll: %s", strerror(errno));
      if (!(p.revents & (POLLIN | POLLHUP | POLLERR))) continue;
    }
    ssize_t k = recv(w->fd, w->received + have, RECEIVE_BYTES - have, 0);
    if (k == 0) die(1, "the server closed the connection with %d requests in flight", w->in_flight);
    if (k < 0) { if (errno == EINTR) continue; die(1, "recv: %s", strerror(errno)); }
    have += (size_t)k;
    uint64_t now = now_ns();
    unsigned char *p = w->received, *end = p + have;
    for (;;) {
      if (left) {
        size_t n = (size_t)(end - p) < left ? (size_t)(end - p) : left;
        if (to) memcpy(to, p, n), to += n;
        p += n, left -= n;
        if (left) break;
        if (ends) finish(w, current, now, failed);
        continue;
      }
      if (end - p < 16) break;
      uint32_t magic, word;
      uint64_t cookie;
      memcpy(&magic, p, 4), magic = be32toh(magic);
      memcpy(&cookie, p + 8, 8);
      if (magic == 0x67446698) {  // simple: magic, error, cookie, payload
        memcpy(&word, p + 4, 4);
        current = slot_of(w, cookie);
        if (o.structured && current->type == CMD_READ) die(1, "a simple reply to a read where structured ones were agreed");
        p += 16, failed = word != 0, ends = true;
        if (failed || current->type != CMD_READ) { finish(w, current, now, failed); continue; }
        left = o.block, to = o.verify ? current->bytes : NULL;
      } else if (magic == 0x668e33ef && o.structured) {  // chunk: magic, flags, type, cookie, length
        if (end - p < 20) break;
        uint16_t flags, type;
        memcpy(&flags, p + 4, 2), memcpy(&type, p + 6, 2), memcpy(&word, p + 16, 4);
        flags = be16toh(flags), type = be16toh(type), word = be32toh(word);
        if (end - p < (type == 1 ? 28 : type == 2 ? 32 : 20)) break;
        current = slot_of(w, cookie);
        ends = flags & 1, failed = type >> 15, to = NULL, left = word;
        p += 20;
        if (type == 1 || type == 2) {
          if (type == 1 ? word <= 8 : word != 12) die(1, "a chunk of type %u and length %u", type, word);
          uint64_t offset, span = left - 8;
          memcpy(&offset, p, 8), offset = be64toh(offset);
          p += 8, left -= 8;
          if (type == 2) memcpy(&word, p, 4), p += 4, left = 0, span = be32toh(word);
          if (current->type != CMD_READ || offset < current->offset || offset + span > current->offset + o.block) die(1, "a chunk outside its request");
          if (o.verify && type == 1) to = current->bytes + (offset - current->offset);
          if (o.verify && type == 2) memset(current->bytes + (offset - current->offset), 0, span);
        }
        if (!left && ends) finish(w, current, now, failed);
      } else die(1, "reply magic %#x", magic);
    }
    have = (size_t)(end - p);
    memmove(w->received, p, have);
  }
}

static void *run(void *arg) {
  struct worker *w = arg;
  drive(w);
  if (o.verify && o.write_percent) {
    w->next_block = 0, w->reading_back = 1;
    drive(w);
  }
  struct request h = { htobe32(0x25609513), 0, htobe16(CMD_DISC), 0, 0, 0 };
  write_all(w->fd, &h, sizeof h);
  char c;
  while (recv(w->fd, &c, 1, 0) < 0 && errno == EINTR) {}
  close(w->fd);
  return NULL;
}

static void prepare(struct worker *w, int index, uint64_t size) {
  uint64_t range = o.range && o.range < size ? o.range : size, all = range / o.block;
  w->index = index, w->size = size, w->random = mix(o.seed * 1000 + (uint64_t)index);
  w->first_block = o.verify || !o.random ? all * (uint64_t)index / (uint64_t)o.connections : 0;
  w->blocks = o.verify || !o.random ? all * (uint64_t)(index + 1) / (uint64_t)o.connections - w->first_block : all;
  if (w->blocks < (uint64_t)o.depth) die(64, "the range is too small for this depth and block size");
  size_t depth = (size_t)o.depth;
  w->slots = calloc(depth, sizeof *w->slots);
  w->free_slots = calloc(depth, sizeof *w->free_slots);
  w->headers = calloc(2 * depth, sizeof *w->headers);
  w->out = calloc(4 * MAX_DEPTH + 4 * depth, sizeof *w->out);
  w->received = malloc(RECEIVE_BYTES);
  w->junk = malloc(o.block + 1024);
  if (o.verify && w->blocks >> 32) die(64, "--verify needs a smaller --range");
  w->generations = o.verify ? calloc(w->blocks, sizeof *w->generations) : NULL;
  w->taken = o.verify ? calloc(w->blocks, 1) : NULL;
  if (!w->slots || !w->free_slots || !w->headers || !w->out || !w->received || !w->junk || (o.verify && (!w->generations || !w->taken)))
    die(1, "out of memory");
  pattern(w->junk, o.seed, (uint64_t)index, (o.block + 1024) & ~7u);
  for (size_t i = 0; i < depth; i++) {
    if (o.verify && !(w->slots[i].bytes = malloc(o.block))) die(1, "out of memory");
    w->free_slots[w->free_count++] = (int)(depth - 1 - i);
  }
}

// Writes the whole range once, in order, in requests of 1 MiB.
static void fill(void) {
  uint64_t size;
  int fd = attach(o.name, &size);
  uint64_t range = o.range && o.range < size ? o.range : size;
  unsigned char *bytes = malloc(1 << 20);
  if (!bytes) die(1, "out of memory");
  for (uint64_t at = 0; at <= range; at += 1 << 20) {  // the last turn is the flush
    uint32_t length = at >= range ? 0 : range - at < 1 << 20 ? (uint32_t)(range - at) : 1 << 20;
    if (at < range) pattern(bytes, at, 0, (length + 7) & ~7u);
    if (!length && at < range) continue;
    struct request h = { htobe32(0x25609513), 0, htobe16(at < range ? CMD_WRITE : CMD_FLUSH), at, htobe64(at < range ? at : 0), htobe32(length) };
    write_all(fd, &h, sizeof h);
    write_all(fd, bytes, length);
    struct __attribute__((packed)) { uint32_t magic, error; uint64_t cookie; } r;
    read_all(fd, &r, sizeof r);
    if (be32toh(r.magic) != 0x67446698 || r.cookie != at) die(1, "a wrong reply while filling");
    if (r.error) die(1, "error %u while filling at %lu", be32toh(r.error), at);
    if (at >= range) break;
    if (range - at < 1 << 20) at = range - (1 << 20);
  }
  struct request h = { htobe32(0x25609513), 0, htobe16(CMD_DISC), 0, 0, 0 };
  write_all(fd, &h, sizeof h);
  char c;
  while (recv(fd, &c, 1, 0) < 0 && errno == EINTR) {}
  close(fd);
  free(bytes);
}

static int by_value(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

static void idle(void) {
  uint64_t *took = calloc((size_t)o.idle, sizeof *took), size = 0;
  int *fds = calloc((size_t)o.idle, sizeof *fds);
  long before = o.pid_set ? rss_kib(o.pid) : 0;
  char *mark = strstr(o.name, "%d"), name[4200];
  if (mark) *mark = 0;
  for (int i = 0; i < o.idle; i++) {
    snprintf(name, sizeof name, mark ? "%s%d%s" : "%s", o.name, i, mark ? mark + 2 : "");
    uint64_t t = now_ns();
    fds[i] = attach(name, &size);
    took[i] = now_ns() - t;
  }
  usleep((useconds_t)(o.hold * 1e6));
  long after = o.pid_set ? rss_kib(o.pid) : 0;
  qsort(took, (size_t)o.idle, sizeof *took, by_value);
  printf("{\"idle\": %d, \"size\": %lu, \"attach_us\": {\"p50\": %.1f, \"max\": %.1f}, \"rss_before_kib\": %ld, \"rss_after_kib\": %ld, \"kib_each\": %.1f}\n",
    o.idle, size, (double)took[o.idle / 2] / 1e3, (double)took[o.idle - 1] / 1e3, before, after, (double)(after - before) / o.idle);
  fflush(stdout);
  for (int i = 0; i < o.idle; i++) {
    struct request h = { htobe32(0x25609513), 0, htobe16(CMD_DISC), 0, 0, 0 };
    write_all(fds[i], &h, sizeof h);
  }
  for (int i = 0; i < o.idle; i++) {
    char c;
    while (recv(fds[i], &c, 1, 0) < 0 && errno == EINTR) {}
    close(fds[i]);
  }
}

static uint64_t bytes_of(const char *text) {
  char *end;
  uint64_t v = strtoull(text, &end, 10);
  int shift = *end == 0 ? 0 : *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : *end == 'T' ? 40 : -1;
  if (end == text || shift < 0 || (*end && end[1])) die(64, "not a size: %s", text);
  return v << shift;
}

static void parse_uri(const char *uri) {
  const char *p;
  if (!strncmp(uri, "nbd+unix:///", 12)) {
    const char *q = strstr(uri, "?socket=");
    if (!q || q > uri + 12 + 4096 || strlen(q + 8) >= sizeof o.path) die(64, "not a uri: %s", uri);
    o.is_unix = true;
    memcpy(o.name, uri + 12, (size_t)(q - uri - 12));
    strcpy(o.path, q + 8);
  } else if (!strncmp(uri, "nbd://", 6)) {
    p = uri + 6;
    size_t n = strcspn(p, ":/");
    if (n >= sizeof o.host) die(64, "not a uri: %s", uri);
    memcpy(o.host, p, n), p += n;
    strcpy(o.port, "10809");
    if (*p == ':') { n = strcspn(++p, "/"); if (n >= sizeof o.port) die(64, "not a uri: %s", uri); memcpy(o.port, p, n), o.port[n] = 0, p += n; }
    if (*p == '/') snprintf(o.name, sizeof o.name, "%s", p + 1);
  } else die(64, "not a uri: %s", uri);
}

int main(int argc, char **argv) {
  enum { URI = 1, MODE, WRITES, CONNECTIONS, DEPTH, BLOCK, SECONDS, WARMUP, REQUESTS, RANGE, SEED, FLUSH, FUA, STRUCTURED, FILL, VERIFY, PID, IDLE, HOLD };
  static const struct option options[] = { { "uri", 1, 0, URI }, { "mode", 1, 0, MODE }, { "write-percent", 1, 0, WRITES },
    { "connections", 1, 0, CONNECTIONS }, { "depth", 1, 0, DEPTH }, { "block", 1, 0, BLOCK }, { "seconds", 1, 0, SECONDS },
    { "warmup", 1, 0, WARMUP }, { "requests", 1, 0, REQUESTS }, { "range", 1, 0, RANGE }, { "seed", 1, 0, SEED }, { "flush-every", 1, 0, FLUSH },
    { "fua-percent", 1, 0, FUA }, { "structured", 0, 0, STRUCTURED }, { "fill", 0, 0, FILL }, { "verify", 0, 0, VERIFY }, { "pid", 1, 0, PID },
    { "idle", 1, 0, IDLE }, { "hold", 1, 0, HOLD }, { 0 } };
  const char *mode = NULL;
  int c, mixed = 50;
  bool has_uri = false;
  while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) switch (c) {
    case URI: parse_uri(optarg), has_uri = true; break;
    case MODE: mode = optarg; break;
    case WRITES: mixed = atoi(optarg); break;
    case CONNECTIONS: o.connections = atoi(optarg); break;
    case DEPTH: o.depth = atoi(optarg); break;
    case BLOCK: o.block = (uint32_t)bytes_of(optarg); break;
    case SECONDS: o.seconds = atof(optarg); break;
    case WARMUP: o.warmup = atof(optarg); break;
    case REQUESTS: o.requests = bytes_of(optarg); break;
    case RANGE: o.range = bytes_of(optarg); break;
    case SEED: o.seed = strtoull(optarg, NULL, 10); break;
    case FLUSH: o.flush_every = strtoull(optarg, NULL, 10); break;
    case FUA: o.fua_percent = atoi(optarg); break;
    case STRUCTURED: o.structured = true; break;
    case FILL: o.fill = true; break;
    case VERIFY: o.verify = true; break;
    case PID: o.pid = atol(optarg), o.pid_set = true; break;
    case IDLE: o.idle = atoi(optarg); break;
    case HOLD: o.hold = atof(optarg); break;
    default: return 64;
  }
  if (!has_uri || optind < argc) die(64, "usage: nbdload --uri nbd://HOST:PORT/EXPORT --mode randread (see the head of nbdload.c)");
  if (o.depth < 1 || o.depth > MAX_DEPTH || o.connections < 1 || o.connections > MAX_CONNECTIONS || o.block < 8 || o.block % 8 || o.block > 32 << 20)
    die(64, "depth 1 to 1024, connections 1 to 4096, block a multiple of 8 up to 32M");
  if (o.idle > 0) { idle(); return 0; }
  if (o.fill) fill();
  if (!mode) { if (o.fill) return 0; die(64, "no --mode"); }
  if (!strcmp(mode, "read")) o.random = false;
  else if (!strcmp(mode, "write")) o.random = false, o.write_percent = 100;
  else if (!strcmp(mode, "randwrite")) o.write_percent = 100;
  else if (!strcmp(mode, "randrw")) o.write_percent = mixed;
  else if (strcmp(mode, "randread")) die(64, "unknown mode %s", mode);

  struct worker *workers = calloc((size_t)o.connections, sizeof *workers);
  if (!workers) die(1, "out of memory");
  for (int i = 0; i < o.connections; i++) {
    uint64_t size;
    workers[i].fd = attach(o.name, &size);
    prepare(&workers[i], i, size);
  }
  if (o.requests) o.warmup = 0, phase = 1;
  uint64_t begin = now_ns(), done = 0, bytes = 0;
  for (int i = 0; i < o.connections; i++) if (pthread_create(&workers[i].thread, NULL, run, &workers[i])) die(1, "no thread");
  if (!o.requests) {
    usleep((useconds_t)(o.warmup * 1e6));
    phase = 1;
    begin = now_ns();
  }
  double server = o.pid_set ? cpu_seconds(o.pid) : 0, elapsed;
  struct rusage r0, r1;
  getrusage(RUSAGE_SELF, &r0);
  if (o.requests) for (int i = 0; i < o.connections; i++) pthread_join(workers[i].thread, NULL);
  else {
    for (int i = 0; i < o.connections; i++) done -= workers[i].done, bytes -= workers[i].bytes;
    usleep((useconds_t)(o.seconds * 1e6));
  }
  for (int i = 0; i < o.connections; i++) done += workers[i].done, bytes += workers[i].bytes;
  elapsed = (double)(now_ns() - begin) / 1e9;
  server = o.pid_set ? cpu_seconds(o.pid) - server : 0;
  getrusage(RUSAGE_SELF, &r1);
  phase = 2;
  if (!o.requests) for (int i = 0; i < o.connections; i++) pthread_join(workers[i].thread, NULL);

  uint64_t all[BUCKETS] = { 0 }, n = 0, longest = 0, errors = 0, mismatches = 0, checked = 0;
  for (int i = 0; i < o.connections; i++) {
    for (int b = 0; b < BUCKETS; b++) all[b] += workers[i].histogram[b], n += workers[i].histogram[b];
    errors += workers[i].errors, mismatches += workers[i].mismatches, checked += workers[i].checked;
    if (workers[i].max_ns > longest) longest = workers[i].max_ns;
  }
  double at[4], want[4] = { 0.5, 0.9, 0.99, 0.999 };
  for (int k = 0; k < 4; k++) {
    uint64_t seen = 0;
    int b = 0;
    while (b < BUCKETS - 1 && (seen += all[b]) < (uint64_t)(want[k] * (double)n)) b++;
    at[k] = (double)bucket_ns(b) / 1e3;
  }
  double client = (double)(r1.ru_utime.tv_sec - r0.ru_utime.tv_sec + r1.ru_stime.tv_sec - r0.ru_stime.tv_sec)
    + (double)(r1.ru_utime.tv_usec - r0.ru_utime.tv_usec + r1.ru_stime.tv_usec - r0.ru_stime.tv_usec) / 1e6;
  printf("{\"mode\": \"%s\", \"block\": %u, \"connections\": %d, \"depth\": %d, \"seconds\": %.3f, \"requests\": %lu, \"iops\": %.0f, \"mb_per_s\": %.1f, "
    "\"latency_us\": {\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"p999\": %.1f, \"max\": %.1f}, \"server_cpu_us_per_request\": %.3f, "
    "\"client_cpu_us_per_request\": %.3f, \"checked\": %lu, \"errors\": %lu, \"mismatches\": %lu}\n",
    mode, o.block, o.connections, o.depth, elapsed, done, (double)done / elapsed, (double)bytes / elapsed / 1e6, at[0], at[1], at[2], at[3],
    (double)longest / 1e3, done ? server * 1e6 / (double)done : 0, done ? client * 1e6 / (double)done : 0, checked, errors, mismatches);
  return errors || mismatches ? 1 : 0;
}
