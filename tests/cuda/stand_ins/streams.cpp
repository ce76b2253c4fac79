// Streams, events, synchronisation and graphs. Every stream is done at once, so waiting is only counted.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <mutex>
#include <vector>

#include "state.h"

namespace {

struct Graph {
  size_t kernels = 0;
  size_t copied = 0;  // bytes
};

std::mutex mutex;
bool capturing = false;
bool lost = false;
Graph captured;

template <typename Handle>
cudaError_t create(Handle* handle) {
  *handle = reinterpret_cast<Handle>(new char);
  return cudaSuccess;
}

template <typename Handle>
cudaError_t destroy(Handle handle) {
  delete reinterpret_cast<char*>(handle);
  return cudaSuccess;
}

cudaError_t wait(const char* function) {
  if (cudaError_t error = device::called(function)) return error;
  if (capture::active()) return capture::forbidden();
  trace::note({"sync", function});
  return cudaSuccess;
}

}  // namespace

bool capture::active() {
  std::lock_guard<std::mutex> lock(mutex);
  return capturing;
}

void capture::add(const trace::Event& event) {
  std::lock_guard<std::mutex> lock(mutex);
  if (event.kind == "kernel") captured.kernels++;
  if (event.kind == "copy") captured.copied += event.bytes;
}

cudaError_t capture::forbidden() {
  std::lock_guard<std::mutex> lock(mutex);
  lost = true;
  return cudaErrorStreamCaptureUnsupported;
}

extern "C" {

cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait("cudaStreamSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"); }

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return create(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return create(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return destroy(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  trace::note({"event", "cudaStreamWaitEvent"});
  return cudaSuccess;
}
// A function of the host in the order of a stream: at once, since every stream is done.
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
  trace::note({"host", "cudaLaunchHostFunc"});
  function(argument);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return create(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return create(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return destroy(event); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  trace::note({"event", "cudaEventRecord"});
  return device::fault();
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
// No time passes on a device that does nothing; 0 would be divided by.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  std::lock_guard<std::mutex> lock(mutex);
  if (capturing) return cudaErrorIllegalState;
  capturing = true;
  lost = false;
  captured = {};
  return cudaSuccess;
}
// A capture lasts a while, so that threads that do not keep out of it are found.
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  usleep(5000);
  Graph finished;
  {
    std::lock_guard<std::mutex> lock(mutex);
    capturing = false;
    *graph = nullptr;
    if (lost) return cudaErrorStreamCaptureInvalidated;
    finished = captured;
    *graph = reinterpret_cast<cudaGraph_t>(new Graph(captured));
  }
  trace::note({"capture", std::to_string(finished.kernels), finished.copied});
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capture::active() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long) {
  *instance = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t) {
  if (cudaError_t error = device::called("cudaGraphLaunch")) return error;
  auto* graph = reinterpret_cast<Graph*>(instance);
  trace::note({"replay", std::to_string(graph->kernels), graph->copied});
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
  delete reinterpret_cast<Graph*>(instance);
  return cudaSuccess;
}

}  // extern "C"
