// Op arguments: taken from the boxed stack in the schema's order, checked, and turned into a call. What is wrong with
// them is said in Python (calls/, checks.py), which is asked where a check here fails; see ops.h.
#pragma once
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <optional>
#include <vector>

#include "pool.h"
#include "quantize.h"
#include "tensor.h"
#include "tokens.h"

namespace fastpool {

// Thrown where an argument is not what an op takes.
struct Refused {
  const char* argument;
};
inline void require(bool ok, const char* argument) {
  if (!ok) throw Refused{argument};
}

std::optional<DType> float_dtype(int32_t torch_dtype);
int32_t torch_dtype(DType dtype);

// What moves arguments between a stack and their places: all of them are owned by one of the two at any time, so
// nothing may throw before all have been moved.
class Take;
class PutBack;

// The arguments of a pooling op.
struct PoolArguments {
  const Mode* mode = nullptr;
  Tensor hidden, query, mask, cu_seqlens, weights, scores, starts, ends;
  double scale = 1;
  std::optional<int64_t> truncate_dim;
  bool normalize = false;
  std::optional<int32_t> out_dtype;

  PoolArguments() = default;
  PoolArguments(const Mode& mode, StableIValue* stack);
  void put_back(StableIValue* stack);
  // Checks all but the values of index tensors, masks and weights. Hidden becomes a copy where its columns are not
  // contiguous.
  PoolCall call() { return call(truncate_dim); }
  PoolCall call(const std::optional<int64_t>& truncate_dim);
  std::vector<int64_t> shape(const PoolCall& call) const;  // of the result
  Tensor output(const PoolCall& call) const;

 private:
  template <class Move>
  void move(Move move);
};

// Those of several modes from one read.
struct PoolSeveralArguments {
  int64_t modes = 0;  // their places in kModes, counted from 1, four bits each
  PoolArguments pool;
  Several several;  // known once call() has been called

  explicit PoolSeveralArguments(StableIValue* stack);
  void put_back(StableIValue* stack);
  PoolCall call();
  Tensor output(const PoolCall& call) const;

 private:
  template <class Move>
  void move(Move move);
};

struct NormalizeArguments {
  Tensor x, truncate_dims;
  std::optional<int64_t> truncate_dim;
  double eps = kNormEps;
  std::optional<int32_t> out_dtype;

  NormalizeArguments() = default;
  explicit NormalizeArguments(StableIValue* stack);
  void put_back(StableIValue* stack);
  NormalizeCall call();  // x becomes a copy where its columns are not contiguous
  Tensor output(const NormalizeCall& call) const;

 private:
  template <class Move>
  void move(Move move);
};

struct TokensArguments {
  PoolArguments pool;
  std::optional<int64_t> total;

  explicit TokensArguments(StableIValue* stack);
  void put_back(StableIValue* stack);
  TokensCall call();
  Tensor cu_seqlens(const TokensCall& call) const;  // empty
  Tensor values(const TokensCall& call) const;      // likewise, of the call's size

 private:
  template <class Move>
  void move(Move move);
};

struct TokensBackwardArguments {
  Tensor gradient;
  PoolArguments pool;

  explicit TokensBackwardArguments(StableIValue* stack);
  void put_back(StableIValue* stack);
  TokensBackwardCall call();
  Tensor output() const;

 private:
  template <class Move>
  void move(Move move);
};

struct PoolBackwardArguments {
  static constexpr int kHidden = 3;  // where it stands on the stack
  int64_t mode = 0, of = 0;          // a place in kModes; an Of
  Tensor gradient;
  PoolArguments pool;
  Tensor result;

  explicit PoolBackwardArguments(StableIValue* stack);
  void put_back(StableIValue* stack);
  PoolBackwardCall call();
  Tensor output(const PoolBackwardCall& call) const;

 private:
  template <class Move>
  void move(Move move);
};

struct NormalizeBackwardArguments {
  static constexpr int kX = 1;  // where it stands on the stack
  NormalizeArguments normalize;
  Tensor gradient;

  explicit NormalizeBackwardArguments(StableIValue* stack);
  void put_back(StableIValue* stack);
  NormalizeBackwardCall call();
  Tensor output() const;

 private:
  template <class Move>
  void move(Move move);
};

struct QuantizeArguments {
  Tensor x, ranges;
  int64_t kind = 0;  // a place in kKinds
  std::optional<int64_t> truncate_dim;
  bool zero_bit = false;

  explicit QuantizeArguments(StableIValue* stack);
  void put_back(StableIValue* stack);
  QuantizeCall call();  // x and ranges become copies where their columns are not contiguous
  Tensor output(const QuantizeCall& call) const;

 private:
  template <class Move>
  void move(Move move);
};

}  // namespace fastpool
