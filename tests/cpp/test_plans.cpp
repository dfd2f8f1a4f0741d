// Plans of CUDA launches for calls drawn at random: whatever the shapes, a plan covers its work once, and stays within
// the grid, a chip's shared memory and a bound on memory. Undefined behaviour is the sanitizer's affair.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/plan.h"

using namespace fastpool;
using namespace fastpool::cuda;

namespace {

constexpr int64_t kMaxHiddenBytes = int64_t{1} << 37;  // half of what the largest GPU has: a gradient takes as much
constexpr int kMaxThreads = 1024, kWarp = 32;          // of a block
constexpr int kMaxStrips = 65535;                      // a grid's second dimension

std::mt19937_64 generator;

int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }
bool coin() { return draw(0, 1) == 1; }
// As many of every order of magnitude.
int64_t draw_size(int64_t most) {
  int bits = 0;
  while (bits < 62 && int64_t{1} << (bits + 1) <= most) ++bits;
  const int64_t low = int64_t{1} << draw(0, bits);
  return std::min(most, draw(low, 2 * low - 1));
}
template <class T>
T one_of(std::initializer_list<T> choices) {
  return *(choices.begin() + draw(0, static_cast<int64_t>(choices.size()) - 1));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
bool power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

enum class Layout { padded, cu, starts_ends };

struct Case {
  PoolCall call;
  Layout layout;
  DeviceProperties device;
  std::string words() const {
    const auto n = [](int64_t value) { return std::to_string(value); };
    return std::string(call.mode.name) + " of dtype " + n(static_cast<int>(call.dtype)) +
           (layout == Layout::padded ? ", padded"
            : layout == Layout::cu   ? ", cu_seqlens"
                                     : ", starts and ends") +
           ", batch " + n(call.batch) + ", rows " + n(call.rows) + ", dim " + n(call.dim) + ", row stride " +
           n(call.row_stride) + ", queries " + n(call.queries.count) + ", sm_count " + n(device.sm_count) +
           ", shared " + n(device.shared);
  }
};

void demand(bool holds, const char* what, const Case& at) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s: %s\n", what, at.words().c_str());
  std::exit(1);
}

Case draw_case() {
  static const int64_t something[2] = {};
  Case drawn;
  PoolCall& call = drawn.call;
  drawn.layout = static_cast<Layout>(draw(0, 2));
  const bool padded = drawn.layout == Layout::padded;
  call.mode = kModes[draw(0, kModeCount - 1)];
  call.dtype = static_cast<DType>(draw(0, 3));
  call.out_dtype = static_cast<DType>(draw(0, 3));
  call.dim = coin() ? draw_size(40000) : 8 * draw_size(5000);
  call.width = call.dim + one_of<int64_t>({0, 0, 1, 8});
  call.row_stride = call.width + one_of<int64_t>({0, 0, 0, 1, 8, 100});
  const int64_t row_bytes = call.row_stride * size_of(call.dtype);
  call.batch = draw_size(std::min<int64_t>(kMaxHiddenBytes / row_bytes, 4000000));
  call.rows = draw_size(kMaxHiddenBytes / row_bytes / (padded ? call.batch : 1)) - (draw(0, 20) == 0);
  call.hidden = reinterpret_cast<const void*>(uintptr_t{4096} + (draw(0, 3) == 0 ? 2 * draw(0, 7) : 0));
  call.batch_stride = padded ? call.rows * call.row_stride : 0;
  if (!padded || draw(0, 3) == 0) call.starts.data = something;
  if (drawn.layout == Layout::starts_ends || (padded && coin())) call.ends.data = something;
  if (coin()) call.mask.data = something;
  if (call.mode.takes_query()) {
    call.queries.data = something;
    call.queries.count = std::min(draw_size(64), std::max<int64_t>(1, kMaxHiddenBytes / row_bytes / call.batch));
    call.queries.stride = call.width + one_of<int64_t>({0, 1});
    call.queries.batch_stride = coin() ? 0 : call.queries.count * call.queries.stride;
  }
  drawn.device = {static_cast<int>(draw(1, 200)), one_of<int64_t>({99 << 10, 163 << 10, 227 << 10})};
  return drawn;
}

