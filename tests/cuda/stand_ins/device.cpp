// The device: an H200, as far as onnxruntime asks, with a size and faults that tests choose.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <mutex>
#include <string>

#include "state.h"

namespace {

constexpr int kCudaVersion = 13000;
constexpr int kProcessors = 132;
constexpr size_t kSharedMemory = 49152, kSharedMemoryOptIn = 232448, kSharedMemoryOfProcessor = 233472;

std::mutex mutex;
size_t total = size_t{139} << 30;
int compute_capability = 90;

// The fault that a test has planned, and the one that has happened.
std::string planned_function;
size_t calls_left = 0;
cudaError_t planned = cudaSuccess;
cudaError_t happened = cudaSuccess;

int attribute(cudaDeviceAttr name) {
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor:
      return compute_capability / 10;
    case cudaDevAttrComputeCapabilityMinor:
      return compute_capability % 10;
    case cudaDevAttrMultiProcessorCount:
      return kProcessors;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return kSharedMemory;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return kSharedMemoryOptIn;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return kSharedMemoryOfProcessor;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrL2CacheSize:
      return 60 << 20;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCooperativeLaunch:
      return 1;
    default:
      return 0;
  }
}

CUresult unavailable(...) { return CUDA_ERROR_NOT_SUPPORTED; }

}  // namespace

cudaError_t device::fault() {
  std::lock_guard<std::mutex> lock(mutex);
  return happened;
}

cudaError_t device::called(const char* function) {
  std::lock_guard<std::mutex> lock(mutex);
  if (planned && planned_function == function && calls_left-- == 0) {
    happened = planned;
    planned = cudaSuccess;
  }
  return happened;
}

size_t device::total_memory() { return total; }
int device::capability() { return compute_capability; }

extern "C" {

void dry_run_set_memory(size_t bytes) { total = bytes; }
void dry_run_set_capability(int capability) { compute_capability = capability; }

// Makes a function fail after so many calls that work, and every call from then on, as after an error of a real device.
void dry_run_fail(const char* function, size_t after, int error) {
  std::lock_guard<std::mutex> lock(mutex);
  planned_function = function;
  calls_left = after;
  planned = static_cast<cudaError_t>(error);
}
// Takes every fault back. A real device needs a new process for that.
void dry_run_mend() {
  std::lock_guard<std::mutex> lock(mutex);
  planned = happened = cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) { return number ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = attribute(name);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "NVIDIA H200 (dry run)");
  properties->totalGlobalMem = total;
  properties->major = compute_capability / 10;
  properties->minor = compute_capability % 10;
  properties->multiProcessorCount = kProcessors;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = kSharedMemory;
  properties->sharedMemPerBlockOptin = kSharedMemoryOptIn;
  properties->sharedMemPerMultiprocessor = kSharedMemoryOfProcessor;
  properties->reservedSharedMemPerBlock = 1024;
  properties->totalConstMem = 65536;
  properties->l2CacheSize = 60 << 20;
  properties->memoryBusWidth = 6144;
  properties->memPitch = 2147483647;
  properties->asyncEngineCount = 3;
  properties->concurrentKernels = properties->unifiedAddressing = properties->canMapHostMemory = 1;
  properties->managedMemory = properties->streamPrioritiesSupported = properties->cooperativeLaunch = 1;
  properties->memoryPoolsSupported = properties->clusterLaunch = 1;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return device::fault(); }
cudaError_t cudaPeekAtLastError() { return device::fault(); }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    default:
      return "error of the dry run";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// Functions of the driver, for code that the selected kernels never reach.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(unavailable);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
