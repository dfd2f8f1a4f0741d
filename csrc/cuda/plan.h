// How a call is cut into work for a GPU, from shapes alone: chosen on the host without looking at data, so nothing
// waits for the device. Any plan gives the same bits. No CUDA here: the tests read plans on any machine.
#pragma once
#include "../segment.h"
#include "../state.h"

namespace fastpool::cuda {

constexpr int kThreads = 256;                              // of a block, at most
constexpr int kStage = 32;                                 // leaves whose real tokens and weights wait in shared memory
constexpr int kFanInShift = 3, kFanIn = 1 << kFanInShift;  // children of a node in the arrival tree
constexpr int kQueries = 4;                                // that a block takes at once, where there are several
constexpr int kDepths = 8;                                 // of that tree, at most
// Sums of columns meet in shared memory: those of 128 each, and then a binary counter of 64 such blocks.
constexpr int kBlockSums = 64, kCounterLevels = 64;
// Rows that are multiplied 16 bytes at a time: columns and elements from one to the next, at most, and the levels of a
// binary counter that so many columns need.
constexpr int kWholeColumns = 1 << 16, kWholeStride = 1 << 28, kWholeLevels = 10;
constexpr int kQuad = 4;        // columns that a thread has at a time where it does not walk tokens
constexpr int kWarpLeaves = 8;  // leaves that a warp reads at a time where only mask and weights matter

// What a plan follows.
struct DeviceProperties {
  int sm_count = 0;
  int64_t shared = 0;  // bytes of shared memory that one block may have
};

// What a unit carries besides its columns. A softmax's sums are relative to 2^exponent.
struct UnitTotals : Totals {
  double exponent = 0;
};

// Whether rows of hidden, and queries, begin where four values may be loaded at once; whether both do where 16 bytes
// may.
struct Quads {
  bool hidden = false, query = false, whole = false;
};

// Where a block keeps what in its shared memory, in bytes. Its row of sums comes first.
struct SharedLayout {
  int row = 0;  // of one query
  int slots = 0, weights = 0, sums = 0, totals = 0, found = 0, words = 0, bytes = 0;
};

// A unit is a run of `split` tokens of one segment, counted from its first real token; a block reduces one for some of
// the segment's queries, or for all there is where the mode takes none. Its threads stand in `groups` of `columns`:
// side by side along a row (or a piece of it, and then the next piece), `vector` columns each; a group has its own
// aligned run of leaves.
struct PoolPlan {
  int64_t split = kLeaf;  // kLeaf * 2^k
  int split_shift = 5;    // 2^split_shift is split
  int64_t units = 1;      // of a segment at most, where every segment has as many slots; see `search`
  int queries = 1;        // of a unit that a block takes at once: 1 or kQueries
  int64_t programs = 0;   // blocks for each strip of columns, those of a unit side by side
  bool search = false;    // cu_seqlens cut in several units: a block finds its segment
  int64_t strip = 0;      // columns that one block owns
  int strips = 1;         // more than one: the norm needs a second launch
  int vector = 1;         // columns that a thread loads at once
  int columns = 1, groups = 1, levels = 0, threads = 32;
  int staged = 1, staged_shift = 0;  // leaves of each group's run that are staged at once: 2^staged_shift
  Quads quads;
  SharedLayout shared;
  bool partial() const { return search || units > 1; }
  // Where that is so, partial states in memory, in bytes: sums come first.
  int64_t totals = 0, bytes = 0;
};

// A gradient is written in tiles: rows of one sequence, or of packed input, by a strip of columns.
constexpr int kTile = 64;               // rows, at most
constexpr int kChunkBytes = 4096;       // of a row's sums that a warp has in shared memory, where it takes a row
constexpr int kListedOverlaps = 64;     // segments that overlap a tile and are listed; where there are more, none is
constexpr int kPrologueThreads = 1024;  // of a block that has a segment's mask to read, at most

// A block's threads stand as in a PoolPlan; a group takes a row at a time.
struct BackwardPlan {
  int tile = kTile;
  int64_t tiles = 0, blocks = 0;  // of a sequence, or of packed input; of all sequences
  int strips = 1;
  int vector = 1, columns = 1, groups = 1, threads = 32;
  int prologue_threads = 32;  // of a block that takes a segment
  Quads quads;
  // Where Prologue stands in its memory, in bytes; ranges come first. All bits before `gradient` are set beforehand.
  int64_t maxima = 0, gradient = 0, segments = 0, products = 0, totals = 0, bytes = 0;
};

// The constants behind a plan; tests set others.
struct Tuning {
  int threads = kThreads;
  int64_t split = 0;  // 0: by shape
  int tile = 0;       // likewise
  // The row of sums that waits for its epilogue: 8192 columns in float32. It leaves an SM of 100 KB three blocks.
  int64_t strip_bytes = 32 << 10;
  // Where packed segments are many and may be long, slots for all of them are bounded to this, by larger units.
  int64_t partial_bytes = 64 << 20;
};
extern Tuning tuning;

// `cu`: starts and ends are neighbours in cu_seqlens.
PoolPlan make_plan(const PoolCall& call, bool cu, const DeviceProperties& device);
BackwardPlan make_plan(const PoolBackwardCall& call, const DeviceProperties& device);

}  // namespace fastpool::cuda
