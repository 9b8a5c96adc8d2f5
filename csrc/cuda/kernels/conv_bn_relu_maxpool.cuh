// The stem: y = max_pool(activation(conv(x, w) * scale + shift)), the convolution's result kept on
// chip.
//
// ResNet's: 3 channels of 224 x 224, 64 filters of 7 x 7, stride 2; then 3 x 3 pooling, stride 2.
// An image in 16 bits: 0.30 MB of x are read and 0.40 MB of y written, where the convolution's
// result would be 1.6 MB written and read again; 236 Mflop. 180 MB and 60 Gflop for a batch of 256
// take an H100 54 and 61 microseconds: the tensor cores are the limit and determine the tiles.
//
// A block computes tiles of pooled pixels, one after another, for 64 channels. 7 x 8 pooled pixels
// need 15 x 17 of the convolution's, 255 of the 256 rows of eight warps with 32 rows x 64 columns
// each; the rows and columns between neighbouring tiles are computed twice (255 for every 224, 14%
// more). The part of x under a tile, 35 x 39 pixels, is its patch in shared memory, including zeros
// for the padding. Filters are loaded once for all tiles of a block: a grid is one wave, and its
// blocks stride over the tiles.
//
// There are two patches: while a tile is pooled and the next one is multiplied, the copies of the
// patch of the one after that are in flight. Of a tile's two barriers one lies between its
// multiplication and its results, the other between its results and their pooling: a warp that has
// pooled its part multiplies the next tile while others still pool.
//
// Copies are asynchronous and of chunks of 16 bytes, aligned on both sides. So a patch's first
// element is as far from a multiple of 16 bytes as it is in x (its skew), and the pitch differs by
// such a multiple from that of x, which makes it so for all rows. A chunk across the end of a row
// of x is composed of elements. Where the plan or the address of x do not allow chunks, all
// elements are loaded one by one.
//
// The depth of the sum runs over (ky, kx, c). For 3 channels no instruction brings 16 bytes of it,
// so fragments of A are gathered from x in shared memory, at a pixel's offset plus the offset of
// each pair of k, which is in a table. A kernel row is padded to an even length (21 to 22
// elements), so that a pair is one aligned word wherever pixels begin at even offsets: 8 loads and
// 4 ldmatrix for 16 mma. Where they begin at odd ones, as ResNet's do (its first is 9 elements left
// of the map), the padding leads the row. Words of eight neighbouring pixels (3 words apart) and
// four pairs are in different banks, across the end of a row of 17 too: its patch has a pitch of
// 120. The padding is masked, as zero weights are not enough: 0 * inf would be NaN.
//
// Float32 maps are multiplied as tf32. Their elements are words already, so any offset is aligned;
// tiles have half the rows, with two warps of 32 rows x 32 columns next to each other, because of
// the limit of shared memory.
//
// Occupancy designed for: two blocks of 256 threads, 128 registers; for ResNet's stem 75 KiB of
// shared memory in 16 bits, 93 KiB in tf32 (one block where a multiprocessor has 164 KiB or less).
// While one block waits for memory, the other multiplies.
#pragma once

#include "conv_epilogue.cuh"
#include "stem_params.cuh"

namespace fr {

constexpr int kStemWarps = 8;
constexpr int kStemThreads = 32 * kStemWarps;
constexpr int kStemChannels = 64;
constexpr int kStemRowLanes = 16;  // that copy a row of a patch; ResNet's has 15 chunks in 16 bits

// How the warps of a block divide a tile: kWarpsN of them along the columns.
template <class T>
struct StemTile {
  static constexpr int kWarpsN = sizeof(T) / 2;
  static constexpr int kRows = 32 * kStemWarps / kWarpsN;  // the convolution's pixels, at most
  static constexpr int kCols8 = kStemChannels / kWarpsN / 8;
  // 16 bytes of padding put rows on different banks, for ldmatrix and for the words of fragments.
  static constexpr int kPad = kPack<T>;
  static constexpr int kPitch = kStemChannels + kPad;
};

// An entry of the table of offsets for a position in the depth.
struct alignas(8) StemPlace {
  uint32_t first, second;
};
constexpr uint32_t kStemNowhere = 0xffffffffu;

// The offset of one element of a kernel row, or kStemNowhere for padding.
FR_DEVICE uint32_t stem_element(const StemParams& p, int ky, int at) {
  const int kx = at / p.image.c, c = at - kx * p.image.c;
  if (ky >= p.image.kh || at < 0 || kx >= p.image.kw) return kStemNowhere;
  return ky * p.image.dilation_h * p.patch_pitch + kx * p.image.dilation_w * p.image.c + c;
}

// How the words of fragments are composed of kDepth elements of a map: place() computes the offset
// of a word relative to a pixel, gather() loads it. `at` counts the elements of a padded row.
// kTurns of the loop over the depth are unrolled, which saves instructions for pairs alone.

// Two elements that are an aligned word: its offset and a mask of its bits. A pixel is where its
// row's padding would be, if that leads.
struct StemPairs {
  using Element = uint16_t;
  static constexpr int kDepth = 2, kTurns = 2;

