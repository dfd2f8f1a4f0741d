// A C++ program without Python that runs an AOTInductor package whose model pools with fastpool:
//   aoti_host PACKAGE LIBFASTPOOL_SCHEMAS B S H HIDDEN MASK RESULT
// hidden [B, S, H] float32 and mask [B, S] bool are read from files, the result is written to one: plain bytes.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

static at::Tensor read(const char* path, std::vector<int64_t> shape, at::ScalarType dtype) {
  at::Tensor tensor = at::empty(shape, dtype);
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr || std::fread(tensor.data_ptr(), 1, tensor.nbytes(), file) != tensor.nbytes()) std::exit(2);
  std::fclose(file);
  return tensor;
}

int main(int, char** argv) {
  // Before the package is loaded, which looks its ops up.
  if (dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  const int64_t b = std::atoll(argv[3]), s = std::atoll(argv[4]), h = std::atoll(argv[5]);
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const auto results = model.run({read(argv[6], {b, s, h}, at::kFloat), read(argv[7], {b, s}, at::kBool)});
  std::FILE* file = std::fopen(argv[8], "wb");
  std::fwrite(results.at(0).contiguous().data_ptr(), 1, results.at(0).nbytes(), file);
  std::fclose(file);
}
