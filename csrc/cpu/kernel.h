// What a kernel file offers; one such table per instruction set (isa.h chooses).
#pragma once
#include "../quantize.h"
#include "../segment.h"
#include "../state.h"
#include "../tokens.h"

namespace fastpool::cpu {

// A run of leaves of one segment that is reduced in one piece.
struct Unit {
  int64_t segment;
  int64_t first;       // the segment's first real token
  int64_t begin, end;  // rows; begin is a multiple of kLeaf from `first`
  int64_t partial;     // where its state goes in the workspace; -1 when it is the whole segment
};

// A segment that overlaps the rows of a gradient that are being written.
struct Overlap {
  int64_t segment = 0, origin = 0;  // its number, and the row of the output where row 0 of its sequence is
  Segment tokens{};
  void* gradient = nullptr;      // [queries, gradient_record], as IsaKernels::segment_prologue writes them
  const void* maxima = nullptr;  // [padded_columns], as IsaKernels::maxima writes them
};

// Workspace rows are this many columns apart, so that whole vectors can be read and written.
constexpr int64_t kColumns = 16;
FASTPOOL_INLINE int64_t padded_columns(int64_t dim) { return (dim + kColumns - 1) / kColumns * kColumns; }
// Of one query's state, a softmax's totals behind the columns; and of a segment's. (Several modes have a state each.)
FASTPOOL_INLINE int64_t query_columns(const PoolCall& call) {
  return padded_columns(call.dim) + (call.mode.softmax() ? kColumns : 0);
}
FASTPOOL_INLINE int64_t state_columns(const PoolCall& call) { return call.queries.count * query_columns(call); }
// Of the row that the vectors of several modes are put together in.
FASTPOOL_INLINE int64_t several_columns(const PoolCall& call) {
  return call.several == nullptr ? 0 : padded_columns(call.several->count * call.dim) + kColumns;
}
// Of what a segment's gradient is shared out by, for one query: the gradient, the query, and numbers behind them.
FASTPOOL_INLINE int64_t gradient_columns(const PoolCall& call) {
  return padded_columns(call.mode.takes_query() ? call.width : call.dim);
}
FASTPOOL_INLINE int64_t gradient_record(const PoolCall& call) {
  return gradient_columns(call) * (call.mode.takes_query() ? 2 : 1) + kColumns;
}

// Instead of states times weights a reduction adds up states times the gradients of their products with the queries.
struct QueryGradients {
  const PoolBackwardCall* call = nullptr;  // null: it does not
  char* segments = nullptr;                // [batch, queries, gradient_record]
};

struct IsaKernels {
  const char* name;
  // Reduces units; whole segments are finished into call.out, others leave a partial. Returns the bits of all values of
  // the mask that it has read, ORed together; 0 without a mask.
  uint64_t (*reduce)(const PoolCall& call, const QueryGradients& gradients, const Unit* units, int64_t n, void* scratch,
                     void* partials, Totals* totals);
  // Merges `n` partials of one segment in the canonical tree and finishes it. Destroys the partials.
  void (*combine)(const PoolCall& call, const QueryGradients& gradients, int64_t segment, const Segment& tokens,
                  int64_t n, void* scratch, void* partials, Totals* totals);
  void (*normalize)(const NormalizeCall& call, int64_t begin, int64_t end, void* scratch);
  // Fills in an overlap's gradient, and what else all its tokens have in common.
  void (*segment_prologue)(const PoolBackwardCall& call, Overlap& overlap);
  // Which token is the first maximum of segment b, for the columns [from, to), from a multiple of 16 on: its distance
  // from the first real token, an unsigned integer of the accumulator's size.
  void (*maxima)(const PoolBackwardCall& call, int64_t b, const Segment& tokens, int64_t from, int64_t to, void* first);
  // Writes rows [begin, end), which n segments overlap, one at least. `row` has room for a row of the output.
  void (*scatter_gradient)(const PoolBackwardCall& call, Overlap* overlaps, int64_t n, int64_t begin, int64_t end,
                           void* row);
  void (*normalize_backward)(const NormalizeBackwardCall& call, int64_t begin, int64_t end, void* x, void* z);
  // n tokens of segment b, from `row` on, into the result's rows from `at` on, normalised and cast as the call says.
  // `x` has room for a row of accumulators.
  void (*pack_tokens)(const PoolCall& call, int64_t b, int64_t row, int64_t n, int64_t at, void* x);
  // Writes rows [begin, end): row i adds up the gradient's rows sources[first[i]] to sources[first[i + 1]], in order.
  void (*scatter_tokens)(const TokensBackwardCall& call, const int64_t* first, const int64_t* sources, int64_t begin,
                         int64_t end);
  void (*quantize)(const QuantizeCall& call, int64_t begin, int64_t end, void* scratch);
};

extern const IsaKernels kernels_portable, kernels_avx2, kernels_avx512;

}  // namespace fastpool::cpu