  FR_DEVICE static StemPlace place(const StemParams& p, int ky, int at) {
    const uint32_t first = stem_element(p, ky, at - p.lead);
    const uint32_t second = stem_element(p, ky, at - p.lead + 1);
    if (first == kStemNowhere && second == kStemNowhere) return {0, 0};
    if (first == kStemNowhere) return {second, 0xffff0000u};
    return {first + p.lead, second == kStemNowhere ? 0x0000ffffu : 0xffffffffu};
  }
  FR_DEVICE static uint32_t gather(const Element* pixel, StemPlace at) {
    return *reinterpret_cast<const uint32_t*>(pixel + at.first) & at.second;
  }
};

// Two elements at any offsets.
struct StemHalves {
  using Element = uint16_t;
  static constexpr int kDepth = 2, kTurns = 1;

  FR_DEVICE static StemPlace place(const StemParams& p, int ky, int at) {
    return {stem_element(p, ky, at), stem_element(p, ky, at + 1)};
  }
  FR_DEVICE static uint32_t gather(const Element* pixel, StemPlace at) {
    const uint32_t low = at.first == kStemNowhere ? 0 : pixel[at.first];
    const uint32_t high = at.second == kStemNowhere ? 0 : pixel[at.second];
    return low | high << 16;
  }
};

// One element of 32 bits.
struct StemWords {
  using Element = uint32_t;
  static constexpr int kDepth = 1, kTurns = 1;

  FR_DEVICE static StemPlace place(const StemParams& p, int ky, int at) {
    return {stem_element(p, ky, at), 0};
  }
  FR_DEVICE static uint32_t gather(const Element* pixel, StemPlace at) {
    return at.first == kStemNowhere ? 0 : pixel[at.first];
  }
};

// Loads the block's filters, each padded with zeros to p.depth.
template <class Element>
FR_DEVICE void stem_bring_filters(const StemParams& p, Element* filters, int channel0) {
  const int width = p.image.kw * p.image.c;
  const Element* const weight = static_cast<const Element*>(p.weight);
  for (int i = threadIdx.x; i < kStemChannels * p.depth; i += kStemThreads) {
    const int row = i / p.depth, k = i - row * p.depth;
    const int ky = k / p.row_depth, at = k - ky * p.row_depth - p.lead;
    const bool inside = channel0 + row < p.k && ky < p.image.kh && at >= 0 && at < width;
    const int from = ((channel0 + row) * p.image.kh + ky) * width + at;
    filters[row * (p.depth + kPack<Element>)+k] = inside ? weight[from] : 0;
  }
}

// Where a tile lies, and its patch.
struct StemTilePlace {
  int image, oy, ox;  // its first pooled pixel
  int y, from;        // the first row of x that the patch has, and its first element of a row

  FR_DEVICE StemTilePlace(const StemParams& p, int t) {
    image = t / (p.tiles_y * p.tiles_x);
    const int within = t - image * p.tiles_y * p.tiles_x, row = within / p.tiles_x;
    oy = row * p.tile_h;
    ox = (within - row * p.tiles_x) * p.tile_w;
    y = (oy * p.pool.stride_h - p.pool.pad_h) * p.image.stride_h - p.image.pad_h;
    const int x = (ox * p.pool.stride_w - p.pool.pad_w) * p.image.stride_w - p.image.pad_w;
    from = x * p.image.c - p.lead;
  }

