// What a kernel file offers; one such table per instruction set (isa.h chooses).
#pragma once
#include "../reducer.h"

namespace fastpool::cpu {

// A run of leaves of one segment that is reduced in one piece.
struct Unit {
  int64_t segment;
  int64_t first;       // the segment's first real token
  int64_t begin, end;  // rows; begin is a multiple of kLeaf from `first`
  int64_t partial;     // where its state goes in the workspace; -1 when it is the whole segment
};

// Workspace rows are this many columns apart, so that whole vectors can be read and written.
FASTPOOL_INLINE int64_t padded_columns(int64_t dim) { return (dim + 15) / 16 * 16; }

struct Kernels {
  const char* name;
  // Reduces units; whole segments are finished into call.out, others leave a partial.
  void (*reduce)(const PoolCall& call, const Unit* units, int64_t n, void* scratch, void* partials, Totals* totals);
  // Merges `n` partials of one segment in the canonical tree and finishes it. Destroys the partials.
  void (*combine)(const PoolCall& call, int64_t segment, int64_t n, void* partials, Totals* totals);
  void (*normalize)(const NormalizeCall& call, int64_t begin, int64_t end, void* scratch);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;

}  // namespace fastpool::cpu
