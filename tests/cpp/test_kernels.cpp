// The native kernels alone, without torch, for the sanitizers: every mode, dtype, instruction set and layout on buffers
// that end where the data ends, by one thread and by several. Checks that the bits agree and are near a plain sum in
// double; addresses, undefined behaviour and races are the sanitizers' affair.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/pool_cpu.h"
#include "cpu/tokens_cpu.h"

using namespace fastpool;

namespace {

void run_threads(int64_t n, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

// Values that every dtype holds exactly: small integers over 8.
void write(DType dtype, void* data, int64_t i, double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  switch (dtype) {
    case DType::float64: static_cast<double*>(data)[i] = value; break;
    case DType::float32: static_cast<float*>(data)[i] = single; break;
    case DType::bfloat16: static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16); break;
    case DType::float16:
      static_cast<uint16_t*>(data)[i] =
          value == 0 ? 0 : static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 13) - (112u << 10)) & 0x7fff));
  }
}

// Memory of exactly this size, so that a byte beyond it is noticed.
struct Exact {
  explicit Exact(int64_t bytes) : data(std::malloc(static_cast<size_t>(bytes > 0 ? bytes : 1))) {}
  Exact(const Exact&) = delete;
  ~Exact() { std::free(data); }
  void* data;
};

void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

int64_t checked = 0;

// Fills with small integers over 8.
void fill(DType dtype, const Exact& data, int64_t n, std::mt19937& random) {
  for (int64_t i = 0; i < n; ++i) write(dtype, data.data, i, (static_cast<int>(random() % 31) - 12) / 8.0);
}

// The same bits from `run(out, parallel)` for every instruction set and number of threads.
std::string same_bits(const std::string& what, int64_t bytes,
                      const std::function<void(void* out, const cpu::Parallel& parallel)>& run) {
  std::string first;
  for (const std::string& isa : cpu::isas()) {
    cpu::use_isa(isa);
    for (const int threads : {1, 2, 5}) {
      Exact out(bytes);
      std::memset(out.data, 0xff, static_cast<size_t>(bytes));  // NaN where nothing is written
      run(out.data, {threads, run_threads});
      const std::string bits(static_cast<const char*>(out.data), static_cast<size_t>(bytes));
      if (first.empty()) first = bits;
      if (bits != first) fail("bits of " + what + " with " + isa + " and " + std::to_string(threads) + " threads");
      ++checked;
    }
  }
  return first;
}

constexpr int64_t kQueries = 2;  // of each segment

// Has a call multiply tokens with queries of each segment's own, which `memory` holds.
void ask(PoolCall& call, const Exact& memory, std::mt19937& random) {
  fill(DType::float32, memory, kQueries * call.batch * call.width, random);
  call.queries.data = memory.data, call.queries.count = kQueries, call.queries.scale = 0.25;
  call.queries.stride = call.width, call.queries.batch_stride = kQueries * call.width;
}

bool plain_sum(const Mode& mode) {
  return mode.reduce == Reduce::sum && mode.weight == Weight::one && mode.divisor == Divisor::one &&
         !mode.one_token() && !mode.of_logits();
}

