// Memory that no tensor holds.
//
// Large blocks are mapped one by one. The C library would allocate them from its heap as soon as
// the first of them was freed (its threshold grows with them), and keep them in the process when
// they are freed again, as fragments between live blocks: a ResNet-18's training step held 170 MB
// that way. Mappings also ask for huge pages: a map of 51 MB is 25 of them, or 12,544 small pages,
// each of which causes a page fault at its first access.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace fr {

struct FreeMemory {
  size_t mapped = 0;  // bytes of a block that is mapped by itself; 0 for the C library's

  void operator()(char* memory) const;
};
using Memory = std::unique_ptr<char, FreeMemory>;

// Uninitialised and aligned to a cache line, like PyTorch's own; null for no bytes.
Memory allocate(size_t bytes);

// The same, made where possible of the pages of blocks that are no longer needed: the system would
// clear any other page first, which takes longer than a convolution takes to write it. What is left
// of the blocks stays in `old`.
Memory allocate_from(std::vector<Memory>& old, size_t bytes);

}  // namespace fr
