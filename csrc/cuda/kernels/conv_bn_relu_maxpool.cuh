// The stem: y = max_pool(relu(conv(x, w) * scale + shift)), the convolution's result kept on chip.
//
// ResNet's: 3 channels of 224 x 224, 64 filters of 7 x 7, stride 2; then 3 x 3 pooling, stride 2.
// An image in 16 bits: 0.30 MB of x are read and 0.40 MB of y written, where the convolution's
// result would be 1.6 MB written and read again; 236 Mflop. 180 MB and 60 Gflop for a batch of 256
// take an H100 54 and 61 microseconds: so the tensor cores must be kept busy, and on them depend
// the tiles.
//
// A block makes tiles of pooled pixels, one after another, for 64 channels. 7 x 7 pooled pixels
// want 15 x 15 of the convolution's, 225 of the 256 rows that eight warps of 32 rows x 64 columns
// have; the rows between neighbouring tiles are computed twice (15 x 15 / (14 x 14), 15% more). The
// part of x below a tile, 35 x 35 pixels, goes to shared memory once, zeros around the map
// included. Filters go there once for all tiles of a block: a grid is one wave, and its blocks
// stride over the tiles.
//
// The depth of the sum runs over (ky, kx, c). For 3 channels no instruction brings 16 bytes of it,
// so fragments of A are gathered from x in shared memory, at a pixel's place plus the place of each
// pair of k, which a table holds. A kernel row is padded to an even length (21 to 22 elements), so
// that a pair is one aligned word wherever pixels begin at even places: 8 loads and 4 ldmatrix for
// 16 mma. Words of eight neighbouring pixels (3 words apart) and four pairs never meet in a bank.
// What pads is masked, and not only met by zero weights: 0 * inf would be NaN.
//
// Occupancy designed for: two blocks of 256 threads, 128 registers; 64 KiB of shared memory for
// ResNet's stem. While one block waits for memory, the other multiplies.
#pragma once

#include "conv_epilogue.cuh"
#include "stem_params.cuh"