void check_case(DType dtype, int64_t width, bool padded, const std::vector<int64_t>& lengths, std::mt19937& random) {
  const int64_t batch = static_cast<int64_t>(lengths.size());
  int64_t longest = 0, total = 0;
  std::vector<int64_t> starts, ends;
  for (const int64_t n : lengths) {
    longest = std::max(longest, n);
    starts.push_back(padded ? 0 : total);
    total += n;
    ends.push_back(padded ? n : total);
  }
  const int64_t rows = padded ? longest : total, tokens = padded ? batch * longest : total;
  Exact hidden(tokens * width * size_of(dtype)), mask(tokens), weights(tokens * 4);
  std::vector<double> values(static_cast<size_t>(tokens * width));
  for (int64_t i = 0; i < tokens * width; ++i) {
    values[static_cast<size_t>(i)] = (static_cast<int>(random() % 31) - 12) / 8.0;
    write(dtype, hidden.data, i, values[static_cast<size_t>(i)]);
  }
  for (int64_t i = 0; i < tokens; ++i) {
    static_cast<uint8_t*>(mask.data)[i] = random() % 4 != 0;
    static_cast<float*>(weights.data)[i] = static_cast<float>(random() % 8 + 1) / 4;
  }
  for (const Mode& mode : kModes) {
    PoolCall call;
    call.mode = mode;
    call.dtype = dtype;
    call.batch = batch, call.rows = rows, call.dim = call.width = width;
    call.hidden = hidden.data;
    call.row_stride = width, call.batch_stride = padded ? longest * width : 0;
    call.starts.data = starts.data(), call.ends.data = ends.data();
    call.mask.data = mask.data, call.mask.batch_stride = padded ? longest : 0;
    if (mode.takes_weights() || mode.takes_scores()) {
      PerToken& values = mode.takes_weights() ? call.weights : call.scores;
      values.data = weights.data;
      values.batch_stride = call.mask.batch_stride;
    }
    Exact queries(kQueries * batch * width * 4);
    if (mode.takes_query()) ask(call, queries, random);
    for (const DType out_dtype : {dtype, DType::float32}) {
      for (const bool normalize : {false, true}) {
        call.out_dtype = out_dtype, call.normalize = normalize;
        const std::string bits = same_bits(mode.name, batch * call.queries.count * width * size_of(out_dtype),
                                           [&](void* out, const cpu::Parallel& parallel) {
                                             call.out = out;
                                             cpu::pool(call, parallel);
                                           });
        if (plain_sum(mode) && out_dtype == DType::float32 && !normalize) {
          for (int64_t b = 0; b < batch; ++b) {
            double expected = 0;
            for (int64_t i = starts[static_cast<size_t>(b)]; i < ends[static_cast<size_t>(b)]; ++i) {
              const int64_t token = (padded ? b * longest : 0) + i;
              if (static_cast<uint8_t*>(mask.data)[token]) expected += values[static_cast<size_t>(token * width)];
            }
            float result;
            std::memcpy(&result, bits.data() + b * width * 4, 4);
            // Eighths of small integers add up exactly.
            if (result != static_cast<float>(expected)) fail("sum of segment " + std::to_string(b));
          }
        }
      }
    }
  }
}

