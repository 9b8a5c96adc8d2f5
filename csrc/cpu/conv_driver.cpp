#include "conv_driver.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace fr {
namespace {

// Bytes of input, residual and output that one block may touch: half of the 1 MiB L2 cache of
// current server cores, which leaves room for a panel of weights.
constexpr int64_t kBlockBytes = 512 * 1024;

// Minimum number of tiles in a block, whatever the channels: every block reads all weights.
constexpr int64_t kLeastTiles = 8;

// Bytes of weights that stay in the L2 cache beside such a block. With so few weights small blocks
// pay off: the result and the residual are then traversed nearly sequentially.
constexpr int64_t kNearWeights = 256 * 1024;

// Bytes of transformed input in one block of Winograd's algorithm. More tiles amortise the
// transform of the weights, and where the L2 cache is small, tiles read from the L3 cost little
// more than from the L2 (measured, Zen 4).
constexpr int64_t kWinogradBytes = 4 * 1024 * 1024;

// The same where the L2 cache holds a block with its weights and products. The L3 of those cores is
// slower: a layer of 64 channels takes 0.8 of the time (measured, Xeon with 2 MiB of L2, one
// thread). Fewer tiles than that would be spent on transforming weights.
constexpr int64_t kLargeL2 = 2 * 1024 * 1024;
constexpr int64_t kNearWinogradBytes = 512 * 1024;
constexpr int64_t kLeastWinogradTiles = 56;

// Elements of a share of the pass that applies an activation.
constexpr int64_t kActivatedElements = 32 * 1024;

// The activation that a convolution's kernel applies. Each further one would add an instance of
// every microkernel, so any but ReLU is a pass over the result instead.
Activation in_kernel(Activation activation) {
  return activation == Activation::kReLU ? activation : Activation::kNone;
}

// The block size for `count` items in blocks of at most `most`: of the sizes from most / 2 to most,
// the largest that minimises the work of the busiest thread. Threads get equal numbers of blocks.
int64_t block_size(int64_t count, int64_t most, int64_t threads) {
  most = std::clamp<int64_t>(most, 1, count);
  if (most == count) return count;
  int64_t best = most, least = count;
  for (int64_t size = most; size >= ceil_div(most, 2); --size) {
    const int64_t longest = std::min(ceil_div(ceil_div(count, size), threads) * size, count);
    if (longest < least) {
      best = size;
      least = longest;
    }
  }
  return best;
}

// Numbers of images, output rows, output columns and panels in a block.
struct BlockSize {
  int64_t images, rows, cols, panels;
};

struct Blocks {
  BlockSize size;
  int64_t n, rows, cols, panels;  // totals

  int64_t count() const {
    return ceil_div(n, size.images) * ceil_div(rows, size.rows) * ceil_div(cols, size.cols) *
           ceil_div(panels, size.panels);
  }

  ConvBlock operator[](int64_t i) const {
    ConvBlock b;
    const auto range = [&i](int64_t total, int64_t step, int64_t& begin, int64_t& end) {
      const int64_t blocks = ceil_div(total, step);
      begin = i % blocks * step;
      end = std::min(begin + step, total);
      i /= blocks;
    };
    range(panels, size.panels, b.panel0, b.panel1);
    range(cols, size.cols, b.col0, b.col1);
    range(rows, size.rows, b.row0, b.row1);
    range(n, size.images, b.n0, b.n1);
    return b;
  }
};

Blocks cut(const ConvShape& s, bool residual, int64_t panels, int64_t tile, int64_t element,
           int64_t threads) {
  Blocks b{{1, 1, s.out_w(), panels}, s.n, s.out_h(), s.out_w(), panels};
  const int64_t input_bytes = s.stride_h * s.stride_w * s.c * element;
  const int64_t pixel_bytes = input_bytes + (residual ? 2 : 1) * s.k * element;

  const int64_t pixels = std::max(kBlockBytes / pixel_bytes, kLeastTiles * tile);
  const int64_t weight_bytes = s.k * s.depth() * element;
  if (b.rows == 1 && b.n == 1) {  // a 1x1 convolution, flattened to one row of pixels
    const int64_t tiles = weight_bytes <= kNearWeights ? kLeastTiles : pixels / tile;
    b.size.cols = block_size(ceil_div(b.cols, tile), tiles, threads) * tile;
  } else if (b.rows * b.cols <= pixels) {
    b.size.rows = b.rows;
    b.size.images = block_size(b.n, pixels / (b.rows * b.cols), threads);
  } else {
    b.size.rows = block_size(b.rows, pixels / b.cols, threads);
  }
  if (b.count() >= threads) return b;
  // Fewer blocks than threads: split the dimension whose operand is cheaper to read twice.
  if (weight_bytes > b.n * b.rows * b.cols * input_bytes && b.panels >= threads) {
    b.size.panels = ceil_div(b.panels, threads);
  } else if (b.rows > 1) {
    b.size.rows = ceil_div(b.size.rows, threads);
  } else {
    b.size.cols = ceil_div(ceil_div(b.cols, threads), tile) * tile;
  }
  return b;
}

// For a 1x1 convolution of stride 1 without padding, all images are one row of pixels.
void flatten(ConvShape& s) {
  if (s.kh == 1 && s.kw == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 &&
      s.pad_w == 0) {
    s.w *= s.n * s.h;
    s.n = s.h = 1;
  }
}

void run_direct(ThreadTeam& team, DType dtype, ConvForward f) {
  const KernelTable& table = kernels();
  const Kernels& k = table.of[dtype];
  flatten(f.shape);
  const Blocks blocks = cut(f.shape, f.residual != nullptr, k.panels(f.shape), table.tile[dtype],
                            bytes_of(k.packed), team.size());
  team.parallel_for(blocks.count(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const ConvBlock block = blocks[i];
      k.conv(f, block, scratch.at_least(k.conv_scratch_bytes(f.shape, block)));
    }
  });
}