namespace fr {

constexpr int kStemWarps = 8;
constexpr int kStemThreads = 32 * kStemWarps;
constexpr int kStemRows = 32 * kStemWarps;  // of the convolution's pixels in a tile, at most
constexpr int kStemChannels = 64;
// Rows eight elements longer than their content fall on different banks, for ldmatrix and for the
// words of fragments.
constexpr int kStemPad = 8;

// Where a pair of k lies, from the place of a pixel. Paired: `first` is the word's place and
// `second` the mask of its bits. Else both are places of elements, or kStemNowhere.
struct alignas(8) StemPlace {
  uint32_t first, second;
};
constexpr uint32_t kStemNowhere = 0xffffffffu;

// The place of one element, or kStemNowhere for padding.
FR_DEVICE uint32_t stem_element(const StemParams& p, int ky, int at) {
  const int kx = at / p.image.c, c = at - kx * p.image.c;
  if (ky >= p.image.kh || kx >= p.image.kw) return kStemNowhere;
  return ky * p.image.dilation_h * p.patch_pitch + kx * p.image.dilation_w * p.image.c + c;
}

template <bool kPaired>
FR_DEVICE StemPlace stem_place(const StemParams& p, int k) {
  const int ky = k / p.row_depth, at = k - ky * p.row_depth;
  const uint32_t first = stem_element(p, ky, at), second = stem_element(p, ky, at + 1);
  if (!kPaired) return {first, second};
  if (first == kStemNowhere) return {0, 0};
  return {first, second == kStemNowhere ? 0x0000ffffu : 0xffffffffu};
}

template <bool kPaired>
FR_DEVICE uint32_t stem_gather(const uint16_t* pixel, StemPlace at) {
  if (kPaired) return *reinterpret_cast<const uint32_t*>(pixel + at.first) & at.second;
  const uint32_t low = at.first == kStemNowhere ? 0 : pixel[at.first];
  const uint32_t high = at.second == kStemNowhere ? 0 : pixel[at.second];
  return low | high << 16;
}

// The block's filters, each padded with zeros to p.depth.
FR_DEVICE void stem_bring_filters(const StemParams& p, uint16_t* filters, int channel0) {
  const int width = p.image.kw * p.image.c;
  const uint16_t* const weight = static_cast<const uint16_t*>(p.weight);
  for (int i = threadIdx.x; i < kStemChannels * p.depth; i += kStemThreads) {
    const int row = i / p.depth, k = i - row * p.depth;
    const int ky = k / p.row_depth, at = k - ky * p.row_depth;
    const bool inside = channel0 + row < p.k && ky < p.image.kh && at < width;
    const int from = ((channel0 + row) * p.image.kh + ky) * width + at;
    filters[row * (p.depth + kStemPad) + k] = inside ? weight[from] : 0;
  }
}

// The pixels of x from (y0, x0) on, zeros outside of the map.
FR_DEVICE void stem_bring_patch(const StemParams& p, uint16_t* patch, int image, int y0, int x0) {
  constexpr int kInFlight = 4;
  const int lane = threadIdx.x & 31, length = p.patch_pitch;
  const int from = x0 * p.image.c, end = p.image.w * p.image.c;
  for (int r = threadIdx.x >> 5; r < p.patch_rows; r += kStemWarps) {
    const bool inside = y0 + r >= 0 && y0 + r < p.image.h;
    const uint16_t* const row = static_cast<const uint16_t*>(p.image.x) +
                                (static_cast<int64_t>(image) * p.image.h + y0 + r) * end;
    for (int e = lane; e < length; e += kInFlight * 32) {
      uint16_t v[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int at = from + e + 32 * j;
        v[j] = inside && at >= 0 && at < end && e + 32 * j < length ? row[at] : 0;
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (e + 32 * j < length) patch[r * p.patch_pitch + e + 32 * j] = v[j];
      }
    }
  }
}

template <class T>
union StemPair {
  uint32_t bits;
  T values[2];
  FR_DEVICE StemPair() : bits{} {}
};

// The larger, or NaN if there is one.
FR_DEVICE float max_or_nan(float best, float v) { return v > best || v != v ? v : best; }

// Pools a tile of the convolution's rounded results. Pooled pixels and channels past the map's end
// are left out, and of each window what lies outside of the convolution's map.
template <class T>
FR_DEVICE void stem_pool(const StemParams& p, const T* tile, int image, int oy0, int ox0,
                         int channel0) {
  constexpr int kPacks = kStemChannels / kPack<T>;
  for (int i = threadIdx.x; i < p.tile_h * p.tile_w * kPacks; i += kStemThreads) {
    const int pack = i % kPacks, pixel = i / kPacks;
    const int py = pixel / p.tile_w, px = pixel - py * p.tile_w;
    const int oy = oy0 + py, ox = ox0 + px, channel = channel0 + pack * kPack<T>;
    if (oy >= p.out_h || ox >= p.out_w || channel >= p.k) continue;
    float best[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) best[e] = -INFINITY;
    for (int a = 0; a < p.pool.kernel_h; ++a) {
      const int cy = oy * p.pool.stride_h - p.pool.pad_h + a;
      if (cy < 0 || cy >= p.conv_h) continue;
      for (int b = 0; b < p.pool.kernel_w; ++b) {
        const int cx = ox * p.pool.stride_w - p.pool.pad_w + b;
        if (cx < 0 || cx >= p.conv_w) continue;
        const int row = (py * p.pool.stride_h + a) * p.conv_cols + px * p.pool.stride_w + b;
        float v[kPack<T>];
        load_pack(v, tile + row * (kStemChannels + kStemPad) + pack * kPack<T>);
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) best[e] = max_or_nan(best[e], v[e]);
      }
    }
    T* const y = static_cast<T*>(p.y) +
                 ((static_cast<int64_t>(image) * p.out_h + oy) * p.out_w + ox) * p.k + channel;
    if (p.vector) {
      store_pack(y, best);
    } else {
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
        if (channel + e < p.k) y[e] = from_float<T>(best[e]);
      }
    }
  }
}

