// The walk over a thread's work: which rows make up the next leaf, and which lines to fetch ahead of it. Included by
// kernel_impl.h, into an instruction set's namespace.
#pragma once
#include <utility>

#include "../state.h"
#include "../weight.h"
#include "kernel.h"
#include "softmax.h"
#include "vec.h"

namespace fastpool::FASTPOOL_ISA {

using cpu::Unit;

template <class T, class A>
struct Leaf {
  int64_t unit;  // index of the unit it belongs to, -1 behind the last one
  int count;     // real tokens
  bool last;     // of its unit
  const T* row[kLeaf];
  A weight[kLeaf];  // where states are weighted, and that does not depend on them
  A scale[kLeaf];   // of a softmax: what the sum of those before is multiplied by
  Softmax<A> softmax;
};

template <class A>
FASTPOOL_INLINE A weight_of(const PoolCall& call, int64_t b, int64_t first, int64_t i) {
  return fastpool::weight_of<A>(call, b, first, i,
                                [](auto* p) __attribute__((always_inline)) { return load_part<VF>(p, 1)[0]; });
}

// Walks the leaves of a thread's units in order.
template <class T, class A, class S>
struct Walker {
  const PoolCall& call;
  const Unit* units;
  int64_t n;
  int64_t unit = 0, at = 0;
  uint64_t seen = 0;  // bits of the mask's values

  __attribute__((always_inline)) Walker(const PoolCall& c, const Unit* u, int64_t count) : call(c), units(u), n(count) {
    at = n > 0 ? units[0].begin : 0;
  }
  __attribute__((always_inline)) void next(Leaf<T, A>& leaf) {
    leaf.count = 0;
    leaf.unit = unit < n ? unit : -1;
    if (unit >= n) return;
    const Unit& u = units[unit];
    const int64_t m = u.end - at < kLeaf ? u.end - at : kLeaf;
    const T* rows = static_cast<const T*>(call.hidden) + u.segment * call.batch_stride + at * call.row_stride;
    const bool full = all_real(call.mask, u.segment, at, m, seen);
    for (int64_t j = 0; j < m; ++j) {
      if (!full && !is_real(call.mask, u.segment, at + j)) continue;
      if constexpr (S::queried)
        ;
      else if constexpr (S::softmax)
        leaf.weight[leaf.count] = score_of<A>(call, u.segment, at + j);
      else if constexpr (S::weighted)
        leaf.weight[leaf.count] = weight_of<A>(call, u.segment, u.first, at + j);
      leaf.row[leaf.count++] = rows + j * call.row_stride;
    }
    if constexpr (S::softmax && !S::queried) {
      leaf.softmax = {};
      weigh(leaf.weight, leaf.scale, leaf.count, leaf.softmax);
    }
    at += m;
    leaf.last = at >= u.end;
    if (leaf.last && ++unit < n) at = units[unit].begin;
  }
};

// Leaves on their way: the walk takes the first, and lines of the later ones are fetched in address order.
template <class T, class A, class S>
struct Queue {
  static constexpr int kSize = 32;  // leaves
  Walker<T, A, S> walker;
  int64_t row_bytes, ahead_bytes;
  int64_t head = 0, tail = 0, bytes = 0;  // leaves taken and queued; bytes behind the first of them
  // Where fetching stands.
  int64_t leaf = 0;
  int row = 0;
  const char *at = nullptr, *end = nullptr;
  Leaf<T, A> leaves[kSize];

  __attribute__((always_inline)) Queue(const PoolCall& call, const Unit* units, int64_t n, int64_t row, int64_t ahead)
      : walker(call, units, n), row_bytes(row), ahead_bytes(ahead) {}

  // The next leaf to walk, at least ahead_bytes more queued behind it; its unit is -1 behind the last one.
  __attribute__((always_inline)) const Leaf<T, A>& front() {
    while (tail == head || (bytes < ahead_bytes && tail - head < kSize)) {
      Leaf<T, A>& next = leaves[tail % kSize];
      walker.next(next);
      if (tail > head) bytes += next.unit < 0 ? ahead_bytes : next.count * row_bytes;
      ++tail;
    }
    const Leaf<T, A>& first = leaves[head % kSize];
    // Whatever is walked now is not fetched any more.
    if (leaf <= head && first.unit >= 0) begin_fetching(head + 1);
    return first;
  }
  __attribute__((always_inline)) void pop() {
    ++head;
    if (head < tail) bytes -= leaves[head % kSize].count * row_bytes;
  }

  __attribute__((always_inline)) void begin_fetching(int64_t at_leaf) {
    leaf = at_leaf;
    row = -1;
    at = end = nullptr;
  }
  // The next `count` bytes to fetch, left to the caller where they stand in one row; else they are fetched here, and
  // the caller gets what it is reading anyway.
  __attribute__((always_inline)) const char* take(int64_t count, const T* reading) {
    if (end - at < count) {
      fetch(count);
      return reinterpret_cast<const char*>(reading);
    }
    at += count;
    return at - count;
  }
  // The next row to fetch, left to the caller; or what it is reading anyway.
  __attribute__((always_inline)) const char* take_row(const T* reading) {
    if (!next_row()) return reinterpret_cast<const char*>(reading);
    return std::exchange(at, end);
  }
  // Fetches the next `count` bytes.
  __attribute__((always_inline)) void fetch(int64_t count) {
    while (count > 0) {
      if (at >= end && !next_row()) return;
      const char* stop = end - at < count ? end : at + count;
      count -= stop - at;
      for (; at < stop; at += kLineBytes) __builtin_prefetch(at, 0, 2);
    }
  }
  __attribute__((always_inline)) bool next_row() {
    while (leaf < tail) {
      const Leaf<T, A>& l = leaves[leaf % kSize];
      if (++row < l.count) {
        at = reinterpret_cast<const char*>(l.row[row]);
        end = at + row_bytes;
        return true;
      }
      ++leaf;
      row = -1;
    }
    return false;
  }
};

}  // namespace fastpool::FASTPOOL_ISA
