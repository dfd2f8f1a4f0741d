// Gradients of tokens: a block takes a tile of the output, and adds up the shares of all segments that overlap it, in
// their order. Rows of no segment get zeros in the same pass, so that the gradient is written once.
#pragma once
#include "finish.cuh"
#include "scores.cuh"

namespace fastpool::cuda {

// Rows [from, to) of a tile, which belong to a segment that begins at row `first` of its sequence.
struct Overlap {
  int64_t first;
  int segment, from, to;
};

template <class A>
struct TileMemory {
  Overlap overlaps[kListedOverlaps];
  A weights[kTile];
  A exponents[kTile];          // of weights that are e^score
  uint32_t words[kTile / 32];  // a bit for each row: whether it is real
  int overlaps_found;
};

// A block's tile: rows [begin, begin + rows) of sequence b.
template <class A>
struct Tile {
  TileMemory<A>& memory;
  const Segment* segments;
  int64_t b = 0, begin;
  int rows, first, last;  // and the numbers of segments that may overlap it
  int overlaps;           // as many do, or where they are too many to be listed, may

  __device__ __forceinline__ Tile(const PoolBackwardCall& call, const BackwardPlan& plan, const Prologue& prologue)
      : memory(*reinterpret_cast<TileMemory<A>*>(shared_memory)), segments(prologue.segments) {
    const PoolCall& pool = call.pool;
    int64_t tile = blockIdx.x;
    if (call.padded) {
      b = tile / plan.tiles, tile -= b * plan.tiles;
      first = last = static_cast<int>(b);
    } else {
      const OverlapRange range = prologue.ranges[tile];
      first = range.last < 0 ? 0 : static_cast<int>(range.first), last = range.last;
    }
    begin = tile * plan.tile;
    rows = pool.rows - begin < plan.tile ? static_cast<int>(pool.rows - begin) : plan.tile;

    const bool weighted = pool.mode.takes_weights() && pool.weights.data != nullptr;
    for (int from = warp() * 32; from < rows; from += static_cast<int>(blockDim.x)) {
      const int r = from + lane();
      const bool real = r < rows && is_real(pool.mask, b, begin + r);
      const unsigned word = __ballot_sync(kAll, real);
      if (r < rows) {
        A weight = 1, exponent = 0;
        if (real && weighted) weight = weight_of<A>(pool, b, 0, begin + r);
        if (real && pool.mode.takes_scores()) {
          const auto score = value_of<A>(pool.scores, b, begin + r, [](auto* p) { return widen(*p); });
          const Exponential<A> of_score = exponential(score);
          weight = of_score.p, exponent = of_score.n;
        }
        memory.weights[r] = weight, memory.exponents[r] = exponent;
      }
      if (lane() == 0) memory.words[from / 32] = word;
    }
    if (warp() == 0) list();
    __syncthreads();
    overlaps = memory.overlaps_found <= kListedOverlaps ? memory.overlaps_found : last - first + 1;
  }

  __device__ __forceinline__ void list() {
    int found = 0;
#pragma unroll 1
    for (int base = first; base <= last; base += 32) {
      const int segment = base + lane();
      Overlap overlap{};
      if (segment <= last) overlap = overlap_with(segment);
      const bool is_overlap = overlap.from < overlap.to;
      const unsigned ballot = __ballot_sync(kAll, is_overlap);
      const int at = found + __popc(ballot & ((1u << lane()) - 1));
      if (is_overlap && at < kListedOverlaps) memory.overlaps[at] = overlap;
      found += __popc(ballot);
    }
    if (lane() == 0) memory.overlaps_found = found;
  }