// Gradients with holes, gaps between segments and columns that are not used; packed segments overlap, out of order.
void check_backward(DType dtype, int64_t width, int64_t dim, bool padded, std::mt19937& random) {
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t batch = 9, rows = padded ? 71 : 400, tokens = padded ? batch * rows : rows;
  std::vector<int64_t> starts, ends;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t one = static_cast<int64_t>(random() % (rows + 1)),
                  other = static_cast<int64_t>(random() % (rows + 1));
    starts.push_back(b == 2 ? one : std::min(one, other));  // the third is empty
    ends.push_back(b == 2 ? one : std::max(one, other));
  }
  Exact hidden(tokens * width * size_of(dtype)), mask(tokens), weights(tokens * 2);
  const int64_t most = kQueries * batch * dim;
  Exact gradient(most * size_of(wide)), result(most * size_of(wide)), queries(kQueries * batch * width * 4);
  fill(dtype, hidden, tokens * width, random);
  fill(DType::bfloat16, weights, tokens, random);
  fill(wide, gradient, most, random);
  for (int64_t i = 0; i < tokens; ++i) static_cast<uint8_t*>(mask.data)[i] = random() % 4 != 0;
  for (const Mode& mode : kModes) {
    for (const Of of : {Of::hidden, Of::query, Of::weights, Of::scores}) {
      PoolBackwardCall call;
      PoolCall& pool = call.pool;
      pool.mode = mode;
      if (mode.of_logits() || (of == Of::weights && !mode.takes_weights()) ||
          (of == Of::scores && !mode.takes_scores()) || (of == Of::query && !mode.takes_query()))
        continue;
      pool.dtype = dtype, pool.out_dtype = wide;
      pool.batch = batch, pool.rows = rows, pool.dim = dim, pool.width = width;
      pool.hidden = hidden.data, pool.row_stride = width, pool.batch_stride = padded ? rows * width : 0;
      pool.starts.data = starts.data(), pool.ends.data = ends.data();
      pool.mask.data = mask.data, pool.mask.batch_stride = padded ? rows : 0;
      if (mode.takes_weights() || mode.takes_scores()) {
        PerToken& values = mode.takes_weights() ? pool.weights : pool.scores;
        values.data = weights.data, values.dtype = DType::bfloat16;
        values.batch_stride = pool.mask.batch_stride;
      }
      if (mode.takes_query()) ask(pool, queries, random);
      pool.out = result.data;
      cpu::pool(pool, {1, nullptr});
      call.padded = padded, call.of = of;
      call.gradient = gradient.data, call.result = result.data;
      const int64_t bytes = call.per_token()  ? tokens * 2
                            : of == Of::query ? batch * pool.queries.count * width * size_of(wide)
                                              : tokens * width * size_of(dtype);
      const std::string bits =
          same_bits(std::string("a gradient of ") + mode.name, bytes, [&](void* out, const auto& parallel) {
            call.out = out;
            cpu::pool_backward(call, parallel);
          });
      if (!plain_sum(mode) || dtype != DType::float32) continue;
      for (int64_t i = 0; i < tokens; ++i) {
        for (int64_t c = 0; c < width; ++c) {
          float expected = 0, got;
          for (int64_t b = padded ? i / rows : 0; b < (padded ? i / rows + 1 : batch); ++b) {
            const int64_t row = padded ? i % rows : i;
            const bool inside = starts[static_cast<size_t>(b)] <= row && row < ends[static_cast<size_t>(b)];
            if (inside && c < dim && static_cast<uint8_t*>(mask.data)[i])
              expected += static_cast<float*>(gradient.data)[b * dim + c];
          }
          std::memcpy(&got, bits.data() + (i * width + c) * 4, 4);
          if (got != expected) fail("the gradient of token " + std::to_string(i));
        }
      }
    }
  }
}

void check_normalize(DType dtype, std::mt19937& random) {
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t rows = 300, width = 131, dim = 130;
  const int64_t sizes[] = {20, 15}, strides[] = {15 * width, width};
  Exact x(rows * width * size_of(dtype)), gradient(rows * dim * size_of(wide));
  fill(dtype, x, rows * width, random);
  fill(wide, gradient, rows * dim, random);
  NormalizeCall call;
  call.dtype = dtype, call.out_dtype = DType::float32;
  call.rows = rows, call.dim = dim, call.x = x.data;
  call.leading = 2, call.sizes = sizes, call.strides = strides;
  const auto forward = [&] {
    return same_bits("l2_normalize", rows * dim * 4, [&](void* out, const cpu::Parallel& parallel) {
      call.out = out;
      cpu::l2_normalize(call, parallel);
    });
  };
  const auto backward = [&] {
    const int64_t bytes = rows * width * size_of(dtype);
    return same_bits("a gradient of l2_normalize", bytes, [&](void* out, const cpu::Parallel& parallel) {
      NormalizeBackwardCall backward;
      backward.normalize = call, backward.width = width, backward.gradient = gradient.data, backward.out = out;
      cpu::l2_normalize_backward(backward, parallel);
    });
  };
  const std::string whole = forward(), whole_gradient = backward();

  // Rows of `dim` columns are as they were; of others the rest is zeros; values outside are clamped. Columns of
  // truncate_dims stand apart, so that strides count.
  std::vector<int32_t> truncate_dims(static_cast<size_t>(2 * rows));
  for (int32_t& one : truncate_dims) one = static_cast<int32_t>(random() % (dim + 3)) - 1;
  const int64_t truncate_dims_strides[] = {2, 40};
  call.truncate_dims.data = truncate_dims.data(), call.truncate_dims.wide = false,
  call.truncate_dims_strides = truncate_dims_strides;
  const std::string cut = forward(), cut_gradient = backward();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t value = truncate_dims[static_cast<size_t>(row / 15 * 2 + row % 15 * 40)];
    const int64_t used = std::max<int64_t>(0, std::min<int64_t>(value, dim));
    const auto part = [row](const std::string& bits, int64_t columns, int64_t from, int64_t to, int64_t size) {
      return bits.substr(static_cast<size_t>((row * columns + from) * size), static_cast<size_t>((to - from) * size));
    };
    const int64_t size = size_of(dtype);
    const auto zeros = [](int64_t n) { return std::string(static_cast<size_t>(n), '\0'); };
    if (used == dim && (part(cut, dim, 0, dim, 4) != part(whole, dim, 0, dim, 4) ||
                        part(cut_gradient, width, 0, width, size) != part(whole_gradient, width, 0, width, size)))
      fail("a whole row among others, " + std::to_string(row));
    if (part(cut, dim, used, dim, 4) != zeros((dim - used) * 4) ||
        part(cut_gradient, width, used, width, size) != zeros((width - used) * size))
      fail("columns behind those of row " + std::to_string(row));
  }
}