// Each takes some of its queries.
int64_t blocks_of_unit(const PoolPlan& plan, const PoolCall& call) {
  return ceil_div(call.queries.count, plan.queries);
}

// Slots of segments with random bounds, many of them empty, follow each other and end before `programs`.
void check_slots(const PoolPlan& plan, const Case& at) {
  std::vector<int64_t> cu(static_cast<size_t>(at.call.batch) + 1);
  for (int64_t& bound : cu) bound = coin() ? draw(0, at.call.rows) : draw(0, at.call.rows) / plan.split * plan.split;
  if (coin()) cu.back() = at.call.rows;
  std::sort(cu.begin(), cu.end());
  int64_t next = 0;  // slot that nobody has yet
  for (int64_t b = 0; b < at.call.batch; ++b) {
    const int64_t begin = cu[static_cast<size_t>(b)], end = cu[static_cast<size_t>(b) + 1];
    const int64_t first = begin / plan.split + b;
    demand(first >= next, "two segments share a slot", at);
    next = first + std::max<int64_t>(1, ceil_div(end - begin, plan.split));
  }
  demand(next <= plan.programs / blocks_of_unit(plan, at.call), "a unit's slot lies outside", at);
}

void check_plan(const Case& at) {
  const PoolCall& call = at.call;
  const bool one_token = call.mode.one_token();
  const PoolPlan plan = make_plan(call, at.layout == Layout::cu, at.device);
  const int64_t rows = std::max<int64_t>(call.rows, 1), accumulator = accumulator_size(call.dtype);
  const int64_t blocks = blocks_of_unit(plan, call), slots = plan.programs / blocks;

  demand(plan.threads >= kWarp && plan.threads <= kThreads && plan.threads % kWarp == 0, "threads", at);
  demand(power_of_two(plan.groups) && plan.groups <= kStage, "groups", at);
  demand(plan.columns * plan.groups <= plan.threads, "groups have no room in the block", at);
  demand(plan.strips >= 1 && plan.strips <= kMaxStrips, "strips", at);
  demand(plan.strips * plan.strip >= call.dim && (plan.strips - 1) * plan.strip < call.dim, "strips and columns", at);
  demand(plan.vector == 1 || (plan.strip % plan.vector == 0 && call.dim % plan.vector == 0), "vector", at);
  demand(plan.shared.bytes <= at.device.shared, "shared memory", at);

  demand(plan.split % kLeaf == 0 && power_of_two(plan.split / kLeaf), "a unit is a power of two of leaves", at);
  const int64_t leaves = ceil_div(std::min(plan.split, rows), kLeaf);
  demand(one_token || int64_t{plan.groups} << plan.levels >= leaves, "levels of the binary counter", at);
  demand(!plan.search || at.layout == Layout::cu, "only cu_seqlens are searched", at);
  demand(one_token || plan.search || plan.units * plan.split >= rows, "units do not reach all rows", at);
  demand(plan.queries == 1 || (plan.queries == kQueries && call.mode.takes_query() && call.queries.count > 1),
         "queries of a block", at);
  demand(plan.programs == slots * blocks, "a program for every few queries", at);
  demand(plan.groups * plan.queries <= kStage, "no room for a leaf of every group and query", at);
  demand(plan.shared.row * plan.queries <= plan.shared.slots && plan.shared.row >= plan.strip * accumulator,
         "a row for each query", at);
  const bool slots_for_all = plan.search ? slots >= rows / plan.split + call.batch : slots == call.batch * plan.units;
  demand(slots_for_all, "programs", at);
  const int64_t tokens = at.layout == Layout::cu ? rows : call.batch * rows;
  demand(slots <= tokens / kLeaf + call.batch, "more programs than leaves", at);
  if (!plan.partial()) return;

  int64_t reach = plan.split;
  for (int depth = 0; depth < kDepths && reach < rows; ++depth) reach *= kFanIn;
  demand(reach >= rows, "the arrival tree does not reach all units", at);
  // Beside a state for each segment. With cu_seqlens, or padded, more is not worth counting beside hidden; where
  // segments may overlap, each of them may hold all rows.
  const double state = static_cast<double>(call.queries.count * call.dim * accumulator);
  const double extra = static_cast<double>(slots - call.batch) * state, held = static_cast<double>(tokens) * state;
  const int most = call.mode.softmax() ? 10 : 11;  // a softmax needs more shared memory, so its units are smaller
  demand(extra <= std::max(static_cast<double>(tuning.partial_bytes), held / (1 << most)), "memory for partial states",
         at);
  // What exceeds the grid is an error of the op; only overlapping segments of far more rows than a GPU holds may.
  demand(plan.programs <= INT32_MAX || held > 16.0 * kMaxHiddenBytes, "grid", at);
  if (plan.search && call.batch <= 300) check_slots(plan, at);
}