  // The offset of the first element in its chunk, which is also that in the patch.
  template <class Element>
  FR_DEVICE int skew(const StemParams& p) const {
    if (!p.chunks) return 0;
    const unsigned rows = static_cast<unsigned>(image) * p.image.h + y;
    return (rows * p.image.w * p.image.c + from) & (kPack<Element> - 1);
  }
};

// Loads a patch element by element, with zeros outside of the map.
template <class Element>
FR_DEVICE void stem_bring_elements(const StemParams& p, Element* patch, const StemTilePlace& of) {
  constexpr int kInFlight = 4;
  const int lane = threadIdx.x & 31, width = p.patch_width, end = p.image.w * p.image.c;
  for (int r = threadIdx.x >> 5; r < p.patch_rows; r += kStemWarps) {
    const int y = of.y + r;
    const bool inside = y >= 0 && y < p.image.h;
    const Element* const row = static_cast<const Element*>(p.image.x) +
                               (static_cast<int64_t>(of.image) * p.image.h + y) * end;
    for (int e = lane; e < width; e += kInFlight * 32) {
      Element v[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int at = of.from + e + 32 * j;
        v[j] = inside && at >= 0 && at < end && e + 32 * j < width ? row[at] : 0;
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (e + 32 * j < width) patch[r * p.patch_pitch + e + 32 * j] = v[j];
      }
    }
  }
}

// The elements of a chunk that are in the row of x, and zeros for the others.
template <class Element>
FR_DEVICE uint4 stem_chunk_at_end(const Element* row, int first, int end) {
  Pack<Element> pack;
#pragma unroll
  for (int e = 0; e < kPack<Element>; ++e) {
    pack.values[e] = first + e >= 0 && first + e < end ? row[first + e] : 0;
  }
  return pack.bits;
}

// Starts the copies of a patch's chunks, with zeros outside of the map.
template <class Element>
FR_DEVICE void stem_bring_chunks(const StemParams& p, Element* patch, const StemTilePlace& of) {
  constexpr int kElements = kPack<Element>;
  const int end = p.image.w * p.image.c, begin0 = of.skew<Element>(p);
  const Element* const map =
      static_cast<const Element*>(p.image.x) + static_cast<int64_t>(of.image) * p.image.h * end;
  for (int r = threadIdx.x / kStemRowLanes; r < p.patch_rows; r += kStemThreads / kStemRowLanes) {
    const int y = of.y + r, begin = begin0 + r * p.patch_pitch, skew = begin & (kElements - 1);
    const bool inside = y >= 0 && y < p.image.h;
    const Element* const row = map + static_cast<int64_t>(y) * end;
    // From the row's first element on; its last one is followed by the next row's first chunk.
    int at = static_cast<int>(threadIdx.x % kStemRowLanes) * kElements - skew;
    for (; at < p.patch_width; at += kStemRowLanes * kElements) {
      const int first = of.from + at;
      const bool there = inside && first > -kElements && first < end;
      if (there && (first < 0 || first + kElements > end)) {
        store_shared_16(shared_address(patch + begin + at), stem_chunk_at_end(row, first, end));
      } else {
        cp_async_16(patch + begin + at, row + first, there);
      }
    }
  }
}

// Starts to load the patch of tile t, if there is one.
template <class Element>
FR_DEVICE void stem_bring_patch(const StemParams& p, Element* patch, int t) {
  if (t < p.tiles) {
    const StemTilePlace of(p, t);
    if (p.chunks) {
      stem_bring_chunks(p, patch, of);
    } else {
      stem_bring_elements(p, patch, of);
    }
  }
  cp_async_commit();
}

template <class T>
struct alignas(2 * sizeof(T)) StemPair {
  T values[2];
};

// The larger, or NaN if there is one.
FR_DEVICE float max_or_nan(float best, float v) { return v > best || v != v ? v : best; }

// Pools a tile of the convolution's rounded results. Skips pooled pixels and channels beyond the
// end of the map, and the parts of windows outside of the convolution's map.
template <class T>
FR_DEVICE void stem_pool(const StemParams& p, const T* tile, const StemTilePlace& of,
                         int channel0) {
  constexpr int kPacks = kStemChannels / kPack<T>;
  for (int i = threadIdx.x; i < p.tile_h * p.tile_w * kPacks; i += kStemThreads) {
    const int pack = i % kPacks, pixel = i / kPacks;
    const int py = pixel / p.tile_w, px = pixel - py * p.tile_w;
    const int oy = of.oy + py, ox = of.ox + px, channel = channel0 + pack * kPack<T>;
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
        load_pack(v, tile + row * StemTile<T>::kPitch + pack * kPack<T>);
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) best[e] = max_or_nan(best[e], v[e]);
      }
    }
    T* const y = static_cast<T*>(p.y) +
                 ((static_cast<int64_t>(of.image) * p.out_h + oy) * p.out_w + ox) * p.k + channel;
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

