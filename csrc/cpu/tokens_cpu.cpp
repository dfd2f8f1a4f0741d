// Token outputs on a CPU: each thread takes an even share of the output's rows, in address order.
#include "tokens_cpu.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "work.h"

namespace fastpool::cpu {
namespace {

// The tokens [at, to) of all: body(b, row, n, at) for n of segment b in a row, which are number `at` and the following.
template <class Body>
void each_run(const PoolCall& call, const int64_t* cu_seqlens, int64_t at, int64_t to, const Body& body) {
  int64_t b = std::upper_bound(cu_seqlens, cu_seqlens + call.batch + 1, at) - cu_seqlens - 1;
  for (; at < to; ++b) {
    const Segment bounds = bounds_of(call, b);
    const int64_t stop = std::min(to, cu_seqlens[b + 1]);
    int64_t skip = at - cu_seqlens[b];  // tokens before the first one that is asked for
    for (int64_t row = bounds.begin; at < stop; row += kLeaf) {
      const int64_t n = std::min<int64_t>(kLeaf, bounds.end - row), real = count_real(call.mask, b, row, n);
      if (skip >= real) {
        skip -= real;
        continue;
      }
      if (real == n) {
        const int64_t taken = std::min(n - skip, stop - at);
        body(b, row + skip, taken, at);
        at += taken;
      } else {
        for (int64_t i = row; i < row + n && at < stop; ++i)
          if (is_real(call.mask, b, i) && --skip < 0) body(b, i, 1, at++);
      }
      skip = 0;
    }
  }
}

}  // namespace

bool count_tokens(const PoolCall& call, int64_t* cu_seqlens) {
  uint64_t seen = 0;
  int64_t total = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    cu_seqlens[b] = total;
    const Segment bounds = bounds_of(call, b);
    const int64_t n = bounds.end - bounds.begin;
    const bool all = !call.mask.boolean && all_real(call.mask, b, bounds.begin, n, seen);
    total += all ? n : count_real(call.mask, b, bounds.begin, n);
  }
  cu_seqlens[call.batch] = total;
  return call.mask.boolean || seen <= 1;
}

void tokens(const TokensCall& call, const Parallel& parallel) {
  const PoolCall& pool = call.pool;
  const int64_t row_bytes = pool.dim * size_of(pool.out_dtype), found = call.cu_seqlens[pool.batch];
  if (row_bytes == 0) return;
  const int64_t threads = threads_for(found * pool.dim * size_of(pool.dtype), parallel);
  spread(threads, threads, parallel, [&](int64_t t) {
    const Buffer x(padded_columns(pool.dim) * accumulator_size(pool.dtype));
    const auto copy = [&](int64_t b, int64_t row, int64_t n, int64_t at) {
      kernels().pack_tokens(pool, b, row, n, at, x.data);
    };
    each_run(pool, call.cu_seqlens, found * t / threads, found * (t + 1) / threads, copy);
  });
  std::memset(static_cast<char*>(pool.out) + found * row_bytes, 0,
              static_cast<size_t>((call.size - found) * row_bytes));
}

void tokens_backward(const TokensBackwardCall& call, const Parallel& parallel) {
  const PoolCall& pool = call.pool;
  const int64_t rows = call.out_rows(), found = call.cu_seqlens[pool.batch];
  if (rows * pool.width == 0) return;
  // Which rows of the gradient each row of the output adds up: those of row i stand from first[i] to first[i + 1], in
  // the order of segments.
  std::vector<int64_t> first(static_cast<size_t>(rows) + 2), sources(static_cast<size_t>(found));
  const auto each_token = [&](const auto& body) {
    each_run(pool, call.cu_seqlens, 0, found, [&](int64_t b, int64_t row, int64_t n, int64_t at) {
      const int64_t origin = call.padded ? b * pool.rows : 0;
      for (int64_t i = 0; i < n; ++i) body(static_cast<size_t>(origin + row + i), at + i);
    });
  };
  each_token([&](size_t row, int64_t) { ++first[row + 2]; });
  for (size_t row = 2; row < first.size(); ++row) first[row] += first[row - 1];
  each_token([&](size_t row, int64_t at) { sources[static_cast<size_t>(first[row + 1]++)] = at; });

  const int64_t threads = threads_for(rows * pool.width * size_of(pool.dtype), parallel);
  spread(threads, threads, parallel, [&](int64_t t) {
    kernels().scatter_tokens(call, first.data(), sources.data(), rows * t / threads, rows * (t + 1) / threads);
  });
}

}  // namespace fastpool::cpu
