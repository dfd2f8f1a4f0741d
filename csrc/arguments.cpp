// The arguments of pooling ops.
#include "arguments.h"

#include <vector>

#include "argument_checks.h"
#include "state.h"

namespace fastpool {

// ---- pooling: in the schema's order
template <class Move>
void PoolArguments::move(Move move) {
  move.tensor(hidden);
  if (mode->takes_query()) move.tensor(query);
  move.optional(mask);
  move.optional(cu_seqlens);
  if (mode->takes_weights()) move.optional(weights);
  if (mode->takes_scores()) move.optional(scores);
  move.optional(starts);
  move.optional(ends);
  if (mode->takes_query()) move.plain(scale);
  move.plain(truncate_dim);
  move.plain(normalize);
  move.plain(out_dtype);
}
PoolArguments::PoolArguments(const Mode& m, StableIValue* stack) : mode(&m) { move(Take(stack)); }
void PoolArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

PoolCall PoolArguments::call(const std::optional<int64_t>& truncate_dim) {
  PoolCall call;
  call.mode = *mode;
  call.normalize = normalize;
  call.dtype = required_dtype(hidden.dtype(), "hidden");
  require(hidden.dim() == 2 || hidden.dim() == 3, "hidden");
  call.width = hidden.size(hidden.dim() - 1);
  call.dim = columns(truncate_dim, call.width);
  call.out_dtype = out_dtype ? required_dtype(*out_dtype, "out_dtype") : call.dtype;

  const Device device = hidden.device();
  const auto require_device = [&](const Tensor& t, const char* argument) {
    require(!t || t.device() == device, argument);
  };
  require_device(mask, "mask");
  require_device(cu_seqlens, "cu_seqlens");
  require_device(weights, "weights");
  require_device(scores, "scores");
  require_device(query, "query");
  require_device(starts, "starts");
  require_device(ends, "ends");

  const bool padded = hidden.dim() == 3;
  call.rows = hidden.size(hidden.dim() - 2);
  if (mask) {
    const int bytes = integer_bytes(mask.dtype());
    require(bytes != 0, "mask");
    call.mask = per_token(mask, hidden, bytes, "mask");
    call.mask.bytes = bytes;
    call.mask.boolean = mask.dtype() == aoti_torch_dtype_bool();
  }
  const auto values = [&](const Tensor& t, const char* argument) {
    if (!t) return PerToken{};
    const DType dtype = required_dtype(t.dtype(), argument);
    PerToken values = per_token(t, hidden, size_of(dtype), argument);
    values.dtype = dtype;
    return values;
  };
  call.weights = values(weights, "weights");
  call.scores = values(scores, "scores");
  require(!weights || mode->takes_weights(), "weights");
  require(static_cast<bool>(scores) == mode->takes_scores(), "scores");
  require(static_cast<bool>(query) == mode->takes_query(), "query");

  require(!(padded && cu_seqlens) && (padded || cu_seqlens || (starts && ends)), "cu_seqlens");
  require(!(cu_seqlens && (starts || ends)), "cu_seqlens");
  if (cu_seqlens) {
    call.starts = indices(cu_seqlens, "cu_seqlens");
    require(cu_seqlens.size(0) >= 1, "cu_seqlens");
    call.batch = cu_seqlens.size(0) - 1;
    call.ends = call.starts;
    call.ends.data = static_cast<const char*>(call.starts.data) + call.starts.stride * (call.starts.wide ? 8 : 4);
  } else {
    if (starts) call.starts = indices(starts, "starts");
    if (ends) call.ends = indices(ends, "ends");
    call.batch = padded ? hidden.size(0) : starts.size(0);
    require(!starts || starts.size(0) == call.batch, "starts");
    require(!ends || ends.size(0) == call.batch, "ends");
  }

  if (query) call.queries = queries(query, call, scale);

  require(hidden.in_memory(size_of(call.dtype)), "hidden");
  make_columns_contiguous(hidden);
  call.row_stride = hidden.stride(hidden.dim() - 2);
  call.batch_stride = padded ? hidden.stride(0) : 0;
  call.hidden = hidden.data();
  return call;
}

std::vector<int64_t> PoolArguments::shape(const PoolCall& call) const {
  if (!query || query.dim() == 1) return {call.batch, call.dim};
  return {call.batch, call.queries.count, call.dim};
}
Tensor PoolArguments::output(const PoolCall& call) const {
  const std::vector<int64_t> sizes = shape(call);
  return empty(static_cast<int64_t>(sizes.size()), sizes.data(), torch_dtype(call.out_dtype), hidden.device());
}

// ---- several modes
template <class Move>
void PoolSeveralArguments::move(Move move) {
  move.plain(modes);
  move.tensor(pool.hidden);
  move.optional(pool.mask);
  move.optional(pool.cu_seqlens);
  move.optional(pool.weights);
  move.optional(pool.scores);
  move.optional(pool.starts);
  move.optional(pool.ends);
  move.plain(pool.truncate_dim);
  move.plain(pool.normalize);
  move.plain(pool.out_dtype);
}
PoolSeveralArguments::PoolSeveralArguments(StableIValue* stack) { move(Take(stack)); }
void PoolSeveralArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

PoolCall PoolSeveralArguments::call() {
  static constexpr Mode all{};
  for (auto left = static_cast<uint64_t>(modes); left != 0; left >>= 4) {
    const int place = static_cast<int>(left & 15) - 1;
    require(place >= 0 && place < kModeCount && several.count < Several::kMost, "modes");
    // The others are left to Python, where each is a call of its own.
    require(!kModes[place].softmax() && !kModes[place].of_logits(), "modes");
    several.modes[several.count++] = kModes[place];
  }
  const StatesOfSeveral states(several);
  require(states.count() > 0, "modes");
  pool.mode = states.weighted ? &kWeightedSum : &all;
  PoolCall call = pool.call(std::nullopt);
  several.dim = columns(pool.truncate_dim, several.count * call.width);
  call.several = &several;
  call.queries.count = states.count();
  return call;
}

Tensor PoolSeveralArguments::output(const PoolCall& call) const {
  const int64_t sizes[] = {call.batch, several.dim};
  return empty(2, sizes, torch_dtype(call.out_dtype), pool.hidden.device());
}

// ---- the gradient of pooling
template <class Move>
void PoolBackwardArguments::move(Move move) {
  move.plain(mode);
  move.plain(of);
  move.tensor(gradient);
  move.tensor(pool.hidden);
  move.optional(pool.query);
  move.optional(pool.mask);
  move.optional(pool.cu_seqlens);
  move.optional(pool.weights);
  move.optional(pool.scores);
  move.optional(pool.starts);
  move.optional(pool.ends);
  move.plain(pool.scale);
  move.optional(result);
}
PoolBackwardArguments::PoolBackwardArguments(StableIValue* stack) { move(Take(stack)); }
void PoolBackwardArguments::put_back(StableIValue* stack) { move(PutBack(stack)); }

PoolBackwardCall PoolBackwardArguments::call() {
  require(mode >= 0 && mode < kModeCount && !kModes[mode].of_logits(), "mode");
  pool.mode = &kModes[mode];
  pool.truncate_dim = columns_of(gradient);
  PoolBackwardCall call;
  call.pool = pool.call();
  call.padded = pool.hidden.dim() == 3;
  require(of >= 0 && of <= static_cast<int64_t>(Of::scores), "of");
  call.of = static_cast<Of>(of);
  require(call.of == Of::hidden || (call.of == Of::weights && pool.weights && pool.mode->takes_weights()) ||
              (call.of == Of::scores && pool.mode->takes_scores()) ||
              (call.of == Of::query && pool.mode->takes_query()),
          "of");
  const std::vector<int64_t> shape = pool.shape(call.pool);
  const Device device = pool.hidden.device();
  call.gradient = dense(gradient, shape, call.pool.dtype, device, "gradient");
  if (call.needs_result() || result) call.result = dense(result, shape, call.pool.dtype, device, "result");
  return call;
}

Tensor PoolBackwardArguments::output(const PoolBackwardCall& call) const {
  if (call.of == Of::query) {
    const int64_t sizes[] = {call.pool.batch, call.pool.queries.count, call.pool.width};
    return empty(3, sizes, gradient.dtype(), gradient.device());
  }
  const Tensor& like = call.of == Of::weights ? pool.weights : call.of == Of::scores ? pool.scores : pool.hidden;
  return empty(like.dim(), like.sizes(), like.dtype(), like.device());
}

}  // namespace fastpool
