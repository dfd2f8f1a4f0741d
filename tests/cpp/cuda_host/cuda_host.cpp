// The engine behind this folder's cuda_runtime.h, and what stands for torch's CUDA part. Built together with the
// kernels and csrc/ops_cuda.cpp into a library that serves CPU tensors as `torch.ops.fastpool_cuda_host.*`.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/block.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define ENTER_FIBER(bottom, size) __sanitizer_start_switch_fiber(&fake, bottom, size)
#define ENTERED_FIBER(from_bottom, from_size) __sanitizer_finish_switch_fiber(fake, from_bottom, from_size)
#else
#define ENTER_FIBER(bottom, size) ((void)fake, (void)(bottom), (void)(size))
#define ENTERED_FIBER(from_bottom, from_size) ((void)fake, (void)(from_bottom), (void)(from_size))
#endif

// cuda_host_switch(&here, there): saves what a call must preserve, and goes on on the other stack.
extern "C" void cuda_host_switch(void** here, void* there);
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace fastpool::cuda {
constexpr size_t kMostShared = 227 << 10, kGuard = 4 << 10;
uint4 shared_memory[(kMostShared + kGuard) / sizeof(uint4)];
}  // namespace fastpool::cuda

namespace cuda_host {

namespace {

constexpr size_t kStack = 64 << 10;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* at = nullptr;
  bool done = false;
  const int64_t* waits_for = nullptr;  // it goes on when this count has passed `before`
  int64_t before = 0;
};

struct Barrier {
  int arrived = 0;
  int64_t count = 0;  // times that all have reached it
  uint64_t values[2][32] = {};
};

std::vector<Fiber> fibers;
std::vector<Barrier> warps;
Barrier block;
void* scheduler = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
size_t running = 0;
const std::function<void()>* program = nullptr;
std::mt19937_64 order{0};
std::mutex engine;  // one launch at a time

void to_scheduler() {
  void* fake = nullptr;
  ENTER_FIBER(scheduler_stack, scheduler_size);
  cuda_host_switch(&fibers[running].at, scheduler);
  ENTERED_FIBER(&scheduler_stack, &scheduler_size);
}

void main_of_fiber() {
  void* fake = nullptr;
  ENTERED_FIBER(&scheduler_stack, &scheduler_size);
  (*program)();
  fibers[running].done = true;
  to_scheduler();
  __builtin_unreachable();
}

void begin(Fiber& fiber) {
  fiber.done = false;
  fiber.waits_for = nullptr;
  // As cuda_host_switch leaves a stack: six registers, then where to go on. A function starts 8 bytes off a multiple
  // of 16.
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) / 16 * 16 - 16;
  *reinterpret_cast<void (**)()>(top) = main_of_fiber;
  std::memset(reinterpret_cast<void*>(top - 48), 0, 48);
  fiber.at = reinterpret_cast<void*>(top - 48);
}

void wait(Barrier& barrier, int all) {
  if (++barrier.arrived == all) {
    barrier.arrived = 0;
    ++barrier.count;
    return;
  }
  Fiber& fiber = fibers[running];
  fiber.waits_for = &barrier.count;
  fiber.before = barrier.count;
  to_scheduler();
}

// Lets a fiber run until it waits. False: it still waits, or is done.
bool advance(unsigned t) {
  Fiber& fiber = fibers[t];
  if (fiber.done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.before)) return false;
  fiber.waits_for = nullptr;
  running = t;
  threadIdx.x = t;
  void* fake = nullptr;
  ENTER_FIBER(fiber.stack.get(), kStack);
  cuda_host_switch(&scheduler, fiber.at);
  ENTERED_FIBER(nullptr, nullptr);
  return true;
}

// A warp runs ahead of the others as far as barriers let it, so that a missing one is noticed; in any order, as its
// lanes.
void run_block(std::vector<unsigned>& of_block) {
  block = {};
  std::fill(warps.begin(), warps.end(), Barrier{});
  for (unsigned t = 0; t < blockDim.x; ++t) begin(fibers[t]);
  unsigned lanes[32];
  for (unsigned i = 0; i < 32; ++i) lanes[i] = i;
  std::shuffle(lanes, lanes + 32, order);
  std::shuffle(of_block.begin(), of_block.end(), order);
  bool progress = true;
  while (progress) {
    progress = false;
    for (const unsigned warp : of_block) {
      for (bool moved = true; moved;) {
        moved = false;
        for (const unsigned lane : lanes) moved |= advance(warp * 32 + lane);
        progress |= moved;
      }
    }
  }
  if (std::any_of(fibers.begin(), fibers.begin() + blockDim.x, [](const Fiber& fiber) { return !fiber.done; }))
    throw std::runtime_error("cuda_host: a barrier or warp operation that not every thread reaches");
}

}  // namespace

