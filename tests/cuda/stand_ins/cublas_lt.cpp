// Products with an epilogue, counted with the sizes of their layouts. Signatures follow cublasLt.h.
#include <cstdint>
#include <cstring>
#include <string>

#include "trace.h"

namespace {

// Values of cublasStatus_t.
constexpr int kSuccess = 0, kExecutionFailed = 13;

struct Layout {
  uint64_t rows, columns;
};

std::string sizes(const void* layout) {
  auto* own = static_cast<const Layout*>(layout);
  return std::to_string(own->rows) + "x" + std::to_string(own->columns);
}

// cublasLtMatmulHeuristicResult_t
struct HeuristicResult {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

int create(void** object) {
  *object = new char;
  return kSuccess;
}
int destroy(void* object) {
  delete static_cast<char*>(object);
  return kSuccess;
}

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) { return create(handle); }
int cublasLtDestroy(void* handle) { return destroy(handle); }
int cublasLtMatmulDescCreate(void** description, int, int) { return create(description); }
int cublasLtMatmulDescDestroy(void* description) { return destroy(description); }
int cublasLtMatmulDescSetAttribute(...) { return kSuccess; }
int cublasLtMatmulPreferenceCreate(void** preference) { return create(preference); }
int cublasLtMatmulPreferenceDestroy(void* preference) { return destroy(preference); }
int cublasLtMatmulPreferenceSetAttribute(...) { return kSuccess; }
int cublasLtMatrixTransformDescCreate(void** description, int) { return create(description); }
int cublasLtMatrixTransformDescDestroy(void* description) { return destroy(description); }
int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t rows, uint64_t columns, int64_t) {
  *layout = new Layout{rows, columns};
  return kSuccess;
}
int cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return kSuccess;
}
int cublasLtMatrixLayoutSetAttribute(...) { return kSuccess; }

// One algorithm, without a workspace.
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, HeuristicResult* results,
                                   int* found) {
  std::memset(results, 0, sizeof *results);
  *found = 1;
  return kSuccess;
}
int cublasLtMatmulAlgoInit(...) { return kSuccess; }
int cublasLtMatmulAlgoConfigSetAttribute(...) { return kSuccess; }

int cublasLtMatmul(void*, void*, const void*, const void*, void* a, const void*, void* b, const void*, const void*,
                   void*, void*, void* d, ...) {
  return trace::launch("cublasLtMatmul " + sizes(a) + " by " + sizes(b) + " to " + sizes(d)) ? kSuccess
                                                                                             : kExecutionFailed;
}
int cublasLtMatrixTransform(...) { return trace::launch("cublasLtMatrixTransform") ? kSuccess : kExecutionFailed; }

}  // extern "C"
