// Pooling on a CPU: which kernel file, how work is cut and spread over threads. No torch header here either.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "kernel.h"

namespace fastpool::cpu {

// How to run body(0) .. body(n - 1), possibly at the same time; at::parallel_for in the library, threads in its tests.
struct Parallel {
  int threads = 1;
  std::function<void(int64_t n, const std::function<void(int64_t)>& body)> run;
};

// Whether an integer mask held 0 and 1 alone within segments; where not, the result is not to be used.
bool pool(const PoolCall& call, const Parallel& parallel);
// The same, or with these gradients a sum of tokens for each segment's queries.
bool reduce(const PoolCall& call, const QueryGradients& gradients, const Parallel& parallel);
void pool_backward(const PoolBackwardCall& call, const Parallel& parallel);
void l2_normalize(const NormalizeCall& call, const Parallel& parallel);
void l2_normalize_backward(const NormalizeBackwardCall& call, const Parallel& parallel);
void quantize(const QuantizeCall& call, const Parallel& parallel);

// Whether the values of starts and ends lie within the rows and do not run backwards.
bool valid_bounds(const PoolCall& call);
// Whether those of truncate_dims lie within the columns.
bool valid_dims(const NormalizeCall& call);
// Whether ranges are finite, and so is their width, and none runs backwards.
bool valid_ranges(const QuantizeCall& call);
// Whether float64 weights fit the float32 that they are added up in beside narrower states: the largest finite one of
// each segment's real tokens is 0 or a normal number of float32.
bool valid_weights(const PoolCall& call);
// Whether no float64 score of a real token, finite itself, is beyond the float32 that it becomes beside narrower
// states.
bool valid_scores(const PoolCall& call);
// The same of queries, in either direction.
bool valid_queries(const PoolCall& call);

// The instruction set in use, those this CPU can run, and a way to ask for one ("" is the best again).
// Returns false when this CPU cannot run it.
FASTPOOL_API const char* isa();
FASTPOOL_API std::vector<std::string> isas();
FASTPOOL_API bool use_isa(const std::string& name);

}  // namespace fastpool::cpu