int64_t winograd_tiles(const WinogradKernels& k, const ConvShape& s) {
  return s.n * ceil_div(s.out_h(), k.side) * ceil_div(s.out_w(), k.side);
}

bool winograd_fits(const WinogradKernels& k, const ConvShape& s) {
  return k.run != nullptr && s.kh == 3 && s.kw == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && s.groups == 1 && s.c % k.lanes == 0 &&
         s.k % k.lanes == 0;
}

struct WinogradBlocks {
  int64_t tiles, panels;  // of one block
  double cost;            // of all, on all threads
};

// Bytes of transformed input for a tile.
int64_t winograd_tile_bytes(const WinogradKernels& kernels, const ConvShape& s) {
  return kernels.points * s.c * static_cast<int64_t>(sizeof(float));
}

// The most tiles of a block that is run.
int64_t most_winograd_tiles(const WinogradKernels& kernels, const ConvShape& s) {
  const int64_t tile_bytes = winograd_tile_bytes(kernels, s);
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const bool large = sysconf(_SC_LEVEL2_CACHE_SIZE) >= kLargeL2;
  if (large) return std::max(kNearWinogradBytes / tile_bytes, kLeastWinogradTiles);
#endif
  return std::max<int64_t>(kWinogradBytes / tile_bytes, 1);
}

// Cost model, in multiply-adds; a thread does two vectors of them per cycle.
//
//   block of t tiles and k of K channels = P (t C k + 12.5 t C + 10 t k + 8 C k)
//   direct                               = 9 OH OW N C K
//
// with P points. The terms of a block are the products and the transforms of input, output and
// weight; the coefficients are measured, as the transforms are bound by the cache. More blocks of
// tiles transform the weights more often, more blocks of panels the input.
WinogradBlocks plan_winograd(const WinogradKernels& kernels, const ConvShape& s, int64_t panel,
                             int64_t threads, int64_t most_tiles) {
  const int64_t tiles = winograd_tiles(kernels, s), panels = ceil_div(s.k, panel);
  const int64_t least = ceil_div(tiles, most_tiles);
  WinogradBlocks best{0, 0, 0};
  for (int64_t blocks = least; blocks < least + threads && blocks <= tiles; ++blocks) {
    for (const int64_t shares : {int64_t{1}, std::min(ceil_div(threads, blocks), panels)}) {
      WinogradBlocks plan{ceil_div(tiles, blocks), ceil_div(panels, shares), 0};
      const double t = static_cast<double>(plan.tiles), c = static_cast<double>(s.c);
      const double k = static_cast<double>(std::min(plan.panels * panel, s.k));
      const int64_t count = ceil_div(tiles, plan.tiles) * ceil_div(panels, plan.panels);
      plan.cost = static_cast<double>(ceil_div(count, threads) * kernels.points) *
                  (t * c * k + 12.5 * t * c + 10 * t * k + 8 * c * k);
      if (best.tiles == 0 || plan.cost < best.cost) best = plan;
    }
  }
  return best;
}

// The cheapest of Winograd's algorithms, or null where the direct sum is cheaper. The cost is that
// on one thread and of blocks for any cache, so that the bits of a result depend on neither.
const WinogradKernels* winograd_for(DType dtype, const ConvShape& s) {
  if (s.n == 0) return nullptr;
  const KernelTable& table = kernels();
  const WinogradKernels* best = nullptr;
  double least =
      static_cast<double>(s.n * s.out_h() * s.out_w()) * static_cast<double>(s.depth() * s.k);
  // AVX512-BF16 doubles the multiply-adds per step of the direct sum; Winograd's are in float32.
  if (table.of[dtype].packed == kBFloat16) least /= 2;
  for (const WinogradKernels& k : table.winograd[dtype]) {
    if (!winograd_fits(k, s)) continue;
    const int64_t most = std::max<int64_t>(kWinogradBytes / winograd_tile_bytes(k, s), 1);
    const double cost = plan_winograd(k, s, table.winograd_panel, 1, most).cost;
    if (cost >= least) continue;
    best = &k;
    least = cost;
  }
  return best;
}

