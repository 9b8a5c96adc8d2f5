#include <algorithm>
#include <limits>

#include "conv_bn_relu_maxpool.h"
#include "kernels/conv_bn_relu_maxpool.cuh"

namespace fr {
namespace {

// Shared memory per block that every GPU since 2020 has, minus the driver's share.
constexpr int64_t kMostSharedBytes = 96 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

// The constraints of an instance of the kernel on a plan.
struct StemInstance {
  int bytes;  // of an element
  int depth;  // elements in a word of a fragment
  int rows;   // of a tile

  explicit StemInstance(ConvPrecision precision)
      : bytes(precision == ConvPrecision::kTf32 ? 4 : 2),
        depth(4 / bytes),
        rows(bytes == 4 ? StemTile<float>::kRows : StemTile<__half>::kRows) {}

  // The sum of the buffers that the kernel takes from its arena.
  int64_t shared_bytes(const StemParams& p) const {
    const auto buffer = [](int64_t size) { return round_up(size, 128); };
    const int64_t pad = 16 / bytes;
    return 2 * buffer(static_cast<int64_t>(p.patch_size) * bytes) +
           buffer(kStemChannels * (p.depth + pad) * bytes) +
           buffer(p.depth / depth * static_cast<int64_t>(sizeof(StemPlace))) +
           buffer(kStemChannels * static_cast<int64_t>(sizeof(float2))) +
           buffer(rows * (kStemChannels + pad) * bytes);
  }
};

// Whether pixels are apart by even distances and a pair of k is two neighbouring elements.
bool paired(const ConvShape& s) {
  return s.stride_w * s.c % 2 == 0 && (s.dilation_w == 1 || s.c % 2 == 0);
}

int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

// Sizes that do not fit are clamped to one that does not fit either, so that they do not overflow.
int cut(int64_t size) { return static_cast<int>(std::min(size, kMostSharedBytes + 1)); }

// The patch of a tile. With chunks of 16 bytes its rows are preceded by their skew, which is the
// same in all rows if those of x are whole chunks, and followed by up to a chunk, so that the last
// chunk of a row is not the first one of the next.
void set_patch(StemParams* p, const StemInstance& instance) {
  const ConvImage& m = p->image;
  const int64_t cols =
      cut(int64_t{p->conv_cols - 1} * m.stride_w + int64_t{m.kw - 1} * m.dilation_w + 1);
  const int64_t width = round_up(p->lead + cols * m.c, instance.depth);
  const int64_t elements = 16 / instance.bytes, row = int64_t{m.w} * m.c;
  p->patch_rows =
      cut(int64_t{p->conv_rows - 1} * m.stride_h + int64_t{m.kh - 1} * m.dilation_h + 1);
  p->patch_width = cut(width);
  // The words of pairs are aligned in all rows, or in none.
  p->chunks = !p->pairs || row % 2 == 0;
  if (!p->chunks) {
    p->patch_pitch = p->patch_width;
    p->patch_size = cut(int64_t{p->patch_rows} * p->patch_pitch);
    return;
  }
  int64_t skew = elements - 1;
  if (row % elements == 0) {
    const int64_t x = int64_t{-p->pool.pad_w} * m.stride_w - m.pad_w;
    const int64_t apart = int64_t{p->tile_w} * p->pool.stride_w * m.stride_w;
    skew = 0;
    for (int i = 0; i < std::min<int64_t>(p->tiles_x, elements); ++i) {
      skew = std::max(skew, modulo((x + i * apart) * m.c - p->lead, elements));
    }
  }
  const int64_t least = skew + width;
  p->patch_pitch = cut(least + modulo(row - least, elements));
  p->patch_size = cut(int64_t{p->patch_rows} * p->patch_pitch + skew);
}

void set_tile(StemParams* p, const StemInstance& instance, int tile_h, int tile_w) {
  p->tile_h = tile_h;
  p->tile_w = tile_w;
  p->conv_rows = cut(int64_t{tile_h - 1} * p->pool.stride_h + p->pool.kernel_h);
  p->conv_cols = cut(int64_t{tile_w - 1} * p->pool.stride_w + p->pool.kernel_w);
  p->tiles_y = static_cast<int>(ceil_div(p->out_h, tile_h));
  p->tiles_x = static_cast<int>(ceil_div(p->out_w, tile_w));
  set_patch(p, instance);
}

template <class Precision, class Gather>
cudaError_t launch_stem(const StemParams& p, ConvPrecision precision, int multiprocessors,
                        cudaStream_t stream) {
  constexpr int kBlocks = 2;
  const dim3 grid(static_cast<unsigned>(std::min(p.tiles, kBlocks * multiprocessors)),
                  static_cast<unsigned>(ceil_div(p.k, kStemChannels)));
  return launch(conv_bn_relu_maxpool_kernel<Precision, Gather>, grid, dim3(kStemThreads),
                static_cast<size_t>(StemInstance(precision).shared_bytes(p)), stream, p);
}

template <class Precision>
cudaError_t launch_halves(const StemParams& p, ConvPrecision precision, int multiprocessors,
                          cudaStream_t stream) {
  return p.pairs ? launch_stem<Precision, StemPairs>(p, precision, multiprocessors, stream)
                 : launch_stem<Precision, StemHalves>(p, precision, multiprocessors, stream);
}

}  // namespace

bool plan_stem(const ConvShape& s, const PoolWindow& pool, ConvPrecision precision, StemParams* p) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  const auto as_int = [](int64_t v) { return static_cast<int>(v); };
  const int64_t out_h = pooled(s.out_h(), pool.kernel_h, pool.stride_h, pool.pad_h);
  const int64_t out_w = pooled(s.out_w(), pool.kernel_w, pool.stride_w, pool.pad_w);
  const StemInstance instance(precision);
  const bool pairs = instance.depth == 2 && paired(s);
  // Whether the pixels begin at odd offsets in x.
  const int64_t lead = pairs ? s.pad_w * s.c % 2 : 0;
  const int64_t row_depth = round_up(lead + s.kw * s.c, instance.depth);
  const int64_t depth = round_up(s.kh * row_depth, 8 * instance.depth);
  // Offsets within an image and within the filters are 32-bit integers.
  const bool fits =
      precision != ConvPrecision::kFloat32 && s.groups == 1 &&
      depth * kStemChannels * instance.bytes < kMostSharedBytes && s.k * depth < kMost &&
      (s.h + 2 * s.pad_h) * (s.w + 2 * s.pad_w) * s.c < kMost && s.n * out_h * out_w < kMost &&
      (s.out_h() + 2 * pool.pad_h) * s.stride_h < kMost &&
      (s.out_w() + 2 * pool.pad_w) * s.stride_w < kMost;
  if (!fits) return false;
  p->image = {nullptr,         as_int(s.h),     as_int(s.w),          as_int(s.c),
              as_int(s.kh),    as_int(s.kw),    as_int(s.stride_h),   as_int(s.stride_w),
              as_int(s.pad_h), as_int(s.pad_w), as_int(s.dilation_h), as_int(s.dilation_w)};
  p->pool = pool;
  p->k = as_int(s.k);
  p->conv_h = as_int(s.out_h());
  p->conv_w = as_int(s.out_w());
  p->out_h = as_int(out_h);
  p->out_w = as_int(out_w);
  p->pairs = pairs;
  p->lead = as_int(lead);
  p->row_depth = as_int(row_depth);
  p->depth = as_int(depth);

