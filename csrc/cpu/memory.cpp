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

// AddressSanitizer detects accesses past the end only for the C library's blocks.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

constexpr size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Begins at a multiple of a huge page: such a mapping is backed by huge pages as far as they fit,
// and no further.
Memory map(size_t bytes) {
  const size_t size = rounded_up(bytes, 4096), reserved = size + kHugePage;
  void* const found =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  FR_CHECK(found != MAP_FAILED, "fused_resnet: can't allocate memory: ", bytes, " bytes");
  char* const start = static_cast<char*>(found);
  const auto address = reinterpret_cast<uintptr_t>(start);
  const size_t before = rounded_up(address, kHugePage) - address, after = kHugePage - before;
  if (before > 0) munmap(start, before);
  if (after > 0) munmap(start + before + size, after);
  madvise(start + before, size, MADV_HUGEPAGE);  // a hint; correctness does not depend on it
  return Memory(start + before, FreeMemory{size});
}

void unmap(char* memory, size_t bytes) { munmap(memory, bytes); }

// Moves pages of a block to another address: only the process's page tables change, and no bytes
// are copied. Returns false if the system refuses, as when a process has too many mappings; what
// was mapped at the address may be gone then, so it is mapped again.
bool move(char* from, size_t bytes, char* to) {
  if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED) return true;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  FR_CHECK(mmap(to, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED,
           "fused_resnet: can't allocate memory: ", bytes, " bytes");
  return false;
}

// What is left of a block.
Memory rest_of(Memory block, size_t first, size_t bytes) {
  char* const start = block.release();
  return bytes > 0 ? Memory(start + first, FreeMemory{bytes}) : Memory();
}

// Moves huge pages as long as they fit, one by one, since a block may have come from several; and
// to the end of `to` the small pages at one block's end.
void move_pages(std::vector<Memory>& old, const Memory& to) {
  const size_t size = to.get_deleter().mapped, end = size % kHugePage;
  size_t at = 0;
  bool has_end = end == 0;
  for (Memory& block : old) {
    size_t left = block.get_deleter().mapped;
    if (!has_end && left % kHugePage >= end) {
      left -= end;
      has_end = move(block.get() + left, end, to.get() + size - end);
      if (!has_end) return;
      block = rest_of(std::move(block), 0, left);
    }
    for (; at + kHugePage <= size && left >= kHugePage; at += kHugePage) {
      if (!move(block.get(), kHugePage, to.get() + at)) return;
      left -= kHugePage;
      block = rest_of(std::move(block), kHugePage, left);
    }
  }
}

#else

Memory map(size_t bytes) { return from_library(bytes); }
void unmap(char*, size_t) {}
void move_pages(std::vector<Memory>&, const Memory&) {}

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

Memory allocate_from(std::vector<Memory>& old, size_t bytes) {
  Memory block = allocate(bytes);
  if (block.get_deleter().mapped > 0) move_pages(old, block);
  return block;
}

}  // namespace fr