template <class Precision, class Gather>
__global__ void __launch_bounds__(kStemThreads, 2)
    conv_bn_relu_maxpool_kernel(const __grid_constant__ StemParams p) {
  using T = typename Precision::Storage;
  using Element = typename Gather::Element;
  using Tile = StemTile<T>;
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  const int words = p.depth / Gather::kDepth, filter_pitch = p.depth + Tile::kPad;
  Element* patch = arena.take<Element>(p.patch_size);
  Element* next_patch = arena.take<Element>(p.patch_size);
  Element* const filters = arena.take<Element>(kStemChannels * filter_pitch);
  StemPlace* const places = arena.take<StemPlace>(words);
  float2* const affine = arena.take<float2>(kStemChannels);
  T* const tile = arena.take<T>(Tile::kRows * Tile::kPitch);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row0 = warp / Tile::kWarpsN * 32;
  const int column0 = warp % Tile::kWarpsN * Tile::kCols8 * 8;
  const int channel0 = blockIdx.y * kStemChannels;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    stem_bring_patch(p, i == 0 ? patch : next_patch, blockIdx.x + i * gridDim.x);
  }
  stem_bring_filters(p, filters, channel0);
  for (int i = threadIdx.x; i < words; i += kStemThreads) {
    const int k = i * Gather::kDepth, ky = k / p.row_depth;
    places[i] = Gather::place(p, ky, k - ky * p.row_depth);
  }
  if (threadIdx.x < kStemChannels) {
    const ChannelAffine<1> a(p.affine, channel0 + threadIdx.x, p.k);
    affine[threadIdx.x] = make_float2(a.scale[0], a.shift[0]);
  }

  const Activate activate(p.activation);

  // The pixels of the thread's four rows; results of rows beyond the tile's pixels are not read.
  int pixels[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int row = row0 + 16 * i + 8 * h + (lane >> 2);
      if (row >= p.conv_rows * p.conv_cols) row = 0;
      const int y = row / p.conv_cols, x = row - y * p.conv_cols;
      pixels[i][h] = y * p.image.stride_h * p.patch_pitch + x * p.image.stride_w * p.image.c;
    }
  }

  cp_async_wait<1>();
  __syncthreads();
  for (int t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    const StemTilePlace place(p, t);
    const Element* const first = patch + place.template skew<Element>(p);

    float acc[2][Tile::kCols8][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kCols8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
      }
    }
// With nvcc's own choice of unrolling, four times on sm_120, it would need more registers than
// there are.
#pragma unroll Gather::kTurns
    for (int word = 0; word < words; word += 8) {
      const StemPlace low = places[word + (lane & 3)], high = places[word + 4 + (lane & 3)];
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[i][0] = Gather::gather(first + pixels[i][0], low);
        a[i][1] = Gather::gather(first + pixels[i][1], low);
        a[i][2] = Gather::gather(first + pixels[i][0], high);
        a[i][3] = Gather::gather(first + pixels[i][1], high);
        Precision::round(a[i]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kCols8; j += 2) {
        uint32_t b[4];
        const int row = column0 + 8 * j + (lane & 7) + (lane >> 4) * 8;
        const int k = word * Gather::kDepth + ((lane >> 3) & 1) * kPack<T>;
        ldmatrix_x4(b, filters + row * filter_pitch + k);
        Precision::round(b);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Precision::mma(acc[i][j], a[i], b[0], b[1]);
          Precision::mma(acc[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }

    __syncthreads();  // the previous tile is pooled
#pragma unroll
    for (int j = 0; j < Tile::kCols8; ++j) {
      const int column = column0 + 8 * j + (lane & 3) * 2;
      const float2 by[2] = {affine[column], affine[column + 1]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = row0 + 16 * i + 8 * h + (lane >> 2);
          StemPair<T> pair;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float v = fmaf(acc[i][j][2 * h + e], by[e].x, by[e].y);
            pair.values[e] = from_float<T>(activate(v));
          }
          *reinterpret_cast<StemPair<T>*>(tile + row * Tile::kPitch + column) = pair;
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // the tile and the next patch are there, and this one is free
    stem_bring_patch(p, patch, t + 2 * gridDim.x);
    stem_pool<T>(p, tile, place, channel0);
    Element* const free = patch;
    patch = next_patch;
    next_patch = free;
  }
}

}  // namespace fr
