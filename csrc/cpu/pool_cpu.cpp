#include "pool_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ieee.h"
#include "isa.h"
#include "work.h"

namespace fastpool::cpu {
namespace {

constexpr int64_t kUnitBytes = 128 << 10;  // the least that is split off a segment
constexpr int64_t kUnitsPerThread = 8;     // enough of them to even out skewed lengths

// Rows of scratch for a unit of at most `rows` tokens: a binary counter of leaves, and the leaf itself.
int64_t scratch_rows(int64_t rows) {
  int64_t levels = 2;
  for (int64_t leaves = (rows + kLeaf - 1) / kLeaf; leaves > 1; leaves = (leaves + 1) / 2) ++levels;
  return levels;
}

// Of one thread: those rows, behind the queries that tokens are multiplied by, and the vectors of several modes.
int64_t scratch_bytes(const PoolCall& call, int64_t longest) {
  const int64_t queries = call.mode.takes_query() ? call.queries.count * padded_columns(call.width) : 0;
  const int64_t columns = scratch_rows(longest) * state_columns(call) + queries + several_columns(call);
  return (columns * accumulator_size(call.dtype) + 63) / 64 * 64;
}

}  // namespace

bool pool(const PoolCall& call, const Parallel& parallel) { return reduce(call, {}, parallel); }

bool reduce(const PoolCall& call, const QueryGradients& gradients, const Parallel& parallel) {
  const IsaKernels& kernel = kernels();
  const int64_t row_bytes = (call.mode.takes_query() ? call.width : call.dim) * size_of(call.dtype);
  const int64_t columns = state_columns(call), accumulator = accumulator_size(call.dtype);

  const bool nothing = call.dim == 0 || call.queries.count == 0;
  // One unit per segment, its length known.
  std::vector<Unit> units;
  units.reserve(static_cast<size_t>(call.batch));
  int64_t total = 0, longest = 0;
  uint64_t seen = 0;  // of the mask; what segment_of leaves out is 0
  for (int64_t b = 0; b < call.batch; ++b) {
    const Segment real = segment_of(call, b), segment = select(call.mode.select, real);
    // The walk reads the mask of what it adds; that of one token's neighbours, or of no columns, is read here.
    if ((call.mode.one_token() || nothing) && !call.mask.boolean)
      all_real(call.mask, b, real.begin, real.end - real.begin, seen);
    units.push_back({b, segment.begin, segment.begin, segment.end, -1});
    const int64_t rows = segment.end - segment.begin;
    total += rows;
    longest = std::max(longest, rows);
  }

  if (call.batch == 0 || nothing) return call.mask.boolean || seen <= 1;

  if (threads_for(total * row_bytes, parallel) == 1) {
    const Buffer scratch(scratch_bytes(call, longest));
    seen |= kernel.reduce(call, gradients, units.data(), call.batch, scratch.data, nullptr, nullptr);
    return call.mask.boolean || seen <= 1;
  }

  // Long segments are cut at a power of two of leaves, so that every piece but the last is a whole subtree. How many is
  // free: it follows the work and the threads, and the bits stay.
  int64_t split = kLeaf;
  const int64_t target = std::max(kUnitBytes, total * row_bytes / (parallel.threads * kUnitsPerThread));
  while (split * row_bytes < target) split *= 2;
  int64_t partials = 0;
  if (longest > split) {
    std::vector<Unit> cut;
    cut.reserve(units.size() + static_cast<size_t>(total / split));
    for (const Unit& unit : units) {
      if (unit.end - unit.begin <= split) {
        cut.push_back(unit);
        continue;
      }
      for (int64_t at = unit.begin; at < unit.end; at += split)
        cut.push_back({unit.segment, unit.first, at, std::min(at + split, unit.end), partials++});
    }
    units.swap(cut);
    longest = split;
  }

  // Each thread takes a run of units that holds its share of the rows, and walks it in address order.
  std::vector<size_t> first(static_cast<size_t>(parallel.threads) + 1, units.size());
  first[0] = 0;
  int64_t rows = 0;
  int thread = 1;
  for (size_t u = 0; u < units.size(); ++u) {
    while (thread < parallel.threads && rows >= total * thread / parallel.threads) first[thread++] = u;
    rows += units[u].end - units[u].begin;
  }
  const Buffer workspace(partials * columns * accumulator);
  std::vector<Totals> totals(static_cast<size_t>(partials));
  const int64_t of_thread = scratch_bytes(call, longest);
  const Buffer scratch(of_thread * parallel.threads);
  std::vector<uint64_t> seen_by(static_cast<size_t>(parallel.threads));
  parallel.run(parallel.threads, [&](int64_t t) {
    seen_by[static_cast<size_t>(t)] =
        kernel.reduce(call, gradients, units.data() + first[t], static_cast<int64_t>(first[t + 1] - first[t]),
                      scratch.data + of_thread * t, workspace.data, totals.data());
  });
  for (const uint64_t bits : seen_by) seen |= bits;
  for (size_t u = 0; u < units.size();) {
    size_t end = u + 1;
    while (end < units.size() && units[end].segment == units[u].segment) ++end;
    if (const int64_t at = units[u].partial; at >= 0)
      kernel.combine(call, gradients, units[u].segment, {units[u].first, units[end - 1].end},
                     static_cast<int64_t>(end - u), scratch.data, workspace.data + at * columns * accumulator,
                     totals.data() + at);
    u = end;
  }
  return call.mask.boolean || seen <= 1;
}

void l2_normalize(const NormalizeCall& call, const Parallel& parallel) {
  if (call.rows == 0 || call.dim == 0) return;
  const int64_t row_bytes = padded_columns(call.dim) * accumulator_size(call.dtype);
  const int64_t threads = threads_for(call.rows * call.dim * size_of(call.dtype), parallel);
  spread(threads, threads, parallel, [&](int64_t t) {
    const Buffer x(row_bytes);
    kernels().normalize(call, call.rows * t / threads, call.rows * (t + 1) / threads, x.data);
  });
}

void l2_normalize_backward(const NormalizeBackwardCall& call, const Parallel& parallel) {
  const NormalizeCall& forward = call.normalize;
  if (forward.rows == 0 || call.width == 0) return;
  const int64_t row_bytes = padded_columns(forward.dim) * accumulator_size(forward.dtype);
  const int64_t threads = threads_for(forward.rows * call.width * size_of(forward.dtype), parallel);
  spread(threads, threads, parallel, [&](int64_t t) {
    const Buffer x(row_bytes), z(row_bytes);
    kernels().normalize_backward(call, forward.rows * t / threads, forward.rows * (t + 1) / threads, x.data, z.data);
  });
}

void quantize(const QuantizeCall& call, const Parallel& parallel) {
  if (call.rows == 0 || call.dim == 0) return;
  const int64_t row_bytes = 2 * padded_columns(call.dim) * accumulator_size(call.dtype);
  const int64_t threads = threads_for(call.rows * call.dim * size_of(call.dtype), parallel);
  spread(threads, threads, parallel, [&](int64_t t) {
    const Buffer scratch(row_bytes);
    kernels().quantize(call, call.rows * t / threads, call.rows * (t + 1) / threads, scratch.data);
  });
}

bool valid_bounds(const PoolCall& call) {
  if (call.starts.data == nullptr && call.ends.data == nullptr) return true;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t start = call.starts.data ? call.starts[b] : 0;
    const int64_t end = call.ends.data ? call.ends[b] : call.rows;
    if (start < 0 || start > end || end > call.rows) return false;
  }
  return true;
}

