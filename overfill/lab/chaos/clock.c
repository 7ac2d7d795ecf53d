/* Sets the wall clock of one process. Preloaded, this library adds an offset to CLOCK_REALTIME: the int64 of nanoseconds
 * in the file that OVERFILL_CHAOS_CLOCK names. Another process may change it at any time.
 *
 * When a machine's wall clock is set, waits until a time of day end early or late. They do so here too: each deadline is
 * converted to the kernel's clock when the wait begins, so a change during a wait takes effect at the next wait.
 * Monotonic clocks do not change.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t BILLION = 1000000000;
static const volatile int64_t *shift;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("OVERFILL_CHAOS_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof *shift, PROT_READ, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) shift = mapped;
  close(file);
}

static int64_t now_shift(void) { return shift ? *shift : 0; }

static void add(struct timespec *t, int64_t ns) {
  int64_t all = (int64_t)t->tv_sec * BILLION + t->tv_nsec + ns;
  if (all < 0) all = 0;
  t->tv_sec = all / BILLION;
  t->tv_nsec = all % BILLION;
}

#define REAL(name) ((__typeof__(name) *)real(&name##_real, #name))
static void *real(void **kept, const char *name) {
  if (!*kept) *kept = dlsym(RTLD_NEXT, name);
  return *kept;
}
static void *clock_gettime_real, *gettimeofday_real, *time_real, *pthread_cond_timedwait_real, *pthread_cond_clockwait_real,
    *sem_timedwait_real, *sem_clockwait_real, *pthread_mutex_timedlock_real, *syscall_real;

int clock_gettime(clockid_t clock, struct timespec *t) {
  int done = REAL(clock_gettime)(clock, t);
  if (done == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) add(t, now_shift());
  return done;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  int done = REAL(gettimeofday)(t, zone);
  if (done == 0 && t) {
    struct timespec exact = {t->tv_sec, t->tv_usec * 1000};
    add(&exact, now_shift());
    t->tv_sec = exact.tv_sec;
    t->tv_usec = exact.tv_nsec / 1000;
  }
  return done;
}

time_t time(time_t *t) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (t) *t = exact.tv_sec;
  return exact.tv_sec;
}

/* Converts a deadline on the shifted clock to the kernel's clock. */
static struct timespec unshifted(const struct timespec *t) {
  struct timespec kernel = *t;
  add(&kernel, -now_shift());
  return kernel;
}

int pthread_cond_timedwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, const struct timespec *restrict t) {
  /* The condition's attributes chose its clock, and cannot be read here. A time of day is billions of seconds, a
   * monotonic time (since boot) millions: deadlines below a billion are monotonic and pass unchanged. */
  if (t->tv_sec < 1000000000) return REAL(pthread_cond_timedwait)(c, m, t);
  struct timespec kernel = unshifted(t);
  return REAL(pthread_cond_timedwait)(c, m, &kernel);
}

int pthread_cond_clockwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, clockid_t clock,
                           const struct timespec *restrict t) {
  struct timespec kernel = clock == CLOCK_REALTIME ? unshifted(t) : *t;
  return REAL(pthread_cond_clockwait)(c, m, clock, &kernel);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict m, const struct timespec *restrict t) {
  struct timespec kernel = unshifted(t);
  return REAL(pthread_mutex_timedlock)(m, &kernel);
}

int sem_timedwait(sem_t *restrict s, const struct timespec *restrict t) {
  struct timespec kernel = unshifted(t);
  return REAL(sem_timedwait)(s, &kernel);
}

int sem_clockwait(sem_t *restrict s, clockid_t clock, const struct timespec *restrict t) {
  struct timespec kernel = clock == CLOCK_REALTIME ? unshifted(t) : *t;
  return REAL(sem_clockwait)(s, clock, &kernel);
}

long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long a[6];
  for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
  va_end(list);
  struct timespec kernel;
  if (number == SYS_futex && a[3] && (a[1] & FUTEX_CLOCK_REALTIME) && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET) {
    kernel = unshifted((const struct timespec *)a[3]);
    a[3] = (long)&kernel;
  }
  return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