  __device__ __forceinline__ Overlap overlap_with(int segment) const {
    const Segment s = segments[segment];
    const int64_t from = s.begin - begin, to = s.end - begin;
    return {s.begin, segment,
            static_cast<int>(from < 0      ? 0
                             : from > rows ? rows
                                           : from),
            static_cast<int>(to < 0      ? 0
                             : to > rows ? rows
                                         : to)};
  }
  __device__ __forceinline__ Overlap operator[](int k) const {
    return memory.overlaps_found <= kListedOverlaps ? memory.overlaps[k] : overlap_with(first + k);
  }
  __device__ __forceinline__ A softmax_weight(int r, const UnitTotals& totals) const {
    return cuda::softmax_weight(Exponential<A>{memory.weights[r], memory.exponents[r]}, totals);
  }
  __device__ __forceinline__ bool real(int r) const { return memory.words[r / 32] >> (r % 32) & 1; }
};

// The first row of each segment that holds the maximum, column by column.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    find_maxima_kernel(const __grid_constant__ PoolBackwardCall call, const __grid_constant__ BackwardPlan plan,
                       const __grid_constant__ Prologue prologue) {
  using A = typename AccumulatorOf<T>::type;
  const Tile<A> tile(call, plan, prologue);
  const PoolCall& pool = call.pool;
  const int thread = static_cast<int>(threadIdx.x), group = thread / plan.columns;
  const int64_t c = (int64_t{blockIdx.y} * plan.columns + thread - group * plan.columns) * V;
  if (group >= plan.groups || c >= pool.dim) return;
  const T* const rows =
      static_cast<const T*>(pool.hidden) + tile.b * pool.batch_stride + tile.begin * pool.row_stride + c;
  constexpr int kLoads = 4;  // on their way at once; comparisons need the predicates that more loads would take
#pragma unroll 1
  for (int k = 0; k < tile.overlaps; ++k) {
    const Overlap overlap = tile[k];
    const int64_t at = overlap.segment * pool.dim + c;
    A maximum[V];
    read<V>(static_cast<const A*>(call.result) + at, maximum);
    int found[V];
#pragma unroll
    for (int i = 0; i < V; ++i) found[i] = overlap.to;
#pragma unroll 1
    for (int begin = group; begin < overlap.to; begin += kLoads * plan.groups) {
      int row[kLoads];  // behind the last, where it is not real
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int r = begin + j * plan.groups;
        row[j] = r >= overlap.from && r < overlap.to && tile.real(r) ? r : overlap.to;
      }
      Word<T, V> token[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        token[j] = Word<T, V>{};
        if (row[j] < overlap.to) token[j] = load_word<V>(rows + row[j] * pool.row_stride);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const Pack<T, V> x = bit_cast<Pack<T, V>>(token[j]);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A y = widen(x.x[i]);
          const bool equal = y == maximum[i] || (y != y && maximum[i] != maximum[i]);
          if (equal && row[j] < found[i]) found[i] = row[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (found[i] < overlap.to)
        atomicMin(prologue.maxima + at + i, static_cast<unsigned long long>(tile.begin + found[i]));
  }
}

// The gradient of hidden.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_gradient_kernel(const __grid_constant__ PoolBackwardCall call, const __grid_constant__ BackwardPlan plan,
                            const __grid_constant__ Prologue prologue) {
  using A = typename AccumulatorOf<T>::type;
  const Tile<A> tile(call, plan, prologue);
  const PoolCall& pool = call.pool;
  const int thread = static_cast<int>(threadIdx.x), group = thread / plan.columns;
  const int64_t c = (int64_t{blockIdx.y} * plan.columns + thread - group * plan.columns) * V;
  if (group >= plan.groups || c >= call.pool.width) return;
  const bool max = call.finds_maximum();
  const bool by_position = pool.mode.takes_weights() && pool.weights.data == nullptr;
  T* const out = static_cast<T*>(call.out) + (tile.b * pool.rows + tile.begin) * call.pool.width + c;

  int loaded = -1;  // the segment whose gradient this thread has; most tiles have but one
  A gradient[V];
  int maximum[V];  // rows of the tile
#pragma unroll 1
  for (int r = group; r < tile.rows; r += plan.groups) {
    A sum[V] = {};
    if (c < pool.dim && tile.real(r)) {
#pragma unroll 1
      for (int k = 0; k < tile.overlaps; ++k) {
        const Overlap overlap = tile[k];
        if (r < overlap.from || r >= overlap.to) continue;
        if (loaded != overlap.segment) {
          loaded = overlap.segment;
          const int64_t at = int64_t{loaded} * pool.dim + c;
          read<V>(static_cast<const A*>(prologue.gradient) + at, gradient);
          if (max) {
#pragma unroll
            for (int i = 0; i < V; ++i) {
              const int64_t row = static_cast<int64_t>(prologue.maxima[at + i]);
              const int64_t of_tile = (row < 0 ? overlap.first : row) - tile.begin;
              maximum[i] = of_tile >= 0 && of_tile < tile.rows ? static_cast<int>(of_tile) : -1;
            }
          }
        }
        if (max) {
#pragma unroll
          for (int i = 0; i < V; ++i) sum[i] += maximum[i] == r ? gradient[i] : A{};
        } else {
          A weight = by_position ? static_cast<A>(tile.begin + r - overlap.first + 1) : tile.memory.weights[r];
          if (pool.mode.softmax()) weight = tile.softmax_weight(r, prologue.totals[overlap.segment]);
#pragma unroll
          for (int i = 0; i < V; ++i) sum[i] += gradient[i] * weight;
        }
      }
    }
    store(out + r * call.pool.width, sum);
  }
}

// The gradient of weights or scores: a warp takes a row.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 4 : 3)
    scatter_weight_gradient_kernel(const __grid_constant__ PoolBackwardCall call,
                                   const __grid_constant__ BackwardPlan plan,
                                   const __grid_constant__ Prologue prologue) {
  using A = typename AccumulatorOf<T>::type;
  const Tile<A> tile(call, plan, prologue);
  const PoolCall& pool = call.pool;
#pragma unroll 1
  for (int r = warp(); r < tile.rows; r += warps()) {
    const T* const x =
        static_cast<const T*>(pool.hidden) + tile.b * pool.batch_stride + (tile.begin + r) * pool.row_stride;
    A sum{};
    if (tile.real(r)) {
#pragma unroll 1
      for (int k = 0; k < tile.overlaps; ++k) {
        const Overlap overlap = tile[k];
        if (r < overlap.from || r >= overlap.to) continue;
        A sums[1][1];
        const Factor<A> gradient[] = {gradient_of<A>(prologue, overlap.segment)};
        products<2>(x, 0, 1, are_whole<T>(plan.quads, gradient), plan.quads.hidden, gradient, sums);
        A share = sums[0][0] - static_cast<const A*>(prologue.products)[overlap.segment];
        if (pool.mode.softmax()) share *= tile.softmax_weight(r, prologue.totals[overlap.segment]);
        sum += share;
      }
    }
    const A one[kQuad] = {sum};
    if (lane() == 0)
      store_quad(call.out, call.token_values().dtype, tile.b * pool.rows + tile.begin + r, 0, 1, false, one);
  }
}

// The gradient of hidden where its products with queries weigh it: a warp takes a piece of a row, whose sums it has in
// shared memory, behind what the block knows of its tile.
template <class A>
constexpr int kTileBytes = static_cast<int>((sizeof(TileMemory<A>) + 31) / 32 * 32);
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    scatter_attention_gradient_kernel(const __grid_constant__ PoolBackwardCall call,
                                      const __grid_constant__ BackwardPlan plan,
                                      const __grid_constant__ Prologue prologue) {
  using A = typename AccumulatorOf<T>::type;
  const Tile<A> tile(call, plan, prologue);
  const PoolCall& pool = call.pool;
  constexpr int chunk = kChunkBytes / static_cast<int>(sizeof(A));
  const int64_t begin = int64_t{blockIdx.y} * chunk, left = pool.width - begin, columns = left < chunk ? left : chunk;
  auto* const sums =
      reinterpret_cast<Pack<A, kQuad>*>(reinterpret_cast<char*>(shared_memory) + kTileBytes<A> + warp() * kChunkBytes);
#pragma unroll 1
  for (int r = warp(); r < tile.rows; r += warps()) {
    const int64_t row = tile.begin + r;
    const T* const x = static_cast<const T*>(pool.hidden) + tile.b * pool.batch_stride + row * pool.row_stride;
    for (int i = lane(); i < chunk / kQuad; i += 32) sums[i] = {};
#pragma unroll 1
    for (int k = 0; tile.real(r) && k < tile.overlaps; ++k) {
      const Overlap overlap = tile[k];
      if (r < overlap.from || r >= overlap.to) continue;
#pragma unroll 1
      for (int64_t query = 0; query < pool.queries.count; ++query) {
        const int64_t at = overlap.segment * pool.queries.count + query;
        const Factor<A> factors[] = {query_of<A>(pool, overlap.segment, query), gradient_of<A>(prologue, at)};
        const auto& [of_query, gradient] = factors;
        A sums_of_token[1][2];
        products<2>(x, 0, 1, are_whole<T>(plan.quads, factors), plan.quads.hidden, factors, sums_of_token);
        const auto [weight, share] = share_of_product(pool, prologue, at, sums_of_token[0]);
#pragma unroll 1
        for (int i = lane(); i * kQuad < columns; i += 32) {
          const int64_t c = begin + i * kQuad;
          A g[kQuad], q[kQuad];
          read_quad(gradient.row, c, pool.dim, pool.dim % kQuad == 0, g);
          read_quad(of_query.row, c, pool.width, plan.quads.query, q);
          Pack<A, kQuad> sum = sums[i];
#pragma unroll
          for (int n = 0; n < kQuad; ++n) {
            if (c + n < pool.dim) sum.x[n] += g[n] * weight;
            sum.x[n] += q[n] * share;
          }
          sums[i] = sum;
        }
      }
    }
    T* const out = static_cast<T*>(call.out) + (tile.b * pool.rows + row) * pool.width;
#pragma unroll 1
    for (int i = lane(); i * kQuad < columns; i += 32)
      store_quad(out, begin + i * kQuad, pool.width, pool.width % kQuad == 0, sums[i].x);
  }
}

}  // namespace fastpool::cuda
