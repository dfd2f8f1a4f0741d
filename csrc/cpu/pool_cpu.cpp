#include "pool_cpu.h"

#include <algorithm>

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

}  // namespace

void pool(const PoolCall& call, const Parallel& parallel) {
  if (call.batch == 0 || call.dim == 0) return;
  const Kernels& kernel = kernels();
  const bool gather = family_of(call.mode) == Family::gather;
  const int64_t row_bytes = call.dim * size_of(call.dtype);
  const int64_t columns = padded_columns(call.dim), accumulator = accumulator_size(call.dtype);

  // One unit per segment, its length known.
  std::vector<Unit> units;
  units.reserve(static_cast<size_t>(call.batch));
  int64_t total = 0, longest = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    const Segment segment = segment_of(call, b);
    units.push_back({b, segment.begin, segment.begin, segment.end, -1});
    const int64_t rows = gather ? 1 : segment.end - segment.begin;
    total += rows;
    longest = std::max(longest, rows);
  }

  if (threads_for(total * row_bytes, parallel) == 1) {
    const Buffer scratch(scratch_rows(longest) * columns * accumulator);
    kernel.reduce(call, units.data(), call.batch, scratch.data, nullptr, nullptr);
    return;
  }

  // Long segments are cut at a power of two of leaves, so that every piece but the last is a whole subtree. How many is
  // free: it follows the work and the threads, and the bits stay.
  int64_t split = kLeaf;
  const int64_t target = std::max(kUnitBytes, total * row_bytes / (parallel.threads * kUnitsPerThread));
  while (split * row_bytes < target) split *= 2;
  int64_t partials = 0;
  if (!gather && longest > split) {
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
    rows += gather ? 1 : units[u].end - units[u].begin;
  }
  const Buffer workspace(partials * columns * accumulator);
  std::vector<Totals> totals(static_cast<size_t>(partials));
  const int64_t scratch_bytes = (scratch_rows(longest) * columns * accumulator + 63) / 64 * 64;
  const Buffer scratch(scratch_bytes * parallel.threads);
  parallel.run(parallel.threads, [&](int64_t t) {
    kernel.reduce(call, units.data() + first[t], static_cast<int64_t>(first[t + 1] - first[t]),
                  scratch.data + scratch_bytes * t, workspace.data, totals.data());
  });
  for (size_t u = 0; u < units.size();) {
    size_t end = u + 1;
    while (end < units.size() && units[end].segment == units[u].segment) ++end;
    if (const int64_t at = units[u].partial; at >= 0)
      kernel.combine(call, units[u].segment, static_cast<int64_t>(end - u), workspace.data + at * columns * accumulator,
                     totals.data() + at);
    u = end;
  }
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

std::string check_bounds(const PoolCall& call, bool cu) {
  if (call.starts.data == nullptr && call.ends.data == nullptr) return {};
  const auto at = [](const char* name, int64_t i, int64_t value) {
    return std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(value);
  };
  const auto range = [&](const char* name, int64_t i, int64_t value) {
    return std::string(name) + " must lie between 0 and " + std::to_string(call.rows) + ", got " + at(name, i, value);
  };
  const char *starts = cu ? "cu_seqlens" : "starts", *ends = cu ? "cu_seqlens" : "ends";
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t start = call.starts.data ? call.starts[b] : 0;
    const int64_t end = call.ends.data ? call.ends[b] : call.rows;
    if (start < 0 || start > call.rows) return range(starts, b, start);
    if (end < 0 || end > call.rows) return range(ends, b + cu, end);
    if (start > end)
      return cu ? "cu_seqlens must not decrease, got " + at(starts, b, start) + " before " + at(ends, b + 1, end)
                : "starts must not be greater than ends, got " + at(starts, b, start) + " and " + at(ends, b, end);
  }
  return {};
}

std::string check_dims(const NormalizeCall& call) {
  if (call.truncate_dims.data == nullptr) return {};
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t value = call.truncate_dims[offset_of(row, call.leading, call.sizes, call.truncate_dims_strides)];
    if (value >= 0 && value <= call.dim) continue;
    std::string at;
    for (int64_t d = call.leading - 1, rest = row; d >= 0; rest /= call.sizes[d--])
      at = std::to_string(rest % call.sizes[d]) + (at.empty() ? "" : ", ") + at;
    return "truncate_dims must lie between 0 and " + std::to_string(call.dim) + ", got truncate_dims[" + at +
           "] = " + std::to_string(value);
  }
  return {};
}

}  // namespace fastpool::cpu
