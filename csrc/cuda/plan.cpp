#include "plan.h"

#include <algorithm>

namespace fastpool::cuda {

Tuning tuning;

namespace {

// Enough units that every multiprocessor has some 4 blocks of them, four times over, to even out skewed lengths.
constexpr int64_t kUnitsPerMultiprocessor = 16;
// A larger unit saves nothing: at 512 tokens the partial states are below 1 % of the bytes of 16-bit tokens.
constexpr int64_t kMaxSplit = 512;
// Bytes of a segment that one multiprocessor reads in the time of what splitting it costs: clearing counters, and
// meeting; and bytes of a batch below which that matters.
constexpr int64_t kShortBytes = 256 << 10, kSmallBytes = 8 << 20;
// As far as memory for partial states may push it; a block's binary counter then holds 12 levels.
constexpr int64_t kLargestSplit = 1 << 17;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t power_of_two(int64_t at_most) {
  int64_t p = 1;
  while (2 * p <= at_most) p *= 2;
  return p;
}

// Whether every row starts at a multiple of 16 bytes and is one of them long.
bool aligned(const PoolCall& call) {
  const int64_t size = size_of(call.dtype);
  return (reinterpret_cast<uintptr_t>(call.hidden) | call.row_stride * size | call.batch_stride * size |
          call.dim * size) %
             16 ==
         0;
}

Layout layout(const PoolCall& call, const Plan& plan) {
  const bool gather = family_of(call.mode) == Family::gather, weighted = family_of(call.mode) == Family::weighted;
  const int64_t a = accumulator_size(call.dtype);
  Layout at;
  const auto take = [&](int64_t bytes) {
    const int start = at.bytes;
    at.bytes += static_cast<int>((bytes + 15) / 16 * 16);
    return start;
  };
  take((plan.strip + 3) / 4 * 4 * a);
  const int64_t slots = gather ? 0 : std::max(plan.levels, plan.groups > 1 ? 1 : 0);
  at.slots = take(slots * (plan.vector + weighted) * plan.threads * a);
  at.weights = take(weighted ? kStage * kLeaf * a : 0);
  at.sums = take((kBlockSums + kCounterLevels) * a);
  at.found = take((kThreads / 32) * 8);
  at.words = take((kStage + 2) * 4);
  return at;
}

}  // namespace

Plan make_plan(const PoolCall& call, bool cu, const Chip& chip) {
  const bool gather = family_of(call.mode) == Family::gather;
  const int64_t a = accumulator_size(call.dtype);
  const int64_t rows = std::max<int64_t>(call.rows, 1);
  Plan plan;
  plan.vector = aligned(call) ? static_cast<int>(16 / size_of(call.dtype)) : 1;
  plan.strip = std::min(call.dim, std::max<int64_t>(tuning.strip_bytes / a / 8 * 8, 8));
  plan.strips = static_cast<int>(ceil_div(call.dim, plan.strip));
  const int64_t vectors = ceil_div(plan.strip, plan.vector);
  plan.columns = static_cast<int>(ceil_div(vectors, ceil_div(vectors, tuning.threads)));

  // Groups fill a block: a leaf for each of them costs less in shared memory than in the arrival tree.
  const int64_t groups = gather ? 1 : std::min<int64_t>(power_of_two(tuning.threads / plan.columns), kStage);
  const auto cut = [&](int64_t split) {
    plan.split = split;
    const bool single = gather || rows <= split;
    plan.search = cu && !single;
    plan.units = single || cu ? 1 : ceil_div(rows, split);
    plan.programs = plan.search ? rows / split + call.batch : call.batch * plan.units;
    const int64_t leaves = ceil_div(std::min(split, rows), kLeaf);
    plan.groups = static_cast<int>(std::min(groups, power_of_two(2 * leaves - 1)));
    plan.levels = 0;
    for (int64_t run = plan.groups; run < leaves; run *= 2) ++plan.levels;
    plan.threads = static_cast<int>(ceil_div(plan.columns * plan.groups, 32) * 32);
    plan.shared = layout(call, plan);
  };

  int64_t split = tuning.split;
  if (split == 0) {
    // Packed segments share their rows, unless they overlap, which nobody can know here.
    const bool packed = cu || (call.batch_stride == 0 && call.starts.data != nullptr && call.ends.data != nullptr);
    const int64_t tokens = packed ? rows : call.batch * rows;
    const int64_t row_bytes = call.dim * size_of(call.dtype);
    const bool whole = rows * row_bytes <= kShortBytes && tokens * row_bytes < kSmallBytes;
    split = kLeaf * groups;
    while (whole ? split < rows
                 : split < kMaxSplit && tokens / (2 * split) >= kUnitsPerMultiprocessor * chip.multiprocessors)
      split *= 2;
  }
  cut(split);
  // Slots stand for what could be there, not for what is: starts and ends alone do not say how much they share.
  const auto too_many = [&] {
    int64_t widest = plan.split;  // the arrival tree's reach
    for (int depth = 0; depth < kDepths && widest < rows; ++depth) widest *= kFanIn;
    return plan.partial() && (widest < rows || plan.programs > INT32_MAX ||
                              (plan.programs - call.batch) * call.dim * a > tuning.partial_bytes);
  };
  while (too_many() && plan.split < kLargestSplit) {
    const int64_t before = plan.split;
    cut(2 * before);
    if (plan.shared.bytes > chip.shared) {
      cut(before);
      break;
    }
  }
  return plan;
}

}  // namespace fastpool::cuda
