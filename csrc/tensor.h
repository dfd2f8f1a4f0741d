// A tensor of the LibTorch stable ABI, as an op has it on its stack.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace fastpool {

inline void check_api(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("fastpool: torch refused ") + what);
}

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// A tensor on the stack, owned from the moment it is read.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    check_api(aoti_torch_is_defined(handle_, &defined_), "a tensor");
    if (!defined_) return;  // None of Python's where a tensor must be given
    check_api(aoti_torch_get_dim(handle_, &dim_), "a tensor's rank");
    check_api(aoti_torch_get_sizes(handle_, &sizes_), "a tensor's sizes");
    check_api(aoti_torch_get_strides(handle_, &strides_), "a tensor's strides");
    check_api(aoti_torch_get_dtype(handle_, &dtype_), "a tensor's dtype");
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    dim_ = other.dim_, sizes_ = other.sizes_, strides_ = other.strides_, dtype_ = other.dtype_;
    defined_ = other.defined_;
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }
  explicit operator bool() const { return handle_ != nullptr && defined_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int32_t dtype() const { return dtype_; }
  // Whether all its elements, of so many bytes each, stand in memory that it has. A storage may be freed or shrunk
  // under a tensor, which notices nothing.
  bool in_memory(int64_t bytes) const {
    int64_t last = 0, held = 0;
    check_api(aoti_torch_get_storage_offset(handle_, &last), "a tensor's offset");
    check_api(aoti_torch_get_storage_size(handle_, &held), "a tensor's memory");
    for (int64_t d = 0; d < dim_; ++d) {
      if (sizes_[d] == 0) return true;
      last += (sizes_[d] - 1) * strides_[d];
    }
    return (last + 1) * bytes <= held;
  }
  void copy_from(const Tensor& source) { check_api(aoti_torch_copy_(handle_, source.handle_, 0), "to copy a tensor"); }
  Device device() const {
    Device device;
    check_api(aoti_torch_get_device_type(handle_, &device.type), "a tensor's device");
    check_api(aoti_torch_get_device_index(handle_, &device.index), "a tensor's device");
    return device;
  }
  const void* data() const {
    const void* p = nullptr;
    check_api(torch_get_const_data_ptr(handle_, &p), "a tensor's data");
    return p;
  }
  void* mutable_data() const {
    void* p = nullptr;
    check_api(torch_get_mutable_data_ptr(handle_, &p), "a tensor's data");
    return p;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0;
  int64_t *sizes_ = nullptr, *strides_ = nullptr;
  int32_t dtype_ = 0;
  bool defined_ = false;
};

// Thrown where torch has no memory for a tensor of so many bytes, or of more than can be counted.
struct NoMemory {
  int64_t bytes;
  bool countable;
  std::string words() const { return (countable ? "" : "more than ") + std::to_string(bytes); }
};

// A contiguous tensor, not filled.
Tensor empty(int64_t dim, const int64_t* sizes, int32_t torch_dtype, Device device);

}  // namespace fastpool
