// What the parts of the stand-in for libcudart share: the device's memory, its settings, its faults, its capture.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "trace.h"

namespace device {

// An error that the device has: CUDA's errors are sticky, so every later call returns it too.
cudaError_t fault();

// Counts a call towards the fault that a test has planned, and returns the device's error, if any.
cudaError_t called(const char* function);

// Bytes of the whole memory, and of what is allocated.
size_t total_memory();
size_t used_memory();

// Compute capability, 10 * major + minor.
int capability();

}  // namespace device

namespace memory {

trace::Place place_of(const void* address);

}  // namespace memory

namespace capture {

bool active();

// Adds a node to the graph that is being captured.
void add(const trace::Event& event);

// The error of a call that must not happen during a capture, as CUDA has it: the capture is lost with it.
cudaError_t forbidden();

}  // namespace capture
