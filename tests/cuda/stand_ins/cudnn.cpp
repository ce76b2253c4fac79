// The part of cuDNN that a decoder may reach: reductions, additions, softmax. The library is loaded at its first call.
#include <cstddef>

#include "trace.h"

namespace {

// Values of cudnnStatus_t.
constexpr int kSuccess = 0, kExecutionFailed = 5000;

int create(void** object) {
  *object = new char;
  return kSuccess;
}
int destroy(void* object) {
  delete static_cast<char*>(object);
  return kSuccess;
}
int count(const char* function) { return trace::launch(function) ? kSuccess : kExecutionFailed; }

}  // namespace

extern "C" {

size_t cudnnGetVersion() { return 92000; }
size_t cudnnGetCudartVersion() { return 13000; }
const char* cudnnGetErrorString(int) { return "status of the dry run"; }
void cudnnGetLastErrorString(char* message, size_t size) {
  if (size) *message = 0;
}

int cudnnCreate(void** handle) { return create(handle); }
int cudnnDestroy(void* handle) { return destroy(handle); }
int cudnnSetStream(void*, void*) { return kSuccess; }
int cudnnGetStream(void*, void** stream) {
  *stream = nullptr;
  return kSuccess;
}

int cudnnCreateTensorDescriptor(void** descriptor) { return create(descriptor); }
int cudnnDestroyTensorDescriptor(void* descriptor) { return destroy(descriptor); }
int cudnnSetTensorNdDescriptor(...) { return kSuccess; }
int cudnnCreateReduceTensorDescriptor(void** descriptor) { return create(descriptor); }
int cudnnDestroyReduceTensorDescriptor(void* descriptor) { return destroy(descriptor); }
int cudnnSetReduceTensorDescriptor(...) { return kSuccess; }
int cudnnGetReductionWorkspaceSize(void*, void*, void*, void*, size_t* bytes) {
  *bytes = 1024;
  return kSuccess;
}
int cudnnGetReductionIndicesSize(void*, void*, void*, void*, size_t* bytes) {
  *bytes = 0;
  return kSuccess;
}

int cudnnReduceTensor(...) { return count("cudnnReduceTensor"); }
int cudnnAddTensor(...) { return count("cudnnAddTensor"); }
int cudnnSoftmaxForward(...) { return count("cudnnSoftmaxForward"); }

}  // extern "C"