bool valid_dims(const NormalizeCall& call) {
  if (call.truncate_dims.data == nullptr) return true;
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t value = call.truncate_dims[offset_of(row, call.leading, call.sizes, call.truncate_dims_strides)];
    if (value < 0 || value > call.dim) return false;
  }
  return true;
}

bool valid_ranges(const QuantizeCall& call) {
  if (call.low == nullptr) return true;
  for (int64_t c = 0; c < call.dim; ++c) {
    const float width = call.high[c] - call.low[c];
    if (!(width >= 0 && std::isfinite(width))) return false;
  }
  return true;
}

bool valid_weights(const PoolCall& call) {
  const PerToken& weights = call.weights;
  if (weights.data == nullptr || weights.dtype != DType::float64 || call.dtype == DType::float64) return true;
  const Ieee ieee;  // a subnormal is not 0
  for (int64_t b = 0; b < call.batch; ++b) {
    const Segment segment = bounds_of(call, b);
    const auto* const of_segment = static_cast<const double*>(weights.data) + b * weights.batch_stride;
    double largest = 0;  // few are larger than all before, so that the mask is seldom looked at
    for (int64_t i = segment.begin; i < segment.end; ++i) {
      const double size = std::abs(of_segment[i * weights.stride]);
      if (size > largest && std::isfinite(size) && is_real(call.mask, b, i)) largest = size;
    }
    using Float = std::numeric_limits<float>;
    if (largest != 0 && (largest < Float::min() || largest > Float::max())) return false;
  }
  return true;
}

bool valid_scores(const PoolCall& call) {
  const PerToken& scores = call.scores;
  if (scores.data == nullptr || scores.dtype != DType::float64 || call.dtype == DType::float64) return true;
  for (int64_t b = 0; b < call.batch; ++b) {
    const Segment segment = bounds_of(call, b);
    const auto* const of_segment = static_cast<const double*>(scores.data) + b * scores.batch_stride;
    for (int64_t i = segment.begin; i < segment.end; ++i) {
      const double score = of_segment[i * scores.stride];
      if (score > std::numeric_limits<float>::max() && std::isfinite(score) && is_real(call.mask, b, i)) return false;
    }
  }
  return true;
}

bool valid_queries(const PoolCall& call) {
  const Queries& queries = call.queries;
  if (queries.data == nullptr || queries.dtype != DType::float64 || call.dtype == DType::float64) return true;
  for (int64_t b = 0; b < (queries.batch_stride != 0 ? call.batch : 1); ++b)
    for (int64_t k = 0; k < queries.count; ++k)
      for (int64_t c = 0; c < call.width; ++c) {
        const double value = static_cast<const double*>(
            queries.data)[b * queries.batch_stride + k * queries.stride + c * queries.column_stride];
        if (std::isfinite(value) && std::abs(value) > std::numeric_limits<float>::max()) return false;
      }
  return true;
}

}  // namespace fastpool::cpu
