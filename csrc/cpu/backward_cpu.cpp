// The gradient of pooling on a CPU: each thread takes an even share of the output's rows, in address order, and sweeps
// over the beginnings and ends of segments, so that it knows which of them cover the rows between two of these.
#include <algorithm>
#include <cstring>
#include <deque>
#include <stdexcept>

#include "isa.h"
#include "work.h"

namespace fastpool::cpu {
namespace {

// Where segments begin and end among the output's rows.
struct Plan {
  const PoolBackwardCall& call;
  std::vector<Segment> segments;          // real tokens, within the sequence
  std::vector<int64_t> by_begin, by_end;  // numbers of the segments that have any

  explicit Plan(const PoolBackwardCall& c) : call(c) {
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

 private:
  template <class Less>
  static void sort(std::vector<int64_t>& numbers, Less less) {
    if (!std::is_sorted(numbers.begin(), numbers.end(), less)) std::sort(numbers.begin(), numbers.end(), less);
  }
};

// The segments that cover a row, in their order, as it moves on.
struct Covers {
  const Plan& plan;
  const char* maxima;  // of all segments
  std::vector<Cover> list;
  std::deque<Buffer> buffers;
  std::vector<void*> spare;  // of the buffers

  void insert(int64_t b) {
    if (spare.empty()) spare.push_back(buffers.emplace_back(plan.accumulator_row_bytes()).data);
    Cover cover;
    cover.segment = b, cover.origin = plan.origin(b), cover.tokens = plan.tokens(b);
    cover.gradient = spare.back();
    if (maxima != nullptr) cover.maxima = maxima + b * plan.accumulator_row_bytes();
    spare.pop_back();
    kernels().prepare(plan.call, cover);
    list.insert(find(b), cover);
  }
  void erase(int64_t b) {
    spare.push_back(find(b)->gradient);
    list.erase(find(b));
  }
  std::vector<Cover>::iterator find(int64_t b) {
    return std::partition_point(list.begin(), list.end(), [&](const Cover& cover) { return cover.segment < b; });
  }
};

// Rows [at, end) of the output.
void sweep(const Plan& plan, const char* maxima, int64_t at, int64_t end, int64_t row_bytes) {
  const Buffer row(row_bytes);
  Covers covers{plan, maxima, {}, {}, {}};
  for (const int64_t b : plan.by_begin)
    if (plan.begin(b) < at && at < plan.end(b)) covers.insert(b);
  // The next segments to begin and to end.
  auto opening =
      std::partition_point(plan.by_begin.begin(), plan.by_begin.end(), [&](int64_t b) { return plan.begin(b) < at; });
  auto closing =
      std::partition_point(plan.by_end.begin(), plan.by_end.end(), [&](int64_t b) { return plan.end(b) <= at; });
  while (at < end) {
    for (; opening != plan.by_begin.end() && plan.begin(*opening) == at; ++opening) covers.insert(*opening);
    for (; closing != plan.by_end.end() && plan.end(*closing) == at; ++closing) covers.erase(*closing);
    int64_t next = end;
    if (opening != plan.by_begin.end()) next = std::min(next, plan.begin(*opening));
    if (closing != plan.by_end.end()) next = std::min(next, plan.end(*closing));
    if (covers.list.empty())
      std::memset(static_cast<char*>(plan.call.out) + at * row_bytes, 0, static_cast<size_t>((next - at) * row_bytes));
    else
      kernels().share(plan.call, covers.list.data(), static_cast<int64_t>(covers.list.size()), at, next, row.data);
    at = next;
  }
}

// The maxima of every segment: a task is a segment, or a slice of its columns where there are few segments.
void find_maxima(const Plan& plan, int64_t threads, const Parallel& parallel, char* maxima) {
  const int64_t batch = plan.call.pool.batch, columns = padded_columns(plan.call.pool.dim);
  const int64_t slices = batch >= threads ? 1 : threads, width = padded_columns((columns + slices - 1) / slices);
  spread(threads, batch * slices, parallel, [&](int64_t task) {
    const int64_t b = task / slices, from = task % slices * width, to = std::min(from + width, columns);
    const Segment& tokens = plan.tokens(b);
    if (tokens.end - tokens.begin > UINT32_MAX && plan.call.pool.dtype != DType::float64)
      throw std::runtime_error("fastpool.max: a segment with a gradient must have less than 2^32 tokens");
    if (from < to) kernels().maxima(plan.call, b, tokens, from, to, maxima + b * plan.accumulator_row_bytes());
  });
}

}  // namespace

void pool_backward(const PoolBackwardCall& call, const Parallel& parallel) {
  const PoolCall& pool = call.pool;
  const int64_t rows = call.out_rows();
  const int64_t row_bytes = call.of_weights ? size_of(pool.weights.dtype) : call.width * size_of(pool.dtype);
  if (rows * row_bytes == 0) return;
  const int64_t threads = threads_for(rows * call.width * size_of(pool.dtype), parallel);
  const Plan plan(call);
  const bool max = call.finds_maximum();
  const Buffer maxima(max ? pool.batch * plan.accumulator_row_bytes() : 0);
  if (max) find_maxima(plan, threads, parallel, maxima.data);
  spread(threads, threads, parallel, [&](int64_t t) {
    sweep(plan, max ? maxima.data : nullptr, rows * t / threads, rows * (t + 1) / threads, row_bytes);
  });
}

}  // namespace fastpool::cpu
