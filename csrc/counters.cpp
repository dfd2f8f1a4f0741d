#include "counters.h"

#include <map>
#include <mutex>

namespace fastpool::cuda {
namespace {

struct Stream {
  std::mutex mutex;  // held from the choice of a buffer until its launch is on the stream, which threads may share
  int* buffers[2] = {};
  int turn = 0;      // the buffer that is all zero
  int64_t used = 0;  // counters of the other one that need not be
};

// The buffers of a stream, dealt out as streams come; null: there are none left. Streams are told apart by their
// handles, as by torch's allocator. The map stays when the process ends, since some thread may still be at work.
Stream* kept(int32_t device, cudaStream_t handle) {
  using Streams = std::map<cudaStream_t, Stream>;
  static auto& mutex = *new std::mutex;
  static auto& devices = *new std::map<int32_t, Streams>;
  const std::lock_guard<std::mutex> lock(mutex);
  Streams& streams = devices[device];
  const auto found = streams.find(handle);
  if (found != streams.end()) return &found->second;
  if (streams.size() == kKeptStreams) return nullptr;
  int* memory = nullptr;
  check_cuda(kept_counters(&memory));
  memory += 2 * kKeptCounters * static_cast<int64_t>(streams.size());
  Stream& stream = streams[handle];
  stream.buffers[0] = memory, stream.buffers[1] = memory + kKeptCounters;
  return &stream;
}

// A graph that is being captured may be replayed on any stream, and one handle stands for a stream of every thread.
bool is_one_stream(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  return status == cudaStreamCaptureStatusNone && stream != cudaStreamPerThread;
}

}  // namespace

void with_counters(const OnDevice& device, int64_t count, const std::function<void(const Counters&)>& launch) {
  const cudaStream_t handle = device.stream();
  Stream* const stream = count <= kKeptCounters && is_one_stream(handle) ? kept(device.index(), handle) : nullptr;
  if (stream == nullptr) {  // memory of the call's own, and a launch to clear it
    const int64_t bytes = count * static_cast<int64_t>(sizeof(int));
    const Tensor memory = device.memory(bytes);
    check_cuda(cudaMemsetAsync(memory.mutable_data(), 0, static_cast<size_t>(bytes), handle));
    return launch({static_cast<int*>(memory.mutable_data()), nullptr, 0});
  }
  const std::lock_guard<std::mutex> lock(stream->mutex);
  launch({stream->buffers[stream->turn], stream->buffers[1 - stream->turn], stream->used});
  stream->turn = 1 - stream->turn, stream->used = count;
}

}  // namespace fastpool::cuda
