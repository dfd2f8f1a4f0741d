// What cutting work up takes: memory for the kernels, and who does it.
#pragma once
#include <atomic>
#include <cstdlib>
#include <new>

#include "pool_cpu.h"

namespace fastpool::cpu {

// Memory on cache lines: a vector of sums that straddles two costs twice.
struct Buffer {
  explicit Buffer(int64_t bytes)
      : data(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64)))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  char* data;
};

// How many threads a call gets that touches so many bytes: waking them may cost more than they give.
inline int64_t threads_for(int64_t bytes, const Parallel& parallel) {
  constexpr int64_t serial = 128 << 10;
  return parallel.threads <= 1 || bytes <= serial ? 1 : parallel.threads;
}

// body(0) .. body(tasks - 1): whoever is free takes the next.
template <class Body>
void spread(int64_t threads, int64_t tasks, const Parallel& parallel, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t) {
    for (int64_t task; (task = next++) < tasks;) body(task);
  };
  if (threads == 1)
    work(0);
  else
    parallel.run(threads, work);
}

}  // namespace fastpool::cpu
