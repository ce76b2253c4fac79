// Kernels: registered by name when onnxruntime's library is loaded, counted when launched, never run.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

#include "state.h"

namespace {

std::mutex mutex;

std::unordered_map<const void*, std::string>& names() {
  static auto* kept = new std::unordered_map<const void*, std::string>;
  return *kept;
}

std::string demangled(const char* symbol) {
  int status = 0;
  char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string result = readable ? readable : symbol;
  std::free(readable);
  return result;
}

std::string name_of(const void* kernel) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = names().find(kernel);
  return found == names().end() ? "unregistered" : found->second;
}

cudaError_t launch(const void* kernel) { return trace::launch(name_of(kernel)) ? cudaSuccess : device::fault(); }

// What `kernel<<<grid, block>>>` leaves for the launch that follows it in the same thread.
thread_local struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

}  // namespace

bool trace::launch(std::string kernel) {
  if (device::called("cudaLaunchKernel")) return false;
  note({"kernel", std::move(kernel)});
  return true;
}

extern "C" {

// The interface between nvcc's host code and the runtime, from crt/host_runtime.h and crt/device_functions.h.
void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(std::malloc(sizeof(void*))); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { std::free(handle); }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  std::string readable = demangled(name);
  std::lock_guard<std::mutex> lock(mutex);
  names()[host] = std::move(readable);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch(kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) { return launch(kernel); }

// Attributes that let every kernel through: occupancy is a matter of speed, which the dry run does not know.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->binaryVersion = attributes->ptxVersion = device::capability();
  attributes->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

// Kernels that are loaded from an image in memory.
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  *library = reinterpret_cast<cudaLibrary_t>(new char);
  return cudaSuccess;
}
cudaError_t cudaLibraryUnload(cudaLibrary_t library) {
  delete reinterpret_cast<char*>(library);
  return cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  void* handle = new char;  // never freed: as long as the process, like the kernels of a library
  *kernel = static_cast<cudaKernel_t>(handle);
  std::lock_guard<std::mutex> lock(mutex);
  names()[handle] = name;
  return cudaSuccess;
}

}  // extern "C"
