// Token outputs on a CPU. No torch header here either.
#pragma once
#include "../tokens.h"
#include "pool_cpu.h"

namespace fastpool::cpu {

// Writes where each segment's tokens begin among all, and behind the last one how many there are. Returns whether an
// integer mask held 0 and 1 alone within segments.
bool count_tokens(const PoolCall& call, int64_t* cu_seqlens);
void tokens(const TokensCall& call, const Parallel& parallel);
void tokens_backward(const TokensBackwardCall& call, const Parallel& parallel);

}  // namespace fastpool::cpu