void run_winograd(ThreadTeam& team, const WinogradKernels& kernels, const ConvForward& f,
                  int64_t panel) {
  const ConvShape& s = f.shape;
  const int64_t tiles = winograd_tiles(kernels, s), panels = ceil_div(s.k, panel);
  const WinogradBlocks plan =
      plan_winograd(kernels, s, panel, team.size(), most_winograd_tiles(kernels, s));
  const int64_t shares = ceil_div(panels, plan.panels);
  team.parallel_for(ceil_div(tiles, plan.tiles) * shares, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile0 = i / shares * plan.tiles, panel0 = i % shares * plan.panels;
      const WinogradBlock block{tile0, std::min(tile0 + plan.tiles, tiles), panel0,
                                std::min(panel0 + plan.panels, panels)};
      // The last block may need more scratch than the others: it has fewer tiles, but they may be
      // in one group where the tiles of other blocks are in two.
      const int64_t bytes = kernels.scratch_bytes(s, block.tile1 - block.tile0);
      kernels.run(f, block, scratch.at_least(bytes));
    }
  });
}

}  // namespace

int64_t bytes_of(DType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

ConvAlgorithm conv_algorithm(DType dtype, const ConvShape& shape, bool winograd) {
  return {winograd ? winograd_for(dtype, shape) : nullptr};
}

const char* ConvAlgorithm::name() const {
  return winograd == nullptr ? "direct" : winograd->side == 4 ? "winograd 4x4" : "winograd 2x2";
}

void run_conv(ThreadTeam& team, DType dtype, const ConvForward& f, ConvAlgorithm algorithm) {
  const ConvShape& s = f.shape;
  if (s.n == 0) return;
  ConvForward part = f;
  part.activation = in_kernel(f.activation);
  if (algorithm.winograd != nullptr) {
    run_winograd(team, *algorithm.winograd, part, kernels().winograd_panel);
  } else {
    run_direct(team, dtype, part);
  }
  if (f.activation == part.activation) return;
  const int64_t numel = s.n * s.out_h() * s.out_w() * s.k;
  const auto activate = kernels().of[dtype].activate;
  team.parallel_for(ceil_div(numel, kActivatedElements), 1, [&](int64_t begin, int64_t end) {
    activate(f.activation, f.y, begin * kActivatedElements,
             std::min(end * kActivatedElements, numel));
  });
}

void run_conv_max_pool(ThreadTeam& team, DType dtype, const ConvForward& f, const PoolForward& pool,
                       void* y) {
  const KernelTable& table = kernels();
  const Kernels& k = table.of[dtype];
  const ConvShape& s = f.shape;
  if (s.n == 0) return;
  const int64_t element = bytes_of(dtype);
  const int64_t row_bytes = s.out_w() * s.k * element;
  const int64_t panels = k.panels(s);
  const int64_t rows = block_size(pool.out_h(), kBlockBytes / (row_bytes * pool.stride_h),
                                  ceil_div(team.size(), s.n));
  const int64_t per_image = ceil_div(pool.out_h(), rows);
  const auto pool_rows = f.activation == Activation::kReLU ? k.max_pool_after_relu : k.max_pool;
  team.parallel_for(s.n * per_image, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch, rows_between;
    const int64_t most_rows = std::min((rows - 1) * pool.stride_h + pool.kernel_h, pool.h);
    char* const map = rows_between.at_least(most_rows * row_bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / per_image;
      PoolForward p = pool;
      p.row0 = i % per_image * rows;
      p.row1 = std::min(p.row0 + rows, pool.out_h());
      const int64_t row0 = p.first_row(p.row0), row1 = p.end_row(p.row1);
      // If this thread has computed the block before, its last rows are still in the map.
      const bool follows = i > begin && p.row0 > 0;
      const int64_t first = p.first_row(p.row0 - rows), end_before = p.end_row(p.row0);
      const int64_t kept = follows ? std::max<int64_t>(end_before - row0, 0) : 0;
      if (kept > 0) std::memmove(map, map + (row0 - first) * row_bytes, kept * row_bytes);
      const ConvBlock block{n, n + 1, row0 + kept, row1, 0, s.out_w(), 0, panels};
      ConvForward part = f;
      part.activation = in_kernel(f.activation);
      part.y = map + kept * row_bytes;
      part.y_first = (n * s.out_h() + block.row0) * s.out_w();
      if (block.row0 < block.row1)
        k.conv(part, block, scratch.at_least(k.conv_scratch_bytes(s, block)));
      p.x = map;
      p.x_first = row0;
      p.y = static_cast<char*>(y) + n * pool.out_h() * pool.out_w() * pool.c * element;
      pool_rows(p);
      // After the pool, which leaves fewer elements: activations preserve their order.
      const int64_t line = pool.out_w() * pool.c;
      if (f.activation != part.activation)
        k.activate(f.activation, p.y, p.row0 * line, p.row1 * line);
    }
  });
}

}  // namespace fr
