// The device of a call on CUDA tensors: current while the call lasts, its stream, its memory, its properties.
#pragma once
#define USE_CUDA  // the shim's CUDA part
#include <vector>

#include "arguments.h"
#include "cuda/kernels.h"

namespace fastpool::cuda {

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and nowhere else
  throw std::runtime_error(std::string("fastpool: CUDA says: ") + cudaGetErrorString(error));
}

// While this lives, the device is the current one.
class OnDevice {
 public:
  explicit OnDevice(Device device) : device_(device) {
    check_api(aoti_torch_create_device_guard(device.index, &guard_), "a device guard");
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { aoti_torch_delete_device_guard(guard_); }
  int32_t index() const { return device_.index; }
  cudaStream_t stream() const {
    void* stream = nullptr;
    check_api(aoti_torch_get_current_cuda_stream(device_.index, &stream), "its current stream");
    return static_cast<cudaStream_t>(stream);
  }
  // What cannot change is asked for once.
  const DeviceProperties& properties() const {
    static const std::vector<DeviceProperties> all = all_properties();
    return all.at(static_cast<size_t>(device_.index));
  }
  // Torch's allocator gives it back to calls that come later on this stream; its rows start at multiples of 16 bytes.
  Tensor memory(int64_t bytes) const { return empty(1, &bytes, aoti_torch_dtype_uint8(), device_); }

 private:
  static std::vector<DeviceProperties> all_properties() {
    int devices = 0;
    check_cuda(cudaGetDeviceCount(&devices));
    std::vector<DeviceProperties> all;
    for (int device = 0; device < devices; ++device) {
      int sm_count = 0, shared = 0;
      check_cuda(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device));
      check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
      all.push_back({sm_count, shared});
    }
    return all;
  }

  Device device_;
  DeviceGuardHandle guard_ = nullptr;
};

}  // namespace fastpool::cuda
