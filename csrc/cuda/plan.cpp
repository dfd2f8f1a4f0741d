#include "plan.h"

#include <algorithm>

namespace fastpool::cuda {

Tuning tuning;

namespace {

// Units are as large as leaves every multiprocessor one: what a block costs beside its reading (finding its unit,
// meeting others) is paid for each. A larger unit saves nothing: at 512 tokens the partial states are below 1 % of the
// bytes of 16-bit tokens.
constexpr int64_t kMaxSplit = 512;
// Several queries take more shared memory: for smaller units, and for rows that may take up to so many parts of what a
// block has. Two blocks then find enough on an H100 for up to 1024 columns of 16 bits; what wider rows lose is not
// measured.
constexpr int64_t kMaxSplitOfQueries = 256, kRowsPart = 3;
// Bytes of a segment that one multiprocessor reads in the time of what splitting it costs, which is meeting; bytes of a
// batch below which that matters; and bytes of the longest segment there may be, which one block would then walk alone.
constexpr int64_t kShortBytes = 256 << 10, kSmallBytes = 8 << 20, kLongestWalkBytes = 512 << 10;
// A segment of packed rows is likely not longer than so many times their mean.
constexpr int64_t kLikelyMeans = 4;
// As far as memory for partial states may push it; a block's binary counter then holds 12 levels.
constexpr int64_t kLargestSplit = 1 << 17;
// A tile of a gradient is looked up once, so it had better be large; but there should be some for every multiprocessor.
constexpr int kSmallestTile = 8, kTilesPerMultiprocessor = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t power_of_two(int64_t at_most) {
  int64_t p = 1;
  while (2 * p <= at_most) p *= 2;
  return p;
}

int64_t address(const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); }

// Whether every row of hidden, and `more` bytes behind its start, begin at a multiple of `bytes`.
bool aligned(const PoolCall& call, int64_t bytes, int64_t more) {
  const int64_t size = size_of(call.dtype);
  return (address(call.hidden) | call.row_stride * size | call.batch_stride * size | more) % bytes == 0;
}

Quads quads_of(const PoolCall& call) {
  const Queries& queries = call.queries;
  const int64_t a = accumulator_size(call.dtype);
  const bool query = (address(queries.data) | queries.stride * a | queries.batch_stride * a) % 16 == 0;
  return {aligned(call, std::min<int64_t>(kQuad * size_of(call.dtype), 16), 0), query,
          query && aligned(call, 16, 0) && call.row_stride <= kWholeStride};
}

SharedLayout shared_layout(const PoolCall& call, const PoolPlan& plan) {
  const bool one_token = call.mode.one_token(), weighted = call.mode.weighted(), softmax = call.mode.softmax();
  const int64_t a = accumulator_size(call.dtype);
  SharedLayout at;
  const auto take = [&](int64_t bytes) {
    const int start = at.bytes;
    at.bytes += static_cast<int>((bytes + 15) / 16 * 16);
    return start;
  };
  at.row = static_cast<int>((plan.strip + 3) / 4 * 4 * a);
  take(plan.queries * at.row);
  const int64_t slots = one_token ? 0 : std::max(plan.levels, plan.groups > 1 || plan.queries > 1 ? 1 : 0);
  at.slots = take(slots * plan.queries * (plan.vector + weighted + softmax) * plan.threads * a);
  at.weights = take(softmax ? kStage * (2 * kLeaf + 1) * a : weighted ? kStage * kLeaf * a : 0);
  at.sums = take((kBlockSums + kCounterLevels) * a);
  at.totals = take(plan.queries * static_cast<int64_t>(sizeof(UnitTotals)));
  at.found = take((kThreads / 32) * 8);
  at.words = take((kStage + 8) * 4 + (softmax ? kStage * 4 : 0));
  return at;
}

// Where a block takes so many queries at once. `fits`: whether memory for partial states stays within its bound.
PoolPlan make_plan(const PoolCall& call, bool cu, const DeviceProperties& device, int queries, bool& fits) {
  const bool one_token = call.mode.one_token();
  const bool multiplies = call.queries.data != nullptr;  // a warp takes whole tokens
  const int64_t a = accumulator_size(call.dtype);
  const int64_t rows = std::max<int64_t>(call.rows, 1);
  PoolPlan plan;
  plan.quads = quads_of(call);
  const int64_t size = size_of(call.dtype);
  plan.queries = queries;
  const int64_t blocks_of_unit = ceil_div(call.queries.count, queries);
  // Several queries are multiplied by as many columns at a time as are then added.
  const bool wide = queries == 1 || (plan.quads.whole && call.width * size % 16 == 0 && call.width <= kWholeColumns);
  plan.vector = wide && aligned(call, 16, call.dim * size) ? static_cast<int>(16 / size) : 1;
  const int64_t part = queries == 1 ? device.shared : device.shared / kRowsPart / queries;
  const int64_t strip_bytes = std::min(tuning.strip_bytes, part);
  plan.strip = std::min(call.dim, std::max<int64_t>(strip_bytes / a / 8 * 8, 8));
  plan.strips = static_cast<int>(ceil_div(call.dim, plan.strip));
  const int64_t vectors = ceil_div(plan.strip, plan.vector);
  plan.columns = static_cast<int>(ceil_div(vectors, ceil_div(vectors, tuning.threads)));

  // Groups fill a block, as far as segments are likely to have leaves for them: a leaf for each of them costs less in
  // shared memory than in the arrival tree.
  const int64_t mean = ceil_div(rows, std::max<int64_t>(call.batch, 1));
  const int64_t staged = kStage / queries, most = cu ? std::min(ceil_div(mean, kLeaf), staged) : staged;
  const int64_t groups = one_token ? 1 : power_of_two(std::min<int64_t>(tuning.threads / plan.columns, most));
  const auto cut = [&](int64_t split) {
    plan.split = split;
    for (plan.split_shift = 0; int64_t{1} << plan.split_shift < split;) ++plan.split_shift;
    const bool single = one_token || rows <= split;
    plan.search = cu && !single;
    plan.units = single || cu ? 1 : ceil_div(rows, split);
    const int64_t slots = plan.search ? rows / split + call.batch : call.batch * plan.units;
    plan.programs = slots * blocks_of_unit;
    const int64_t leaves = ceil_div(std::min(split, rows), kLeaf);
    plan.groups = static_cast<int>(std::min(groups, power_of_two(2 * leaves - 1)));
    plan.staged = kStage / queries / plan.groups;
    for (plan.staged_shift = 0; 1 << plan.staged_shift < plan.staged;) ++plan.staged_shift;
    plan.levels = 0;
    for (int64_t run = plan.groups; run < leaves; run *= 2) ++plan.levels;
    plan.threads = multiplies ? tuning.threads : static_cast<int>(ceil_div(plan.columns * plan.groups, 32) * 32);
    plan.shared = shared_layout(call, plan);
    plan.totals = plan.partial() ? ceil_div(slots * call.queries.count * call.dim * a, 16) * 16 : 0;
    const int64_t totals = plan.programs * plan.queries * plan.strips * static_cast<int64_t>(sizeof(UnitTotals));
    plan.bytes = plan.partial() ? plan.totals + totals : 0;
  };

  int64_t split = tuning.split;
  if (split == 0) {
    // Packed segments share their rows, unless they overlap, which shapes do not tell.
    const bool packed = cu || (call.batch_stride == 0 && call.starts.data != nullptr && call.ends.data != nullptr);
    const int64_t tokens = packed ? rows : call.batch * rows;
    const int64_t likely = cu ? std::min(rows, kLikelyMeans * mean) : rows;
    const int64_t row_bytes = (multiplies ? call.width : call.dim) * size;
    const bool whole =
        likely * row_bytes <= kShortBytes && rows * row_bytes <= kLongestWalkBytes && tokens * row_bytes < kSmallBytes;
    const int64_t longest = queries > 1 ? kMaxSplitOfQueries : kMaxSplit;
    split = kLeaf * groups;
    while (whole ? split < rows : split < longest && tokens / (2 * split) >= device.sm_count) split *= 2;
  }
  cut(split);
  while (plan.shared.bytes > device.shared && plan.split > kLeaf) cut(plan.split / 2);
  // Slots stand for what could be there, not for what is: starts and ends alone do not say how much they share.
  const auto too_many = [&] {
    int64_t widest = plan.split;  // the arrival tree's reach
    for (int depth = 0; depth < kDepths && widest < rows; ++depth) widest *= kFanIn;
    return plan.partial() &&
           (widest < rows || plan.programs > INT32_MAX ||
            (plan.programs / blocks_of_unit - call.batch) * call.queries.count * call.dim * a > tuning.partial_bytes);
  };
  while (too_many() && plan.split < kLargestSplit) {
    const int64_t before = plan.split;
    cut(2 * before);
    if (plan.shared.bytes > device.shared) {
      cut(before);
      break;
    }
  }
  fits = !too_many();
  return plan;
}

}  // namespace

