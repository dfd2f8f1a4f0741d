// Op arguments on the LibTorch stable ABI: read from the boxed stack, checked, and turned into a PoolCall. Every
// message stands word for word in python/fastpool/segments.py or checks.py too, which turn it into a TypeError or
// ValueError; a test compares.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "pool.h"

namespace fastpool {

// Throws with the text that `message()` makes: made only when it is needed, since good calls are to be fast.
template <class Message>
void check(bool ok, Message message) {
  if (!ok) throw std::runtime_error(message());
}
inline void check_api(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("fastpool: torch refused ") + what);
}

std::string dtype_name(int32_t torch_dtype);
std::optional<DType> float_dtype(int32_t torch_dtype);
int integer_bytes(int32_t torch_dtype);  // of bool and the integer types; 0 for any other

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// A tensor on the stack, owned from the moment it is read.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    check_api(aoti_torch_get_dim(handle_, &dim_), "a tensor's rank");
    check_api(aoti_torch_get_sizes(handle_, &sizes_), "a tensor's sizes");
    check_api(aoti_torch_get_strides(handle_, &strides_), "a tensor's strides");
    check_api(aoti_torch_get_dtype(handle_, &dtype_), "a tensor's dtype");
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    dim_ = other.dim_, sizes_ = other.sizes_, strides_ = other.strides_, dtype_ = other.dtype_;
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }
  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int32_t dtype() const { return dtype_; }
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
  std::string shape() const;

 private:
  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0;
  int64_t *sizes_ = nullptr, *strides_ = nullptr;
  int32_t dtype_ = 0;
};

// What every pooling op takes, in the schema's order.
struct PoolArguments {
  Tensor hidden, mask, cu_seqlens, weights, starts, ends;
  std::optional<int64_t> truncate_dim;
  bool normalize = false;
  std::optional<int32_t> out_dtype;

  PoolArguments() = default;
  PoolArguments(StableIValue* stack, bool takes_weights);
  // Checks all but the values of index tensors. `op` is the name that messages start with.
  PoolCall call(Mode mode, const char* op) const;
  Tensor output(const PoolCall& call) const;
};

struct NormalizeArguments {
  Tensor x, truncate_dims;
  std::optional<int64_t> truncate_dim;
  double eps = kNormEps;
  std::optional<int32_t> out_dtype;

  NormalizeArguments() = default;
  explicit NormalizeArguments(StableIValue* stack);
  NormalizeCall call(const char* op) const;
  Tensor output(const NormalizeCall& call) const;
};

struct PoolBackwardArguments {
  PoolArguments pool;
  Tensor gradient, result;

  explicit PoolBackwardArguments(StableIValue* stack);
  PoolBackwardCall call(Mode mode, bool of_weights, const char* op) const;
  Tensor output(bool of_weights) const;
};

struct NormalizeBackwardArguments {
  NormalizeArguments normalize;
  Tensor gradient;

  explicit NormalizeBackwardArguments(StableIValue* stack);
  NormalizeBackwardCall call(const char* op) const;
  Tensor output() const;
};

// A contiguous one, not filled.
Tensor empty(int64_t dim, const int64_t* sizes, int32_t torch_dtype, Device device);
int32_t torch_dtype(DType dtype);

}  // namespace fastpool
