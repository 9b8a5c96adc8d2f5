// Memory that no tensor holds.
#pragma once

#include <cstdlib>
#include <memory>

#include "../errors.h"

namespace fr {

struct FreeMemory {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, FreeMemory>;

// Uninitialised, at the beginning of a cache line, as PyTorch's own; null for no bytes.
inline Memory allocate(size_t bytes) {
  void* memory = nullptr;
  FR_CHECK(bytes == 0 || posix_memalign(&memory, 64, bytes) == 0,
           "fused_resnet: can't allocate memory: ", bytes, " bytes");
  return Memory(static_cast<char*>(memory));
}

}  // namespace fr
