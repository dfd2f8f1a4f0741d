// The arguments of token outputs and of their gradient.
#include "argument_checks.h"

namespace fastpool {
namespace {

constexpr Mode kAllTokens{};

}  // namespace

// ---- tokens
template <class Move>
void TokensArguments::move(Move move) {
  move.tensor(pool.hidden);
  move.optional(pool.mask);
  move.optional(pool.cu_seqlens);
  move.optional(pool.starts);
  move.optional(pool.ends);
  move.plain(pool.truncate_dim);
  move.plain(pool.normalize);
  move.plain(pool.out_dtype);
  move.plain(total);
}
TokensArguments::TokensArguments(StableIValue* stack) { move(Take(stack)); }
void TokensArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

TokensCall TokensArguments::call() {
  pool.mode = &kAllTokens;
  TokensCall call;
  call.pool = pool.call();
  require(!total || *total >= 0, "total");
  return call;
}

Tensor TokensArguments::cu_seqlens(const TokensCall& call) const {
  const int64_t offsets = call.pool.batch + 1;
  return empty(1, &offsets, aoti_torch_dtype_int64(), pool.hidden.device());
}

Tensor TokensArguments::values(const TokensCall& call) const {
  const int64_t sizes[] = {call.size, call.pool.dim};
  return empty(2, sizes, torch_dtype(call.pool.out_dtype), pool.hidden.device());
}

// ---- the gradient of tokens
template <class Move>
void TokensBackwardArguments::move(Move move) {
  move.tensor(gradient);
  move.tensor(pool.hidden);
  move.optional(pool.mask);
  move.optional(pool.cu_seqlens);
  move.optional(pool.starts);
  move.optional(pool.ends);
}
TokensBackwardArguments::TokensBackwardArguments(StableIValue* stack) { move(Take(stack)); }
void TokensBackwardArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

TokensBackwardCall TokensBackwardArguments::call() {
  pool.mode = &kAllTokens;
  pool.truncate_dim = columns_of(gradient);
  TokensBackwardCall call;
  call.pool = pool.call();
  call.padded = pool.hidden.dim() == 3;
  call.size = gradient.dim() > 0 ? gradient.size(0) : 0;
  call.gradient = dense(gradient, {call.size, call.pool.dim}, call.pool.dtype, pool.hidden.device(), "gradient");
  return call;
}

Tensor TokensBackwardArguments::output() const {
  const Tensor& hidden = pool.hidden;
  return empty(hidden.dim(), hidden.sizes(), hidden.dtype(), hidden.device());
}

}  // namespace fastpool
