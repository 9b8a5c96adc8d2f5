// Runs a pass over a channels-last map in blocks of rows.
#pragma once

#include "blocks.h"

namespace fr {

inline const TrainingKernels& training_kernels_of(const Tensor& map) {
  return training_kernels().of[dtype_of(map.scalar_type())];
}

inline int64_t rows_of(const Tensor& map) { return map.size(0) * map.size(2) * map.size(3); }

// Bytes of the arithmetic type of a map's kernels.
inline int64_t arithmetic_bytes(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? 8 : 4;
}

// Calls run(begin, end, block, scratch), with scratch for `sums` sums for each channel.
template <class Run>
void for_row_blocks(const Tensor& map, int64_t sums, const Run& run) {
  const int64_t c = map.size(1);
  const RowBlocks blocks(rows_of(map), c);
  if (c == 0) return;
  // Elements that are worth a thread, in blocks.
  const int64_t grain = std::max<int64_t>(32 * 1024 / (blocks.each * c), 1);
  for_blocks(blocks.count(), grain, sums * c * arithmetic_bytes(map),
             [&](int64_t block, void* scratch) {
               run(blocks.begin(block), blocks.end(block), block, scratch);
             });
}

// Calls run(begin, end).
template <class Run>
void for_rows(const Tensor& map, const Run& run) {
  for_row_blocks(map, 0, [&](int64_t begin, int64_t end, int64_t, void*) { run(begin, end); });
}

}  // namespace fr
