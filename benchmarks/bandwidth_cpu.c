// The floor: read n bytes once, in address order, and add them up. No pooling kernel can be faster, since it has to read
// the same bytes. Vector extensions instead of intrinsics: one loop, built for several instruction sets, on any CPU.
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

static volatile uint64_t sink;  // keeps the compiler from dropping the read

// Four accumulators hide the latency of the additions; loads stay in address order.
#define READER(name, target, bytes)                                                              \
  target static void name(const char* p, size_t n) {                                             \
    typedef uint64_t lanes __attribute__((vector_size(bytes), aligned(1), may_alias));           \
    lanes a = {0}, b = {0}, c = {0}, d = {0};                                                    \
    const char* const end = p + n / (4 * bytes) * (4 * bytes);                                   \
    for (; p != end; p += 4 * bytes) {                                                           \
      const lanes* v = (const lanes*)p;                                                          \
      a += v[0];                                                                                 \
      b += v[1];                                                                                 \
      c += v[2];                                                                                 \
      d += v[3];                                                                                 \
    }                                                                                            \
    a += b + c + d;                                                                              \
    uint64_t sum = 0;                                                                            \
    for (size_t i = 0; i < bytes / 8; ++i) sum += a[i];                                          \
    for (size_t i = 0; i < n % (4 * bytes); ++i) sum += (unsigned char)p[i];                     \
    sink = sum;                                                                                  \
  }

READER(read_16, , 16)
#ifdef __x86_64__
READER(read_32, __attribute__((target("avx2"))), 32)
READER(read_64, __attribute__((target("avx512f"))), 64)
#endif

// By vector width, in bytes: 16 anywhere, 32 and 64 where the CPU has them; a null pointer else.
typedef void (*reader)(const char*, size_t);
static reader reader_of(int width) {
  if (width == 16) return read_16;
#ifdef __x86_64__
  if (width == 32 && __builtin_cpu_supports("avx2")) return read_32;
  if (width == 64 && __builtin_cpu_supports("avx512f")) return read_64;
#endif
  return NULL;
}

int can_read(int width) { return reader_of(width) != NULL; }

// Reads, and returns the CPU time of this thread in seconds. The clock is read here, next to the loop, so that the floor
// carries nothing of the call from Python.
double timed_read(int width, const char* p, size_t n) {
  struct timespec before, after;
  const reader read = reader_of(width);
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
  read(p, n);
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
  return (double)(after.tv_sec - before.tv_sec) + 1e-9 * (double)(after.tv_nsec - before.tv_nsec);
}

// The bare loop: sums += row, one row after another, and nothing else: no mask, no bounds to check, no order that another
// backend could follow, no epilogue but the division. What it needs beyond the floor is what any pooling needs that walks
// in address order, since each row's sums have to be read and written as well.
#define BARE(name, target)                                                                       \
  target static void name(const void* tokens, int bfloat16, size_t rows, size_t width, float* sums) { \
    for (size_t c = 0; c < width; ++c) sums[c] = 0;                                              \
    for (size_t r = 0; r < rows; ++r) {                                                          \
      if (bfloat16) {                                                                            \
        const uint16_t* x = (const uint16_t*)tokens + r * width;                                 \
        for (size_t c = 0; c < width; ++c) {                                                     \
          const uint32_t bits = (uint32_t)x[c] << 16;                                            \
          float value;                                                                           \
          memcpy(&value, &bits, sizeof value);                                                   \
          sums[c] += value;                                                                      \
        }                                                                                        \
      } else {                                                                                   \
        const float* x = (const float*)tokens + r * width;                                       \
        for (size_t c = 0; c < width; ++c) sums[c] += x[c];                                      \
      }                                                                                          \
    }                                                                                            \
    for (size_t c = 0; c < width; ++c) sums[c] /= (float)rows;                                   \
  }

BARE(bare_generic, )
#ifdef __x86_64__
BARE(bare_avx2, __attribute__((target("avx2"))))
#endif

// Means of the segments of packed tokens, float32 [batch, width].
void bare_mean(const void* tokens, int bfloat16, const int64_t* cu_seqlens, size_t batch, size_t width, float* out) {
  for (size_t b = 0; b < batch; ++b) {
    const char* first = (const char*)tokens + (size_t)cu_seqlens[b] * width * (bfloat16 ? 2 : 4);
    const size_t rows = (size_t)(cu_seqlens[b + 1] - cu_seqlens[b]);
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) {
      bare_avx2(first, bfloat16, rows, width, out + b * width);
      continue;
    }
#endif
    bare_generic(first, bfloat16, rows, width, out + b * width);
  }
}
