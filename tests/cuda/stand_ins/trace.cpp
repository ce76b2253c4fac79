// The record of events and its C interface, which tests read through ctypes.
#include "trace.h"

#include <cstring>
#include <mutex>
#include <sstream>
#include <vector>

#include "state.h"

namespace {

std::mutex mutex;
bool recording = false;

// Never destroyed: onnxruntime frees memory in destructors that run after this library's own.
std::vector<trace::Event>& events() {
  static auto* kept = new std::vector<trace::Event>;
  return *kept;
}

const char* letter(trace::Place place) {
  switch (place) {
    case trace::Place::kDevice:
      return "device";
    case trace::Place::kPinned:
      return "pinned";
    default:
      return "pageable";
  }
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + '"';
}

}  // namespace

void trace::note(Event event) {
  bool node = event.kind == "kernel" || event.kind == "copy" || event.kind == "memset";
  if (node && capture::active()) {
    capture::add(event);
    return;
  }
  std::lock_guard<std::mutex> lock(mutex);
  if (recording) events().push_back(std::move(event));
}

extern "C" {

// Forgets what was recorded and starts to record.
void dry_run_start() {
  std::lock_guard<std::mutex> lock(mutex);
  events().clear();
  recording = true;
}

void dry_run_stop() {
  std::lock_guard<std::mutex> lock(mutex);
  recording = false;
}

// The events as JSON, in the caller's buffer. Returns the size that it needs; nothing is written if it is too small.
size_t dry_run_read(char* buffer, size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  std::ostringstream out;
  const char* separator = "[";
  for (const trace::Event& event : events()) {
    out << separator << "{\"kind\":" << quoted(event.kind) << ",\"name\":" << quoted(event.name)
        << ",\"bytes\":" << event.bytes << ",\"from\":\"" << letter(event.from) << "\",\"to\":\"" << letter(event.to)
        << "\"}";
    separator = ",";
  }
  std::string text = events().empty() ? "[]" : out.str() + "]";
  if (text.size() <= size) std::memcpy(buffer, text.data(), text.size());
  return text.size();
}

}  // extern "C"