void check_backward_plan(const Case& at) {
  PoolBackwardCall call;
  call.pool = at.call;
  call.padded = at.layout == Layout::padded;
  const Mode& mode = at.call.mode;
  const Of own = mode.takes_query() ? Of::query : mode.takes_scores() ? Of::scores : Of::weights;
  call.of = mode.weighted() && coin() ? own : Of::hidden;
  call.gradient = call.result = at.call.hidden;
  call.out = const_cast<void*>(at.call.hidden);
  const PoolCall& pool = call.pool;
  const BackwardPlan plan = make_plan(call, at.device);

  demand(plan.threads >= kWarp && plan.threads <= kThreads && plan.threads % kWarp == 0, "threads", at);
  demand(plan.prologue_threads >= kWarp && plan.prologue_threads <= kMaxThreads && plan.prologue_threads % kWarp == 0,
         "threads of the prologue", at);
  demand(plan.columns * plan.groups <= plan.threads, "groups have no room in the block", at);
  demand(plan.strips >= 1 && plan.strips <= kMaxStrips, "strips", at);
  const int64_t accumulator = accumulator_size(pool.dtype), results = pool.batch * pool.queries.count;
  if (call.of == Of::hidden) {
    const bool by_warps = mode.takes_query();
    const int64_t strip = by_warps ? kChunkBytes / accumulator : int64_t{plan.columns} * plan.vector;
    demand(plan.strips * strip >= pool.width && (plan.strips - 1) * strip < pool.width, "strips and columns", at);
    demand(by_warps || (pool.width % plan.vector == 0 && pool.dim % plan.vector == 0), "vector", at);
  }
  demand(plan.tile >= 1 && plan.tile <= kTile, "tile", at);
  demand(plan.tiles * plan.tile >= pool.rows && (plan.tiles - 1) * plan.tile < pool.rows, "tiles and rows", at);
  demand(plan.blocks == (call.padded ? pool.batch * plan.tiles : plan.tiles), "blocks", at);
  demand(plan.blocks <= INT32_MAX, "grid", at);

  const bool multiplied = call.of != Of::hidden || mode.takes_query();
  const int64_t columns = results * pool.dim;
  const int64_t sizes[] = {call.padded ? 0 : plan.tiles * 8,
                           call.finds_maximum() ? columns * 8 : 0,
                           columns * accumulator,
                           pool.batch * static_cast<int64_t>(sizeof(Segment)),
                           multiplied ? results * accumulator : 0,
                           mode.softmax() ? results * static_cast<int64_t>(sizeof(UnitTotals)) : 0};
  const int64_t places[] = {0, plan.maxima, plan.gradient, plan.segments, plan.products, plan.totals, plan.bytes};
  int64_t needed = 0;
  for (int i = 0; i < 6; ++i) {
    demand(places[i] % 16 == 0 && places[i] + sizes[i] <= places[i + 1], "memory of the prologue", at);
    needed += sizes[i];
  }
  demand(plan.bytes < needed + 6 * 16, "more memory than the prologue needs", at);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: test_plans CALLS SEED\n");
    return 2;
  }
  const int64_t calls = std::atoll(arguments[1]);
  generator.seed(static_cast<uint64_t>(std::atoll(arguments[2])));
  for (int64_t i = 0; i < calls; ++i) {
    const Case at = draw_case();
    check_plan(at);
    check_backward_plan(at);
  }
  std::printf("%lld plans are sound\n", static_cast<long long>(2 * calls));
  return 0;
}