// The tokens of overlapping segments with holes, and their gradient, of small integers over 8: exact in every dtype.
void check_tokens(DType dtype, int64_t width, int64_t dim, bool padded, std::mt19937& random) {
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t batch = 9, rows = padded ? 71 : 400, all = padded ? batch * rows : rows;
  std::vector<int64_t> starts, ends, offsets(static_cast<size_t>(batch + 1)), sources;
  Exact hidden(all * width * size_of(dtype)), mask(all);
  fill(dtype, hidden, all * width, random);
  for (int64_t i = 0; i < all; ++i) static_cast<uint8_t*>(mask.data)[i] = i > 100 || random() % 4 != 0;
  for (int64_t b = 0; b < batch; ++b) {
    const auto one = static_cast<int64_t>(random() % (rows + 1)), other = static_cast<int64_t>(random() % (rows + 1));
    starts.push_back(std::min(one, other));
    ends.push_back(std::max(one, other));
    for (int64_t i = starts.back(); i < ends.back(); ++i) {
      const int64_t row = (padded ? b * rows : 0) + i;
      if (static_cast<uint8_t*>(mask.data)[row]) sources.push_back(row);
    }
  }
  const auto found = static_cast<int64_t>(sources.size()), size = found + 3;
  TokensCall call;
  PoolCall& pool = call.pool;
  pool.dtype = pool.out_dtype = dtype;
  pool.batch = batch, pool.rows = rows, pool.dim = dim, pool.width = width;
  pool.hidden = hidden.data, pool.row_stride = width, pool.batch_stride = padded ? rows * width : 0;
  pool.starts.data = starts.data(), pool.ends.data = ends.data();
  pool.mask.data = mask.data, pool.mask.batch_stride = padded ? rows : 0;
  if (!cpu::count_tokens(pool, offsets.data()) || offsets.back() != found) fail("the number of tokens");
  call.size = size, call.cu_seqlens = offsets.data();
  for (const DType out_dtype : {dtype, DType::float32}) {
    for (const bool normalize : {false, true}) {
      pool.out_dtype = out_dtype, pool.normalize = normalize;
      const int64_t row_bytes = dim * size_of(out_dtype);
      const std::string bits = same_bits("tokens", size * row_bytes, [&](void* out, const auto& parallel) {
        pool.out = out;
        cpu::tokens(call, parallel);
      });
      if (bits.substr(static_cast<size_t>(found * row_bytes)) != std::string(static_cast<size_t>(3 * row_bytes), '\0'))
        fail("rows behind the last token");
      if (normalize || out_dtype != dtype) continue;
      for (int64_t at = 0; at < found; ++at)
        if (std::memcmp(bits.data() + at * row_bytes,
                        static_cast<char*>(hidden.data) + sources[static_cast<size_t>(at)] * width * size_of(dtype),
                        static_cast<size_t>(row_bytes)) != 0)
          fail("token " + std::to_string(at));
    }
  }
  Exact gradient(found * dim * size_of(wide));
  fill(wide, gradient, found * dim, random);
  TokensBackwardCall backward;
  backward.pool = pool, backward.padded = padded, backward.size = found;
  backward.gradient = gradient.data, backward.cu_seqlens = offsets.data();
  const int64_t bytes = all * width * size_of(dtype);
  const std::string bits = same_bits("a gradient of tokens", bytes, [&](void* out, const auto& parallel) {
    backward.out = out;
    cpu::tokens_backward(backward, parallel);
  });
  if (dtype != DType::float32) return;
  std::vector<float> expected(static_cast<size_t>(all * width));
  for (int64_t at = 0; at < found; ++at)
    for (int64_t c = 0; c < dim; ++c)
      expected[static_cast<size_t>(sources[static_cast<size_t>(at)] * width + c)] +=
          static_cast<float*>(gradient.data)[at * dim + c];
  if (std::memcmp(bits.data(), expected.data(), bits.size()) != 0) fail("the gradient of tokens");
}

