// Products, counted with their sizes. Signatures follow cublas_v2.h, whose wheel is too large for a test.
#include <cstdlib>
#include <string>

#include "trace.h"

namespace {

// Values of cublasStatus_t.
constexpr int kSuccess = 0, kExecutionFailed = 13, kNotSupported = 15;

const char* type_name(int type) {
  switch (type) {  // cudaDataType
    case 0:
      return "float32";
    case 1:
      return "float64";
    case 2:
      return "float16";
    case 14:
      return "bfloat16";
    default:
      return "other";
  }
}

int product(const char* function, int m, int n, int k, int batch, int type) {
  std::string sizes = " m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k);
  bool works = trace::launch(std::string(function) + " " + type_name(type) + sizes + " batch=" + std::to_string(batch));
  return works ? kSuccess : kExecutionFailed;
}

struct Handle {
  int math_mode = 0;
};

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
  *handle = new Handle;
  return kSuccess;
}
int cublasDestroy_v2(void* handle) {
  delete static_cast<Handle*>(handle);
  return kSuccess;
}
int cublasSetStream_v2(void*, void*) { return kSuccess; }
int cublasSetMathMode(void* handle, int mode) {
  static_cast<Handle*>(handle)->math_mode = mode;
  return kSuccess;
}
int cublasGetMathMode(void* handle, int* mode) {
  *mode = static_cast<Handle*>(handle)->math_mode;
  return kSuccess;
}
const char* cublasGetStatusName(int) { return "status of the dry run"; }
const char* cublasGetStatusString(int) { return "status of the dry run"; }

int cublasSgemm_v2(void*, int, int, int m, int n, int k, ...) { return product("cublasSgemm", m, n, k, 1, 0); }
int cublasDgemm_v2(void*, int, int, int m, int n, int k, ...) { return product("cublasDgemm", m, n, k, 1, 1); }
int cublasGemmEx(void*, int, int, int m, int n, int k, const void*, const void*, int type, ...) {
  return product("cublasGemmEx", m, n, k, 1, type);
}
int cublasGemmStridedBatchedEx(void*, int, int, int m, int n, int k, const void*, const void*, int type, int, long long,
                               const void*, int, int, long long, const void*, void*, int, int, long long, int batch,
                               ...) {
  return product("cublasGemmStridedBatchedEx", m, n, k, batch, type);
}
int cublasSgemmStridedBatched(void*, int, int, int m, int n, int k, const float*, const float*, int, long long,
                              const float*, int, long long, const float*, float*, int, long long, int batch) {
  return product("cublasSgemmStridedBatched", m, n, k, batch, 0);
}
int cublasGemmBatchedEx(void*, int, int, int m, int n, int k, const void*, const void* const*, int type, int,
                        const void* const*, int, int, const void*, void* const*, int, int, int batch, ...) {
  return product("cublasGemmBatchedEx", m, n, k, batch, type);
}
int cublasSgemmBatched(void*, int, int, int m, int n, int k, const float*, const float* const*, int,
                       const float* const*, int, const float*, float* const*, int, int batch) {
  return product("cublasSgemmBatched", m, n, k, batch, 0);
}
int cublasSgeam(void*, int, int, int m, int n, ...) { return product("cublasSgeam", m, n, 0, 1, 0); }
int cublasDgeam(void*, int, int, int m, int n, ...) { return product("cublasDgeam", m, n, 0, 1, 1); }

// No decoder needs these. A graph that does is told so.
int cublasDgemmBatched(...) { return kNotSupported; }
int cublasDgemmStridedBatched(...) { return kNotSupported; }
int cublasDgetrfBatched(...) { return kNotSupported; }
int cublasDgetriBatched(...) { return kNotSupported; }
int cublasSgetrfBatched(...) { return kNotSupported; }
int cublasSgetriBatched(...) { return kNotSupported; }
int cublasScopy_v2(...) { return kNotSupported; }
int cublasSscal_v2(...) { return kNotSupported; }

}  // extern "C"