template <class Precision, bool kPaired>
__global__ void __launch_bounds__(kStemThreads, 2)
    conv_bn_relu_maxpool_kernel(const __grid_constant__ StemParams p) {
  using T = typename Precision::Storage;
  constexpr int kTilePitch = kStemChannels + kStemPad;
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  uint16_t* const patch = arena.take<uint16_t>(p.patch_rows * p.patch_pitch);
  uint16_t* const filters = arena.take<uint16_t>(kStemChannels * (p.depth + kStemPad));
  StemPlace* const places = arena.take<StemPlace>(p.depth / 2);
  float2* const affine = arena.take<float2>(kStemChannels);
  T* const tile = arena.take<T>(kStemRows * kTilePitch);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int channel0 = blockIdx.y * kStemChannels;
  stem_bring_filters(p, filters, channel0);
  for (int i = threadIdx.x; i < p.depth / 2; i += kStemThreads) {
    places[i] = stem_place<kPaired>(p, 2 * i);
  }
  if (threadIdx.x < kStemChannels) {
    const ChannelAffine<1> a(p.affine, channel0 + threadIdx.x, p.k);
    affine[threadIdx.x] = make_float2(a.scale[0], a.shift[0]);
  }

  // The pixels of the thread's four rows; rows past the tile's pixels compute what none reads.
  const uint16_t* pixels[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int row = warp * 32 + 16 * i + 8 * h + (lane >> 2);
      if (row >= p.conv_rows * p.conv_cols) row = 0;
      const int y = row / p.conv_cols, x = row - y * p.conv_cols;
      pixels[i][h] =
          patch + y * p.image.stride_h * p.patch_pitch + x * p.image.stride_w * p.image.c;
    }
  }

  for (int t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    const int image = t / (p.tiles_y * p.tiles_x), within = t - image * p.tiles_y * p.tiles_x;
    const int oy0 = within / p.tiles_x * p.tile_h, ox0 = within % p.tiles_x * p.tile_w;
    stem_bring_patch(p, patch, image,
                     (oy0 * p.pool.stride_h - p.pool.pad_h) * p.image.stride_h - p.image.pad_h,
                     (ox0 * p.pool.stride_w - p.pool.pad_w) * p.image.stride_w - p.image.pad_w);
    __syncthreads();

    float acc[2][8][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
      }
    }
    for (int k = 0; k < p.depth; k += 16) {
      const StemPlace low = places[k / 2 + (lane & 3)], high = places[k / 2 + 4 + (lane & 3)];
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[i][0] = stem_gather<kPaired>(pixels[i][0], low);
        a[i][1] = stem_gather<kPaired>(pixels[i][1], low);
        a[i][2] = stem_gather<kPaired>(pixels[i][0], high);
        a[i][3] = stem_gather<kPaired>(pixels[i][1], high);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        const int row = 8 * j + (lane & 7) + (lane >> 4) * 8;
        ldmatrix_x4(b, filters + row * (p.depth + kStemPad) + k + ((lane >> 3) & 1) * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Precision::mma(acc[i][j], a[i], b[0], b[1]);
          Precision::mma(acc[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }

#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = 8 * j + (lane & 3) * 2;
      const float2 by[2] = {affine[column], affine[column + 1]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp * 32 + 16 * i + 8 * h + (lane >> 2);
          StemPair<T> pair;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float v = fmaf(acc[i][j][2 * h + e], by[e].x, by[e].y);
            pair.values[e] = from_float<T>(relu(v));
          }
          *reinterpret_cast<uint32_t*>(tile + row * kTilePitch + column) = pair.bits;
        }
      }
    }
    __syncthreads();
    stem_pool<T>(p, tile, image, oy0, ox0, channel0);
  }
}

}  // namespace fr
