// The record that all stand-ins write to. It lives in the stand-in for libcudart, which the others are linked with.
#pragma once

#include <cstddef>
#include <string>

namespace trace {

// Where memory is. Pageable is what this process never asked CUDA for.
enum class Place { kPageable, kPinned, kDevice };

struct Event {
  std::string kind;  // kernel, copy, sync, alloc, free, memset, event, capture, replay, host
  std::string name;  // of the kernel or the function
  size_t bytes = 0;
  Place from = Place::kPageable;
  Place to = Place::kPageable;
};

// Keeps an event while recording. Within a stream capture, kernels and copies are part of the graph and not of the
// record.
void note(Event event);

// Notes the launch of a kernel. Returns false, and notes nothing, when the device is broken.
bool launch(std::string kernel);

}  // namespace trace
