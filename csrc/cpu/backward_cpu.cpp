// The gradient of pooling on a CPU: each thread takes an even share of the output's rows, in address order, and sweeps
// over the beginnings and ends of segments, so that it knows which of them overlap the rows between two of these.
#include <algorithm>
#include <cstring>
#include <deque>
#include <stdexcept>

#include "isa.h"
#include "work.h"

namespace fastpool::cpu {
namespace {

// Where segments begin and end among the output's rows.
struct SortedSegments {
  const PoolBackwardCall& call;
  std::vector<Segment> segments;          // real tokens, within the sequence
  std::vector<int64_t> by_begin, by_end;  // numbers of the segments that have any

  explicit SortedSegments(const PoolBackwardCall& c) : call(c) {
    segments.reserve(static_cast<size_t>(call.pool.batch));
    for (int64_t b = 0; b < call.pool.batch; ++b) {
      const Segment tokens = select(call.pool.mode.select, segment_of(call.pool, b));
      segments.push_back(tokens);
      if (tokens.begin < tokens.end) by_begin.push_back(b);
    }
    by_end = by_begin;
    sort(by_begin, [&](int64_t a, int64_t b) { return begin(a) < begin(b); });
    sort(by_end, [&](int64_t a, int64_t b) { return end(a) < end(b); });
  }
  const Segment& tokens(int64_t b) const { return segments[static_cast<size_t>(b)]; }
  int64_t origin(int64_t b) const { return call.padded ? b * call.pool.rows : 0; }
  int64_t begin(int64_t b) const { return origin(b) + tokens(b).begin; }
  int64_t end(int64_t b) const { return origin(b) + tokens(b).end; }
  int64_t accumulator_row_bytes() const { return padded_columns(call.pool.dim) * accumulator_size(call.pool.dtype); }
  int64_t gradient_bytes() const {  // of one segment
    return call.pool.queries.count * gradient_record(call.pool) * accumulator_size(call.pool.dtype);
  }
  Overlap overlap(int64_t b, void* gradient) const {
    Overlap overlap;
    overlap.segment = b, overlap.origin = origin(b), overlap.tokens = tokens(b), overlap.gradient = gradient;
    kernels().segment_prologue(call, overlap);
    return overlap;
  }

 private:
  template <class Less>
  static void sort(std::vector<int64_t>& numbers, Less less) {
    if (!std::is_sorted(numbers.begin(), numbers.end(), less)) std::sort(numbers.begin(), numbers.end(), less);
  }
};

// The segments that overlap a row, in their order, as it moves on.
struct Overlaps {
  const SortedSegments& sorted;
  const char* maxima;  // of all segments
  std::vector<Overlap> list;
  std::deque<Buffer> buffers;
  std::vector<void*> spare;  // of the buffers

