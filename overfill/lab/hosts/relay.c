// Carries Ethernet frames between two TAP devices at a limited rate, each frame after a delay, and drops some of them.
//
// usage: relay FD FD SEED
//
// Each line on stdin, "NANOSECONDS SHARE RATE", sets the delay, the share of lost frames and the bytes per second (0
// means no limit), for each direction. The end of stdin ends the relay. It does in user space what the kernel's netem
// does, because many kernels lack netem.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum {
  kFrameBytes = 1536,  // an MTU of 1500, and the Ethernet header
  kMaxQueued = 8192,   // frames per direction; more are dropped, as by a full queue
  kBatch = 64,         // frames that are read before due frames are written
  // Frames in front of a limited rate; more are dropped. At least these bytes may wait, or what takes this time.
  kQueueBytes = 64 * 1024,
  kQueueNs = 100 * 1000 * 1000,
};

struct Frame {
  int64_t due;
  ssize_t size;
  char bytes[kFrameBytes];
};

struct Direction {
  int from, to;
  struct Frame *frames;  // ring of kMaxQueued frames
  uint32_t head, count;
  int64_t free_at;  // when the last frame has left a limited link
};

static int64_t delay_ns;
static double loss, rate;
static uint64_t random_state;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static double uniform(void) {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (double)(random_state >> 11) / 9007199254740992.0;
}

static void read_frames(struct Direction *d) {
  char dropped[kFrameBytes];
  for (int i = 0; i < kBatch; i++) {
    struct Frame *next = &d->frames[(d->head + d->count) % kMaxQueued];
    int64_t now = now_ns(), start = rate > 0 && d->free_at > now ? d->free_at : now;
    int full = d->count == kMaxQueued || (start - now > kQueueNs && (start - now) * 1e-9 * rate > kQueueBytes);
    int drop = full || (loss > 0 && uniform() < loss);
    ssize_t size = read(d->from, drop ? dropped : next->bytes, kFrameBytes);
    if (size <= 0) return;
    if (drop) continue;
    next->size = size;
    d->free_at = start + (rate > 0 ? (int64_t)(size * 1e9 / rate) : 0);
    next->due = d->free_at + delay_ns;
    d->count++;
  }
}

static void write_due_frames(struct Direction *d) {
  while (d->count && d->frames[d->head].due <= now_ns()) {
    struct Frame *frame = &d->frames[d->head];
    // A device that is down refuses the frame: the frame is lost, as on a cable that is pulled.
    if (write(d->to, frame->bytes, frame->size) < 0 && errno == EINTR) continue;
    d->head = (d->head + 1) % kMaxQueued;
    d->count--;
  }
  if (!d->count) d->head = 0;  // a short queue keeps to few pages of memory
}

static int read_settings(void) {  // returns 0 at the end of stdin
  char text[256];
  ssize_t size = read(STDIN_FILENO, text, sizeof text - 1);
  if (size <= 0) return 0;
  text[size] = 0;
  char *line = text;
  for (char *end; (end = strchr(line, '\n')); line = end + 1) {
    long long ns;
    double share, bytes;
    if (sscanf(line, "%lld %lf %lf", &ns, &share, &bytes) == 3) {
      delay_ns = ns;
      loss = share;
      rate = bytes;
    }
  }
  return 1;
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  int a = atoi(argv[1]), b = atoi(argv[2]);
  random_state = 88172645463325252ULL ^ strtoull(argv[3], NULL, 10);
  fcntl(a, F_SETFL, O_NONBLOCK);
  fcntl(b, F_SETFL, O_NONBLOCK);
  prctl(PR_SET_TIMERSLACK, 1);
  struct Direction directions[2] = {{a, b, NULL, 0, 0, 0}, {b, a, NULL, 0, 0, 0}};
  for (int i = 0; i < 2; i++) {
    directions[i].frames = calloc(kMaxQueued, sizeof(struct Frame));
    if (!directions[i].frames) return 1;
  }
  struct pollfd files[3] = {{STDIN_FILENO, POLLIN, 0}, {a, POLLIN, 0}, {b, POLLIN, 0}};
  for (;;) {
    int64_t due = INT64_MAX;
    for (int i = 0; i < 2; i++) {
      struct Direction *d = &directions[i];
      if (d->count && d->frames[d->head].due < due) due = d->frames[d->head].due;
    }
    struct timespec wait, *until = NULL;
    if (due != INT64_MAX) {
      int64_t ns = due - now_ns();
      if (ns < 0) ns = 0;
      wait = (struct timespec){ns / 1000000000, ns % 1000000000};
      until = &wait;
    }
    if (ppoll(files, 3, until, NULL) < 0 && errno != EINTR) return 1;
    if (files[0].revents && !read_settings()) return 0;
    for (int i = 0; i < 2; i++) {
      if (files[1 + i].revents & POLLERR) usleep(1000);  // a device that is down; do not spin
      if (files[1 + i].revents) read_frames(&directions[i]);
      write_due_frames(&directions[i]);
    }
  }
}
