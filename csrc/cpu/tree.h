// The canonical order of additions where it is an aligned binary tree: of leaves, and of columns. Included by
// kernel_impl.h, into an instruction set's namespace.
#pragma once
#include <utility>

#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

// A binary counter of subtrees, taken one after another: level k holds 2^k of them while bit k of their number is set,
// so that a pairwise sum keeps only log2 of its terms; compare the pairwise algorithm of Chan, Golub and LeVeque
// (Stanford, CS-TR-79-773, 1979). `merge(left, right)` joins two of a level. A missing right sibling is 0.
template <class X, class Merge>
struct Tree {
  Merge merge;
  X level[64];  // [k]: 2^k that have met, and wait for the next 2^k
  int64_t count = 0;

  __attribute__((always_inline)) void add(X x) {
    int k = 0;
    for (int64_t bits = count++; bits & 1; bits >>= 1) x = merge(level[k++], x);
    level[k] = x;
  }
  __attribute__((always_inline)) X root() const {
    X x{};
    for (int k = 0; count >> k > 0; ++k) x = count >> k & 1 ? merge(level[k], x) : merge(x, X{});
    return x;
  }
};

// Merges sums, of leaves or of subtrees of them.
struct Add {
  template <class A>
  __attribute__((always_inline)) A operator()(A left, A right) const {
    return left + right;
  }
};
template <class A>
using LeafTree = Tree<A, Add>;

// Merges vectors of columns into the sums of neighbours, those of `left` before those of `right`.
struct AddNeighbours {
  template <class V>
  __attribute__((always_inline)) V operator()(V left, V right) const {
    return add(left, right, std::make_integer_sequence<int, sizeof(V) / sizeof(left[0])>());
  }
  template <class V, int... i>
  __attribute__((always_inline)) V add(V a, V b, std::integer_sequence<int, i...>) const {
    return __builtin_shufflevector(a, b, 2 * i...) + __builtin_shufflevector(a, b, 2 * i + 1 ...);
  }
};

// The same for vectors of eight lanes, without the moves between their halves that it takes to keep columns in order:
// two steps within halves, of four vectors, and one across, of two of those sums, which are then in order again.
struct AddNeighboursOfEight {
  template <class V>
  __attribute__((always_inline)) V within(V a, V b) const {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  }
  template <class V>
  __attribute__((always_inline)) V across(V a, V b) const {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
  template <class V>
  __attribute__((always_inline)) V operator()(const V* s) const {
    return across(within(within(s[0], s[1]), within(s[2], s[3])), within(within(s[4], s[5]), within(s[6], s[7])));
  }
  // Of four vectors, which are sums of neighbours by now.
  template <class V>
  __attribute__((always_inline)) V of_four(const V* s) const {
    const V v = within(within(s[0], s[1]), within(s[2], s[3]));
    return __builtin_shufflevector(v, v, 0, 4, 1, 5, 2, 6, 3, 7);
  }
};

// One for each of several rows, whose trees have the same shape.
template <class V, int R>
struct OfRows {
  V row[R];
};
struct AddNeighboursOfRows {
  template <class V, int R>
  __attribute__((always_inline)) OfRows<V, R> operator()(const OfRows<V, R>& left, const OfRows<V, R>& right) const {
    OfRows<V, R> both;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) both.row[r] = AddNeighbours{}(left.row[r], right.row[r]);
    return both;
  }
};

// Sums of `dim` columns of each of R rows in an aligned binary tree, neighbours first; never -0. `at(r, c, n)` is a
// vector of row r's n columns from c on; where they come apart, at.neighbours(r, c) are the sums of twice as many.
template <class A, int R, bool apart = false, class At>
FASTPOOL_INLINE void add_columns(int64_t dim, At at, A* sums) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes, block = 8;  // vectors that meet in registers
  constexpr AddNeighbours merge;
  Tree<OfRows<V, R>, AddNeighboursOfRows> blocks;
  const auto meet = [&](V* s) __attribute__((always_inline)) {
    if constexpr (lanes == 8) return AddNeighboursOfEight{}(s);
#pragma GCC unroll 8
    for (int half = block / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int v = 0; v < half; ++v) s[v] = merge(s[2 * v], s[2 * v + 1]);
    return s[0];
  };
  [[maybe_unused]] const auto meet_of_neighbours = [&](V* s) __attribute__((always_inline)) {
    if constexpr (lanes == 8) return AddNeighboursOfEight{}.of_four(s);
    return merge(merge(s[0], s[1]), merge(s[2], s[3]));
  };
  V s[block];
  OfRows<V, R> x;
  int64_t c = 0;
  for (; c + block * lanes <= dim; c += block * lanes) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if constexpr (apart) {
#pragma GCC unroll 8
        for (int v = 0; v < block / 2; ++v) s[v] = at.neighbours(r, c + 2 * v * lanes);
        x.row[r] = meet_of_neighbours(s);
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < block; ++v) s[v] = at(r, c + v * lanes, lanes);
        x.row[r] = meet(s);
      }
    }
    blocks.add(x);
  }
  if (c < dim) {
    for (int r = 0; r < R; ++r) {
      int64_t d = c;
      for (int v = 0; v < block; ++v, d += lanes) {
        s[v] = d < dim ? at(r, d, dim - d < lanes ? static_cast<int>(dim - d) : lanes) : V{};
        for (int64_t i = d < dim ? dim - d : lanes; i < lanes; ++i) s[v][i] = 0;
      }
      x.row[r] = meet(s);
    }
    blocks.add(x);
  }
  x = blocks.root();
  // Rows meet in one vector, as far as its lanes go, while what is left of each meets in itself.
  int vectors = R;
  for (int n = lanes; n > 1; n /= 2) {
#pragma GCC unroll 8
    for (int v = 0; v < (R + 1) / 2; ++v)
      if (2 * v < vectors) x.row[v] = merge(x.row[2 * v], 2 * v + 1 < vectors ? x.row[2 * v + 1] : V{});
    vectors = (vectors + 1) / 2;
  }
  for (int r = 0; r < R; ++r) sums[r] = x.row[r / lanes][r % lanes] + A{};
}
template <class A, class At>
FASTPOOL_INLINE A add_columns(int64_t dim, At at) {
  A sum;
  add_columns<A, 1>(dim, [&](int, int64_t c, int n) __attribute__((always_inline)) { return at(c, n); }, &sum);
  return sum;
}

}  // namespace fastpool::FASTPOOL_ISA