  // The tile size that needs the fewest tiles; of those the smallest.
  StemParams best = *p;
  int64_t best_tiles = kMost, best_pixels = 0;
  for (int h = 1; h <= std::min<int64_t>(out_h, instance.rows); ++h) {
    for (int w = 1; w <= out_w; ++w) {
      set_tile(p, instance, h, w);
      const int64_t pixels = int64_t{p->conv_rows} * p->conv_cols;
      const int64_t patch = int64_t{p->patch_size} * instance.bytes;
      if (pixels > instance.rows || patch > kMostSharedBytes) break;
      const int64_t tiles = int64_t{p->tiles_y} * p->tiles_x;
      const bool better = tiles < best_tiles || (tiles == best_tiles && pixels < best_pixels);
      if (!better || instance.shared_bytes(*p) > kMostSharedBytes) continue;
      best = *p;
      best_tiles = tiles;
      best_pixels = pixels;
    }
  }
  if (best_tiles == kMost) return false;
  *p = best;
  p->tiles = as_int(s.n * best_tiles);
  return true;
}

cudaError_t conv_bn_relu_maxpool(const StemParams& p, ConvPrecision precision, int multiprocessors,
                                 cudaStream_t stream) {
  if (p.tiles == 0) return cudaSuccess;
  switch (precision) {
    case ConvPrecision::kFloat16:
      return launch_halves<Float16>(p, precision, multiprocessors, stream);
    case ConvPrecision::kBFloat16:
      return launch_halves<BFloat16>(p, precision, multiprocessors, stream);
    case ConvPrecision::kTf32:
      return launch_stem<Tf32, StemWords>(p, precision, multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fr