void barrier() { wait(block, static_cast<int>(blockDim.x)); }

const uint64_t* exchange(uint64_t value) {
  Barrier& warp = warps[running / 32];
  uint64_t* const values = warp.values[warp.count & 1];  // the next time but one comes after all have read
  values[running % 32] = value;
  wait(warp, 32);
  return values;
}

Control control;
bool skip_launches = false;

void check_counters(const int* arrived, const int* stale, size_t blocks) {
  control.arrived = arrived, control.stale = stale;
  if (std::any_of(arrived, arrived + blocks, [](int counter) { return counter != 0; }))
    throw std::runtime_error("cuda_host: a launch whose counters are not zero");
}

void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& body) {
  using namespace fastpool::cuda;
  const std::lock_guard<std::mutex> lock(engine);
  if (threads.x % 32 != 0 || threads.x > 1024 || threads.y * threads.z != 1 || shared > kMostShared || blocks.x == 0 ||
      blocks.y == 0 || blocks.y > 65535)
    throw std::runtime_error("cuda_host: a launch that CUDA would refuse");
  while (fibers.size() < threads.x) fibers.emplace_back();
  warps.resize(threads.x / 32);
  program = &body;
  blockDim = threads, gridDim = blocks;
  std::vector<unsigned> of_block(threads.x / 32);  // warps
  for (unsigned w = 0; w < of_block.size(); ++w) of_block[w] = w;
  std::vector<uint64_t> of_grid(static_cast<size_t>(blocks.x) * blocks.y);
  for (size_t i = 0; i < of_grid.size(); ++i) of_grid[i] = i;
  std::shuffle(of_grid.begin(), of_grid.end(), order);
  char* const memory = reinterpret_cast<char*>(shared_memory);
  for (const uint64_t i : of_grid) {
    blockIdx = dim3(static_cast<unsigned>(i % blocks.x), static_cast<unsigned>(i / blocks.x));
    std::memset(memory, 0xff, shared + kGuard);  // NaN; and a guard behind what was asked for
    run_block(of_block);
    for (size_t g = 0; g < kGuard; ++g)
      if (memory[shared + g] != '\xff') throw std::runtime_error("cuda_host: a write behind shared memory");
  }
}

}  // namespace cuda_host

extern "C" {

// ---- torch's CUDA part
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = cuda_host::control.stream;
  return 0;
}
// Every tensor is on the device that a test says, and made on the CPU, full of NaN: what nobody writes shows.
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = cuda_host::control.device;
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t type, int32_t, AtenTensorHandle* tensor) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  static const auto of_torch =
      reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(torch, "aoti_torch_empty_strided"));
  const AOTITorchError error = of_torch(dim, sizes, strides, dtype, type, 0, tensor);
  if (error != 0) return error;
  int64_t bytes = 0;
  void* data = nullptr;
  aoti_torch_get_storage_size(*tensor, &bytes);
  aoti_torch_get_data_ptr(*tensor, &data);
  if (bytes > 0) std::memset(data, 0xff, static_cast<size_t>(bytes));
  cuda_host::control.allocated += bytes;
  return 0;
}

// ---- what tests read and set, through ctypes
#define TEST_API __attribute__((visibility("default")))
TEST_API cuda_host::Control* cuda_host_control() { return &cuda_host::control; }
TEST_API void cuda_host_skip_launches(int on) { cuda_host::skip_launches = on != 0; }
TEST_API void cuda_host_seed(uint64_t seed) { cuda_host::order.seed(seed); }
TEST_API void cuda_host_tune(int threads, int64_t split, int64_t strip, int64_t partial, int tile) {
  const fastpool::cuda::Tuning usual;
  fastpool::cuda::tuning = {threads > 0 ? threads : usual.threads, split, tile, strip > 0 ? strip : usual.strip_bytes,
                            partial > 0 ? partial : usual.partial_bytes};
}
}