void check_quantize(DType dtype, std::mt19937& random) {
  const int64_t rows = 300, width = 131, sizes[] = {20, 15}, strides[] = {15 * width, width};
  Exact x(rows * width * size_of(dtype)), ranges(2 * width * 4);
  fill(dtype, x, rows * width, random);
  std::vector<double> low(static_cast<size_t>(width)), high(low);
  for (int64_t c = 0; c < width; ++c) {
    const auto i = static_cast<size_t>(c);
    low[i] = static_cast<int>(random() % 16) / -8.0,
    high[i] = c % 9 == 0 ? low[i] : static_cast<int>(random() % 16) / 8.0;
    write(DType::float32, ranges.data, c, low[i]), write(DType::float32, ranges.data, width + c, high[i]);
  }
  for (const Kind& kind : kKinds)
    for (const int64_t dim : {int64_t{1}, int64_t{8}, int64_t{130}, width}) {
      QuantizeCall call;
      call.kind = kind, call.dtype = dtype, call.rows = rows, call.dim = dim;
      call.x = x.data, call.leading = 2, call.sizes = sizes, call.strides = strides;
      call.low = static_cast<const float*>(ranges.data), call.high = call.low + width;
      if (!cpu::valid_ranges(call)) fail("ranges");
      const int64_t columns = call.out_columns();
      const std::string bytes = same_bits("quantize", rows * columns, [&](void* out, const cpu::Parallel& parallel) {
        call.out = out;
        cpu::quantize(call, parallel);
      });
      if (kind.how != How::bits || dtype != DType::float64) continue;
      for (int64_t i = 0; i < rows * dim; ++i) {
        const auto byte = static_cast<uint8_t>(bytes[static_cast<size_t>(i / dim * columns + i % dim / 8)]);
        const bool bit = (byte ^ kind.flip) >> (7 - i % dim % 8) & 1;
        if (bit != (static_cast<const double*>(x.data)[i / dim * width + i % dim] > 0))
          fail("bit " + std::to_string(i));
      }
    }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64}) {
    for (const int64_t width : {1, 17, 64, 200})
      for (const bool padded : {false, true}) check_case(dtype, width, padded, {3, 0, 1, 40, 300, 33, 64}, random);
    check_case(dtype, 384, false, {1500, 2, 0, 700}, random);  // long enough to be split
    for (const bool padded : {false, true}) {
      check_backward(dtype, 1, 1, padded, random);
      check_backward(dtype, 200, 133, padded, random);
    }
    check_normalize(dtype, random);
    for (const bool padded : {false, true}) {
      check_tokens(dtype, 1, 1, padded, random);
      check_tokens(dtype, 133, 130, padded, random);
    }
    check_quantize(dtype, random);
  }
  std::printf("%lld results, the same bits with %zu instruction sets: ok\n", static_cast<long long>(checked),
              cpu::isas().size());
}