  void insert(int64_t b) {
    if (spare.empty()) spare.push_back(buffers.emplace_back(sorted.gradient_bytes()).data);
    Overlap overlap = sorted.overlap(b, spare.back());
    if (maxima != nullptr) overlap.maxima = maxima + b * sorted.accumulator_row_bytes();
    spare.pop_back();
    list.insert(find(b), overlap);
  }
  void erase(int64_t b) {
    spare.push_back(find(b)->gradient);
    list.erase(find(b));
  }
  std::vector<Overlap>::iterator find(int64_t b) {
    return std::partition_point(list.begin(), list.end(), [&](const Overlap& overlap) { return overlap.segment < b; });
  }
};

// Rows [at, end) of the output.
void sweep(const SortedSegments& sorted, const char* maxima, int64_t at, int64_t end, int64_t row_bytes) {
  const Buffer row(row_bytes);
  Overlaps overlaps{sorted, maxima, {}, {}, {}};
  for (const int64_t b : sorted.by_begin)
    if (sorted.begin(b) < at && at < sorted.end(b)) overlaps.insert(b);
  // The next segments to begin and to end.
  auto opening = std::partition_point(sorted.by_begin.begin(), sorted.by_begin.end(),
                                      [&](int64_t b) { return sorted.begin(b) < at; });
  auto closing =
      std::partition_point(sorted.by_end.begin(), sorted.by_end.end(), [&](int64_t b) { return sorted.end(b) <= at; });
  while (at < end) {
    for (; opening != sorted.by_begin.end() && sorted.begin(*opening) == at; ++opening) overlaps.insert(*opening);
    for (; closing != sorted.by_end.end() && sorted.end(*closing) == at; ++closing) overlaps.erase(*closing);
    int64_t next = end;
    if (opening != sorted.by_begin.end()) next = std::min(next, sorted.begin(*opening));
    if (closing != sorted.by_end.end()) next = std::min(next, sorted.end(*closing));
    if (overlaps.list.empty())
      std::memset(static_cast<char*>(sorted.call.out) + at * row_bytes, 0,
                  static_cast<size_t>((next - at) * row_bytes));
    else
      kernels().scatter_gradient(sorted.call, overlaps.list.data(), static_cast<int64_t>(overlaps.list.size()), at,
                                 next, row.data);
    at = next;
  }
}

// The maxima of every segment: a task is a segment, or a slice of its columns where there are few segments.
void find_maxima(const SortedSegments& sorted, int64_t threads, const Parallel& parallel, char* maxima) {
  const int64_t batch = sorted.call.pool.batch, columns = padded_columns(sorted.call.pool.dim);
  const int64_t slices = batch >= threads ? 1 : threads, width = padded_columns((columns + slices - 1) / slices);
  spread(threads, batch * slices, parallel, [&](int64_t task) {
    const int64_t b = task / slices, from = task % slices * width, to = std::min(from + width, columns);
    const Segment& tokens = sorted.tokens(b);
    if (tokens.end - tokens.begin > UINT32_MAX && sorted.call.pool.dtype != DType::float64)
      throw std::runtime_error("fastpool.max: a segment with a gradient must have less than 2^32 tokens");
    if (from < to) kernels().maxima(sorted.call, b, tokens, from, to, maxima + b * sorted.accumulator_row_bytes());
  });
}

// The gradient of each segment's queries: a sum of its tokens.
void add_up_queries(const PoolBackwardCall& call, const SortedSegments& sorted, const Parallel& parallel) {
  const PoolCall& pool = call.pool;
  const Buffer memory(pool.batch * sorted.gradient_bytes());
  const int64_t threads = threads_for(pool.batch * pool.rows * pool.width * size_of(pool.dtype), parallel);
  spread(threads, pool.batch, parallel,
         [&](int64_t b) { sorted.overlap(b, memory.data + b * sorted.gradient_bytes()); });
  PoolCall sum = pool;
  sum.mode = kWeightedSum;
  sum.dim = pool.width, sum.out = call.out, sum.normalize = false;
  sum.out_dtype = pool.dtype == DType::float64 ? DType::float64 : DType::float32;
  reduce(sum, {&call, memory.data}, parallel);
}

}  // namespace

void pool_backward(const PoolBackwardCall& call, const Parallel& parallel) {
  const PoolCall& pool = call.pool;
  if (call.of == Of::query) return add_up_queries(call, SortedSegments(call), parallel);
  const int64_t rows = call.out_rows();
  const int64_t row_bytes = call.per_token() ? size_of(call.token_values().dtype) : pool.width * size_of(pool.dtype);
  if (rows * row_bytes == 0) return;
  const int64_t threads = threads_for(rows * pool.width * size_of(pool.dtype), parallel);
  const SortedSegments sorted(call);
  const bool max = call.finds_maximum();
  const Buffer maxima(max ? pool.batch * sorted.accumulator_row_bytes() : 0);
  if (max) find_maxima(sorted, threads, parallel, maxima.data);
  spread(threads, threads, parallel, [&](int64_t t) {
    sweep(sorted, max ? maxima.data : nullptr, rows * t / threads, rows * (t + 1) / threads, row_bytes);
  });
}

}  // namespace fastpool::cpu