PoolPlan make_plan(const PoolCall& call, bool cu, const DeviceProperties& device) {
  bool fits = false;
  if (call.mode.takes_query() && call.queries.count > 1) {
    const PoolPlan plan = make_plan(call, cu, device, kQueries, fits);
    if (fits) return plan;
  }
  return make_plan(call, cu, device, 1, fits);
}

BackwardPlan make_plan(const PoolBackwardCall& call, const DeviceProperties& device) {
  const PoolCall& pool = call.pool;
  const bool max = call.finds_maximum(), weighted = pool.mode.takes_weights();
  const int64_t size = size_of(pool.dtype), a = accumulator_size(pool.dtype);
  BackwardPlan plan;
  const bool whole = (address(call.out) | call.pool.width * size | pool.dim * size) % 16 == 0 &&
                     (!max || (aligned(pool, 16, 0) && address(call.result) % 16 == 0));
  plan.vector = whole ? static_cast<int>(16 / size) : 1;
  plan.quads = quads_of(pool);
  if (call.per_token() || pool.mode.takes_query()) {  // a warp takes a row
    plan.threads = tuning.threads;
    plan.strips = call.per_token() ? 1 : static_cast<int>(ceil_div(pool.width * a, kChunkBytes));
  } else {
    const int64_t vectors = ceil_div(call.pool.width, plan.vector);
    plan.columns = static_cast<int>(ceil_div(vectors, ceil_div(vectors, tuning.threads)));
    plan.strips = static_cast<int>(ceil_div(vectors, plan.columns));
    plan.groups = std::min(tuning.threads / plan.columns, kTile);
    plan.threads = static_cast<int>(ceil_div(plan.columns * plan.groups, 32) * 32);
  }
  const auto cut = [&](int tile) {
    plan.tile = tile;
    plan.tiles = ceil_div(pool.rows, tile);
    plan.blocks = call.padded ? pool.batch * plan.tiles : plan.tiles;
  };
  cut(tuning.tile > 0 ? tuning.tile : kTile);
  while (tuning.tile == 0 && plan.tile > kSmallestTile &&
         plan.blocks * plan.strips < kTilesPerMultiprocessor * device.sm_count)
    cut(plan.tile / 2);

  const int64_t tokens = pool.mask.data != nullptr || weighted ? pool.rows : 0;
  const int64_t warps = std::max(ceil_div(tokens, kWarpLeaves * kLeaf), ceil_div(pool.dim, 32 * kQuad));
  plan.prologue_threads = static_cast<int>(std::min<int64_t>(warps * 32, tokens > 0 ? kPrologueThreads : kThreads));
  const auto take = [&](int64_t bytes) {
    const int64_t start = plan.bytes;
    plan.bytes += ceil_div(bytes, 16) * 16;
    return start;
  };
  take(call.padded ? 0 : plan.tiles * 8);
  const int64_t results = pool.batch * pool.queries.count;
  plan.maxima = take(max ? results * pool.dim * 8 : 0);
  plan.gradient = take(results * pool.dim * a);
  plan.segments = take(pool.batch * static_cast<int64_t>(sizeof(Segment)));
  plan.products = take(call.needs_result() && !max ? results * a : 0);
  plan.totals = take(pool.mode.softmax() ? results * static_cast<int64_t>(sizeof(UnitTotals)) : 0);
  return plan;
}

}  // namespace fastpool::cuda
