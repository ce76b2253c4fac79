// Device memory, pinned memory and copies.
//
// Device memory is memory of this process that nobody can touch at its address: a host that reads or writes there dies
// of SIGSEGV, much as it would with a GPU. Copies and fills go through a second mapping of the same pages. Pages that
// nobody has written take no memory, so gigabytes of weights cost nothing: the contents of large copies are dropped,
// because no kernel computes with them.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>

#include "state.h"

namespace {

using trace::Place;

struct Block {
  size_t size;
  Place place;
  char* alias;  // where this process may read and write the block
};

std::mutex mutex;
size_t used = 0;
size_t dropped_above = 1 << 20;

std::map<char*, Block>& blocks() {
  static auto* kept = new std::map<char*, Block>;
  return *kept;
}

// The block that holds an address; blocks().end() for pageable memory.
std::map<char*, Block>::iterator find(const void* address) {
  auto next = blocks().upper_bound(static_cast<char*>(const_cast<void*>(address)));
  if (next == blocks().begin()) return blocks().end();
  auto block = std::prev(next);
  return address < block->first + block->second.size ? block : blocks().end();
}

// Where the host may touch what is at an address.
char* touchable(const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = find(address);
  char* plain = static_cast<char*>(const_cast<void*>(address));
  return block == blocks().end() ? plain : block->second.alias + (plain - block->first);
}

cudaError_t allocate(const char* function, void** address, size_t size, Place place) {
  if (cudaError_t error = device::called(function)) return error;
  if (capture::active()) return capture::forbidden();
  size_t whole = size ? size : 1;
  if (place == Place::kDevice && used + size > device::total_memory()) return cudaErrorMemoryAllocation;
  int file = memfd_create("device", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(whole))) return cudaErrorMemoryAllocation;
  void* alias = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  void* own = place == Place::kDevice ? mmap(nullptr, whole, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0) : alias;
  close(file);
  if (alias == MAP_FAILED || own == MAP_FAILED) return cudaErrorMemoryAllocation;
  {
    std::lock_guard<std::mutex> lock(mutex);
    blocks()[static_cast<char*>(own)] = {whole, place, static_cast<char*>(alias)};
    if (place == Place::kDevice) used += whole;
  }
  *address = own;
  trace::note({"alloc", function, size, Place::kPageable, place});
  return cudaSuccess;
}

cudaError_t release(const char* function, void* address) {
  if (!address) return cudaSuccess;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks().find(static_cast<char*>(address));
  if (found == blocks().end()) return cudaErrorInvalidValue;
  auto [own, block] = *found;
  blocks().erase(found);
  if (block.place == Place::kDevice) used -= block.size;
  munmap(block.alias, block.size);
  if (own != block.alias) munmap(own, block.size);
  trace::note({"free", function, block.size, block.place, Place::kPageable});
  return cudaSuccess;
}

cudaError_t copy(const char* function, void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                 size_t rows) {
  if (cudaError_t error = device::called(function)) return error;
  trace::note({"copy", function, width * rows, memory::place_of(from), memory::place_of(to)});
  if (capture::active() || width * rows > dropped_above) return cudaSuccess;
  char *target = touchable(to), *source = touchable(from);
  for (size_t row = 0; row < rows; row++) memmove(target + row * to_pitch, source + row * from_pitch, width);
  return cudaSuccess;
}

cudaError_t fill(const char* function, void* address, int value, size_t size) {
  if (cudaError_t error = device::called(function)) return error;
  trace::note({"memset", function, size, Place::kDevice, memory::place_of(address)});
  if (!capture::active() && size <= dropped_above) memset(touchable(address), value, size);
  return cudaSuccess;
}

}  // namespace

Place memory::place_of(const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = find(address);
  return block == blocks().end() ? Place::kPageable : block->second.place;
}

size_t device::used_memory() { return used; }

extern "C" {

// Drops the contents of copies and fills of more bytes than this. They are recorded all the same.
void dry_run_drop_above(size_t bytes) { dropped_above = bytes; }

size_t dry_run_used_memory() { return used; }

cudaError_t cudaMalloc(void** address, size_t size) { return allocate("cudaMalloc", address, size, Place::kDevice); }
cudaError_t cudaMallocFromPoolAsync(void** address, size_t size, cudaMemPool_t, cudaStream_t) {
  return allocate("cudaMallocFromPoolAsync", address, size, Place::kDevice);
}
cudaError_t cudaMallocHost(void** address, size_t size) {
  return allocate("cudaMallocHost", address, size, Place::kPinned);
}
cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  return allocate("cudaHostAlloc", address, size, Place::kPinned);
}
cudaError_t cudaFree(void* address) { return release("cudaFree", address); }
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return release("cudaFreeAsync", address); }
cudaError_t cudaFreeHost(void* address) { return release("cudaFreeHost", address); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (capture::active()) return capture::forbidden();
  return copy("cudaMemcpy", to, size, from, size, size, 1);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  return copy("cudaMemcpyAsync", to, size, from, size, size, 1);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                              cudaMemcpyKind, cudaStream_t) {
  return copy("cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, width, rows);
}
// A variable in device code, which this process has nowhere.
cudaError_t cudaMemcpyFromSymbol(void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaErrorInvalidSymbol; }
cudaError_t cudaMemset(void* address, int value, size_t size) { return fill("cudaMemset", address, value, size); }
cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t) {
  return fill("cudaMemsetAsync", address, value, size);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = device::total_memory();
  *free = *total - used;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Place place = memory::place_of(address);
  *attributes = {};
  attributes->type = place == Place::kDevice   ? cudaMemoryTypeDevice
                     : place == Place::kPinned ? cudaMemoryTypeHost
                                               : cudaMemoryTypeUnregistered;
  attributes->devicePointer = place == Place::kPageable ? nullptr : const_cast<void*>(address);
  attributes->hostPointer = place == Place::kDevice ? nullptr : const_cast<void*>(address);
  return cudaSuccess;
}

// Pools only name where memory comes from.
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = reinterpret_cast<cudaMemPool_t>(new char);
  return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  delete reinterpret_cast<char*>(pool);
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *static_cast<unsigned long long*>(value) = 0;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

}  // extern "C"
