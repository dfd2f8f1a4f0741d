// The weights of a softmax: of tokens whose scores are given, and of tokens that a query is multiplied with. Included
// by kernel_impl.h, into an instruction set's namespace.
#pragma once
#include "../state.h"
#include "../weight.h"
#include "kernel.h"
#include "tree.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

using cpu::gradient_columns;
using cpu::gradient_record;
using cpu::query_columns;
using cpu::QueryGradients;
using cpu::several_columns;
using cpu::state_columns;

// A state's row ends in this, behind its columns.
template <class A>
FASTPOOL_INLINE Softmax<A>& softmax_of(A* row, int64_t columns) {
  static_assert(sizeof(Softmax<A>) == 2 * sizeof(A));
  return *reinterpret_cast<Softmax<A>*>(row + columns);
}

// Merges them alone, for a Tree.
struct MergeSoftmax {
  template <class A>
  __attribute__((always_inline)) Softmax<A> operator()(const Softmax<A>& left, const Softmax<A>& right) const {
    A of_left, of_right;
    return Softmax<A>::merge(left, right, of_left, of_right);
  }
};

// Turns the scores of n tokens in a row, kLeaf at most, into their weights; `scale` is what a sum of those before each
// of them is multiplied by. `state` goes on from what came before. Arrays are kLeaf long, whatever n is.
template <class A>
FASTPOOL_INLINE void weigh(A* scores, A* scale, int n, Softmax<A>& state) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  A exponent[kLeaf], largest[kLeaf + 1];
  for (int j = n; j % lanes != 0; ++j) scores[j] = -static_cast<A>(__builtin_inff());
  for (int j = 0; j < n; j += lanes) {
    const Exponential<V> e = exponential(read<V>(scores + j));
    std::memcpy(scores + j, &e.p, sizeof(V));
    std::memcpy(exponent + j, &e.n, sizeof(V));
  }
  largest[0] = state.exponent;
  const int whole = (n + lanes - 1) / lanes * lanes;
  for (int j = 0; j < whole; ++j) largest[j + 1] = exponent[j] > largest[j] ? exponent[j] : largest[j];
  for (int j = 0; j < n; j += lanes) {
    const V before = read<V>(largest + j), now = read<V>(largest + j + 1);
    const V weight = read<V>(scores + j) * power_between(read<V>(exponent + j), now);
    const V factor = power_between(before, now);
    std::memcpy(scores + j, &weight, sizeof(V));
    std::memcpy(scale + j, &factor, sizeof(V));
  }
  for (int j = 0; j < n; ++j) state.weight = state.weight * scale[j] + scores[j];
  state.exponent = largest[n];
}

// The weight of a token beside the largest exponent of its segment.
template <class A>
FASTPOOL_INLINE A softmax_weight(A score, A largest) {
  const Exponential<A> e = exponential(score);
  return e.p * power_between(e.n, largest);
}

template <class A>
FASTPOOL_INLINE A score_of(const PoolCall& call, int64_t b, int64_t i) {
  return value_of<A>(call.scores, b, i, [](auto* p) __attribute__((always_inline)) { return load_part<VF>(p, 1)[0]; });
}

// Products of a row of accumulators with each of several rows.
template <class T, class A>
struct Products {
  const A* a;
  const T* const* rows;
  const char* later;  // a line of it is fetched for every line that is read; or null
  using V = typename Vec<A>::type;

  __attribute__((always_inline)) void fetch(int64_t c) const {
    if (later != nullptr && c * sizeof(T) % kLineBytes == 0) __builtin_prefetch(later + c * sizeof(T), 0, 2);
  }
  __attribute__((always_inline)) V operator()(int r, int64_t c, int n) const {
    fetch(c);
    return read<V>(a + c) * load_part<V>(rows[r] + c, n);
  }
  __attribute__((always_inline)) V neighbours(int r, int64_t c) const {
    fetch(c);
    const Two<V> x = load_two<V>(rows[r] + c), y = take_apart(read<V>(a + c), read<V>(a + c + Vec<A>::lanes));
    return x.first * y.first + x.second * y.second;
  }
};
// Their sums over columns.
constexpr int kRowsAtOnce = 4;
template <int R, class A, class T>
FASTPOOL_INLINE void dots(const A* a, const T* const* rows, int64_t dim, A* sums, const char* later = nullptr) {
  add_columns<A, R, kApart<T>>(dim, Products<T, A>{a, rows, later}, sums);
}
template <class A, class T>
FASTPOOL_INLINE A dot(const A* a, const T* b, int64_t dim, const char* later = nullptr) {
  A sum;
  dots<1>(a, &b, dim, &sum, later);
  return sum;
}

// A query's columns into accumulator lanes.
template <class A>
static void load_query(const PoolCall& call, int64_t b, int64_t k, A* x) {
  const Queries& queries = call.queries;
  const auto copy = [&](auto* from) {
    from += b * queries.batch_stride + k * queries.stride;
    for (int64_t c = 0; c < call.width; ++c)
      x[c] = static_cast<A>(
          load_part<std::conditional_t<sizeof(*from) == 8, VD, VF>>(from + c * queries.column_stride, 1)[0]);
  };
  switch (queries.dtype) {
    case DType::float16: return copy(static_cast<const half_t*>(queries.data));
    case DType::bfloat16: return copy(static_cast<const bfloat16_t*>(queries.data));
    case DType::float32: return copy(static_cast<const float*>(queries.data));
    case DType::float64: return copy(static_cast<const double*>(queries.data));
  }
}

// What a token's product with a query makes its score.
template <class A>
FASTPOOL_INLINE A score_of_product(const PoolCall& call, A product) {
  return static_cast<A>(call.queries.scale) * product;
}

// What the gradient of a segment's vector is shared out by, for one of its queries: its gradient over the divisor; its
// query, if it has one; and numbers.
template <class A>
struct SegmentGradient {
  A* gradient;  // [cpu::gradient_columns]
  A* query;     // likewise
  A* numbers;

  __attribute__((always_inline)) SegmentGradient(const PoolBackwardCall& call, void* of_segment, int64_t k) {
    const int64_t columns = gradient_columns(call.pool);
    gradient = static_cast<A*>(of_segment) + k * gradient_record(call.pool);
    query = gradient + columns;
    numbers = query + (call.pool.mode.takes_query() ? columns : 0);
  }
  A& of_result() const { return numbers[0]; }  // sum of gradient * result over columns
  A& exponent() const { return numbers[1]; }   // the largest of the segment
  A& weight() const { return numbers[2]; }     // of the token that is being written
  A& product() const { return numbers[3]; }    // the gradient of its product with the query

  // The gradient of a token's weight, before it is divided.
  template <class T>
  __attribute__((always_inline)) A of_weight(const T* x, int64_t dim) const {
    return dot(gradient, x, dim) - of_result();
  }
  // The gradient of its product with the query; its weight is left in weight().
  template <class T>
  __attribute__((always_inline)) A of_product(const PoolCall& call, const T* x, A& weight) const {
    weight = softmax_weight(score_of_product(call, dot(query, x, call.width)), exponent());
    return (of_weight(x, call.dim) * weight) * static_cast<A>(call.queries.scale);
  }
};

}  // namespace fastpool::FASTPOOL_ISA
