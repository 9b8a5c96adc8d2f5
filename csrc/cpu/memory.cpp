#include "memory.h"

#include <cstdint>
#include <cstdlib>

#include "../errors.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fr {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLeastMapped = kHugePage;

Memory from_library(size_t bytes) {
  void* memory = nullptr;
  FR_CHECK(bytes == 0 || posix_memalign(&memory, kLine, bytes) == 0,
           "fused_resnet: can't allocate memory: ", bytes, " bytes");
  return Memory(static_cast<char*>(memory));
}

// AddressSanitizer sees behind the end of the C library's blocks alone.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

constexpr size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Begins at a huge page: what does is backed by huge pages as far as they fit, and no further.
Memory map(size_t bytes) {
  const size_t size = rounded_up(bytes, 4096), reserved = size + kHugePage;
  void* const found =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  FR_CHECK(found != MAP_FAILED, "fused_resnet: can't allocate memory: ", bytes, " bytes");
  char* const start = static_cast<char*>(found);
  const auto address = reinterpret_cast<uintptr_t>(start);
  const size_t before = rounded_up(address, kHugePage) - address, behind = kHugePage - before;
  if (before > 0) munmap(start, before);
  if (behind > 0) munmap(start + before + size, behind);
  madvise(start + before, size, MADV_HUGEPAGE);  // a wish: without them it works as well
  return Memory(start + before, FreeMemory{size});
}

void unmap(char* memory, size_t bytes) { munmap(memory, bytes); }

#else

Memory map(size_t bytes) { return from_library(bytes); }
void unmap(char*, size_t) {}

#endif

}  // namespace

void FreeMemory::operator()(char* memory) const {
  if (mapped > 0) {
    unmap(memory, mapped);
  } else {
    std::free(memory);
  }
}

Memory allocate(size_t bytes) { return bytes < kLeastMapped ? from_library(bytes) : map(bytes); }

}  // namespace fr
