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
  for (int mode = 0; mode < kModes; ++mode) {
    PoolCall call;
    call.mode = static_cast<Mode>(mode);
    call.dtype = dtype;
    call.batch = batch, call.rows = rows, call.dim = width;
    call.hidden = hidden.data;
    call.row_stride = width, call.batch_stride = padded ? longest * width : 0;
    call.starts.data = starts.data(), call.ends.data = ends.data();
    call.mask.data = mask.data, call.mask.batch_stride = padded ? longest : 0;
    if (call.mode == Mode::weighted_mean) {
      call.weights.data = weights.data;
      call.weights.batch_stride = call.mask.batch_stride;
    }
    for (const DType out_dtype : {dtype, DType::float32}) {
      for (const bool normalize : {false, true}) {
        call.out_dtype = out_dtype, call.normalize = normalize;
        std::string first;
        for (const std::string& isa : cpu::isas()) {
          cpu::use_isa(isa);
          for (const int threads : {1, 2, 5}) {
            const int64_t bytes = batch * width * size_of(out_dtype);
            Exact out(bytes);
            std::memset(out.data, 0xff, static_cast<size_t>(bytes));  // NaN where nothing is written
            call.out = out.data;
            cpu::pool(call, {threads, run_threads});
            const std::string bits(static_cast<const char*>(out.data), static_cast<size_t>(bytes));
            if (first.empty()) first = bits;
            if (bits != first)
              fail("bits of " + std::string(kModeNames[mode]) + " with " + isa + " and " + std::to_string(threads) +
                   " threads");
            ++checked;
          }
        }
        if (call.mode == Mode::sum && out_dtype == DType::float32 && !normalize) {
          for (int64_t b = 0; b < batch; ++b) {
            double expected = 0;
            for (int64_t i = starts[static_cast<size_t>(b)]; i < ends[static_cast<size_t>(b)]; ++i) {
              const int64_t token = (padded ? b * longest : 0) + i;
              if (static_cast<uint8_t*>(mask.data)[token]) expected += values[static_cast<size_t>(token * width)];
            }
            float result;
            std::memcpy(&result, first.data() + b * width * 4, 4);
            // Eighths of small integers add up exactly.
            if (result != static_cast<float>(expected)) fail("sum of segment " + std::to_string(b));
          }
        }
      }
    }
  }
}

void check_normalize(DType dtype, std::mt19937& random) {
  const int64_t rows = 300, width = 131;
  Exact x(rows * width * size_of(dtype));
  for (int64_t i = 0; i < rows * width; ++i) write(dtype, x.data, i, (static_cast<int>(random() % 31) - 12) / 8.0);
  std::string first;
  for (const std::string& isa : cpu::isas()) {
    cpu::use_isa(isa);
    for (const int threads : {1, 3}) {
      Exact out(rows * width * 4);
      const int64_t sizes[] = {20, 15}, strides[] = {15 * width, width};
      NormalizeCall call;
      call.dtype = dtype, call.out_dtype = DType::float32;
      call.rows = rows, call.dim = width, call.x = x.data;
      call.leading = 2, call.sizes = sizes, call.strides = strides;
      call.out = out.data;
      cpu::l2_normalize(call, {threads, run_threads});
      const std::string bits(static_cast<const char*>(out.data), static_cast<size_t>(rows * width * 4));
      if (first.empty()) first = bits;
      if (bits != first) fail("bits of l2_normalize with " + isa);
      ++checked;
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
    check_normalize(dtype, random);
  }
  std::printf("%lld results, the same bits with %zu instruction sets: ok\n", static_cast<long long>(checked),
              cpu::isas().size());
}
