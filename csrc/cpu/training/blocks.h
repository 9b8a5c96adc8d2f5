// How the passes are cut into blocks, how blocks are distributed over threads, and how their sums
// are merged.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "../../parallel.h"
#include "../../tensor.h"
#include "../isa.h"
#include "../scratch.h"
#include "../thread_team.h"

namespace fr {

// Blocks of rows of a channels-last map. Their extent depends on the map alone.
struct RowBlocks {
  int64_t rows, each;

  // Enough rows that a block's partial sums are few compared to what it reads, and few enough that
  // their terms may be added in float32.
  RowBlocks(int64_t rows, int64_t channels)
      : rows(rows),
        each(std::clamp<int64_t>(64 * 1024 / std::max<int64_t>(channels, 1), 64, kSumRows)) {}

  int64_t count() const { return (rows + each - 1) / each; }
  int64_t begin(int64_t block) const { return block * each; }
  int64_t end(int64_t block) const { return std::min(begin(block) + each, rows); }
  int64_t size(int64_t block) const { return end(block) - begin(block); }
};

// Calls run(block, scratch) for all blocks, from several threads. A thread takes `grain` blocks of
// its share at a time, and then blocks of the others' shares, since blocks take unequal time and a
// thread may be delayed.
template <class Run>
void for_blocks(int64_t count, int64_t grain, int64_t scratch_bytes, const Run& run) {
  const int64_t threads = std::min(get_num_threads(), (count + grain - 1) / grain);
  Claims claims(threads);
  parallel_for(0, threads, 1, [&](int64_t first_rank, int64_t last_rank) {
    Scratch memory;
    char* const scratch = memory.at_least(std::max<int64_t>(scratch_bytes, 1));
    for (int64_t rank = first_rank; rank < last_rank; ++rank) {
      claims.take_all(0, count, grain, rank, threads, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) run(block, scratch);
      });
    }
#ifdef __x86_64__
    // Stores past the caches (written_map.h) are visible before other threads learn that this one
    // is done.
    __builtin_ia32_sfence();
#endif
  });
}

// Sums of blocks, [block][row][channel] in float64, and their totals.
class PartialSums {
 public:
  PartialSums(int64_t blocks, int64_t rows, int64_t channels)
      : blocks_(blocks), rows_(rows), channels_(channels) {
    data_ = memory_.at_least(std::max<int64_t>(blocks * rows * channels, 1) * 8);
  }

  double* data() { return reinterpret_cast<double*>(data_); }

  // The sum over all blocks, in their order.
  Tensor total(int64_t row, ScalarType type) const;

  // Mean and biased variance from rows as StatisticsRow has them, where block i has size(i) rows:
  // by Chan's formula in the blocks' order. Zeros where there are none.
  template <class Size>
  std::tuple<Tensor, Tensor> statistics(const Size& size, ScalarType type) const {
    std::vector<double> sizes(static_cast<size_t>(blocks_));
    for (int64_t i = 0; i < blocks_; ++i) sizes[i] = static_cast<double>(size(i));
    return merge(sizes, type);
  }

 private:
  Scratch memory_;
  char* data_;
  int64_t blocks_, rows_, channels_;

  std::tuple<Tensor, Tensor> merge(const std::vector<double>& sizes, ScalarType type) const;
};

}  // namespace fr
