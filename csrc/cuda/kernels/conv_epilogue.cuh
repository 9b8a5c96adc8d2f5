// From accumulators to memory: the affine step, the residual, the activation and one rounding.
//
// A lane's accumulators are pairs of neighbouring columns in rows eight apart. The results are
// staged through shared memory that the pipeline has finished with: the residual is copied there
// while the last steps are multiplied, each lane replaces its pairs of the residual by those of y,
// and y is stored in packs of 16 bytes, whole sectors per row. A warp does that with its own part
// of the tile, without a barrier for the block.
#pragma once

#include "conv_tile.cuh"
#include "moments.cuh"

namespace fr {

// What an instance of the kernel does with its sums.
enum class Epilogue {
  kPacks,       // y
  kResidual,    // y with a residual
  kStatistics,  // y without residual and activation, and its statistics
  kPartial,     // the sums themselves, of a part of the depth
  kElements,    // any of these, for channels that do not come in packs; or an affine residual
};

// scale and shift of kCount channels from `first` on; those past `end` are not used.
template <int kCount>
struct ChannelAffine {
  float scale[kCount], shift[kCount];

  FR_DEVICE ChannelAffine(const ConvAffine& a, int first, int end) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = first + i;
      scale[i] = 1.0f;
      shift[i] = 0.0f;
      if (c >= end) continue;
      if (a.weight) scale[i] = a.weight[c];
      float center = a.mean ? -a.mean[c] : 0.0f;
      if (a.conv_bias) center += a.conv_bias[c];
      if (a.var) scale[i] *= 1.0f / sqrtf(a.var[c] + a.eps);
      shift[i] = center * scale[i] + (a.bias ? a.bias[c] : 0.0f);
    }
  }
};

// Computes the block's table of scale and shift, a channel per thread. It can be read after the
// block's next barrier.
template <class T>
FR_DEVICE void fill_affine(float2* table, const ConvAffine& affine, int first, int end) {
  static_assert(T::kThreads >= T::kN);
  if (threadIdx.x >= T::kN) return;
  const ChannelAffine<1> of(affine, first + threadIdx.x, end);
  table[threadIdx.x] = make_float2(of.scale[0], of.shift[0]);
}

// A warp's part of a tile of elements U in shared memory, in bands of eight rows. The bands of all
// warps fill the bytes from kFirst to kFirst + kBytes of a stage, and then those of the next.
//
// Chunks of 16 bytes are permuted within a row, so that neither the pairs of a warp's accumulators
// nor its packs meet in a bank: a row of 64 bytes as in a stage of operands; in a row of 128 bytes,
// which are all banks, rows four apart differ in the last bit of their chunks.
template <class T, class U, int kFirst, int kBytes>
class StagedTile {
 public:
  static constexpr int kRowBytes = T::kWarpN * static_cast<int>(sizeof(U));

 private:
  static constexpr int kBandBytes = 8 * kRowBytes;
  static constexpr int kApart = T::kWarpsM * T::kWarpsN * kBandBytes;  // bands of a warp
  static constexpr int kRowChunks = kRowBytes / 16;
  static_assert(kRowBytes == 64 || kRowBytes == 128);

 public:
  using Element = U;
  static constexpr int kBands = T::kWarpM / 8;
  static constexpr int kPerStage = kBytes / kApart;                    // bands in a stage
  static constexpr int kParts = (kBands + kPerStage - 1) / kPerStage;  // the stages that it takes
  static_assert(kParts <= T::kStages);

  // `first` is the number of its first stage.
  FR_DEVICE StagedTile(unsigned char* ring, int first, int warp)
      : bands_(ring + kFirst + warp * kBandBytes), first_(first) {}

  // Where a band begins.
  FR_DEVICE unsigned char* band(int b) const {
    int stage = first_ + b / kPerStage;
    if (stage >= T::kStages) stage -= T::kStages;
    return bands_ + stage * T::kStageBytes + b % kPerStage * kApart;
  }

  // Of an element from its band's beginning. That of column c + 8 is this one ^ 8 sizeof(U).
  FR_DEVICE static int offset(int row, int column) {
    const int chunk = column * static_cast<int>(sizeof(U)) / 16;
    const int within = column * static_cast<int>(sizeof(U)) % 16;
    if (kRowBytes == 64) return stage_offset(row, chunk) + within;
    return row * kRowBytes + (chunk ^ ((row & 3) << 1 | (row >> 2 & 1))) * 16 + within;
  }

  // Calls visit(band, row, column) for the first elements of the chunks of a part that are this
  // lane's. `band` counts within the part, `row` within the band.
  template <class Visit>
  FR_DEVICE static void for_each_chunk(int part, int lane, Visit visit) {
#pragma unroll
    for (int b = 0; b < (kPerStage < kBands ? kPerStage : kBands); ++b) {
      if (kBands % kPerStage != 0 && part * kPerStage + b >= kBands) continue;
#pragma unroll
      for (int row = 0; row < 8; row += 32 / kRowChunks) {
        visit(b, row + lane / kRowChunks, lane % kRowChunks * kPack<U>);
      }
    }
  }

 private:
  unsigned char* bands_;
  int first_;
};

// A warp's rectangle of an NHWC map of k channels: `rows` pixels by `channels` channels, which may
// be more than the warp has, or none.
template <class S>
struct WarpMap {
  S* first;
  int k, rows, channels;

  FR_DEVICE WarpMap(S* map, int k_, int row0, int channel0, int all_rows, int end)
      : first(map + static_cast<int64_t>(row0) * k_ + channel0),
        k(k_),
        rows(all_rows - row0),
        channels(end - channel0) {}

  FR_DEVICE S* at(int row, int channel) const {
    return first + static_cast<int64_t>(row) * k + channel;
  }
  FR_DEVICE bool has(int row, int channel) const { return row < rows && channel < channels; }
};

// The residual of a tile whose first pixel and channel are `row0` and `channel0`, as the tail of a
// pipeline. Each warp fetches its own part.
template <class T, class Staged>
class ResidualSource {
  using S = typename Staged::Element;

 public:
  static constexpr int kParts = Staged::kParts;

  FR_DEVICE ResidualSource(unsigned char* ring, const ConvEpilogue& e, int row0, int channel0,
                           int rows, int end)
      : ring_(ring), e_(e), row0_(row0), channel0_(channel0), rows_(rows), end_(end) {}

  // Starts the copies of a part into the stage at this distance from the first one. What they need
  // is computed here: the surrounding loop has no register for it.
  FR_DEVICE void bring(int part, int stage) {
    const WarpPlace<T> at(opaque(static_cast<int>(threadIdx.x)));
    const WarpMap<const S> from(static_cast<const S*>(e_.residual), e_.k, row0_ + at.m * T::kWarpM,
                                channel0_ + at.n * T::kWarpN, rows_, end_);
    const Staged to(ring_ + stage, 0, at.warp);
    Staged::for_each_chunk(part, at.lane, [&](int band, int row, int column) {
      const int pixel = 8 * part * Staged::kPerStage + 8 * band + row;
      cp_async_16(to.band(band) + Staged::offset(row, column), from.at(pixel, column),
                  from.has(pixel, column));
    });
  }

 private:
  unsigned char* ring_;
  const ConvEpilogue& e_;
  int row0_, channel0_, rows_, end_;
};

// Two neighbours of a lane's accumulators in a band, `at` bytes from its beginning. Strict float32
// has them four columns apart, which is one chunk.
template <class Precision, class U>
FR_DEVICE Pair<U> load_pair(const unsigned char* band, int at) {
  if (Precision::kPairs) return *reinterpret_cast<const Pair<U>*>(band + at);
  return {*reinterpret_cast<const U*>(band + at), *reinterpret_cast<const U*>(band + (at ^ 16))};
}
template <class Precision, class U>
FR_DEVICE void store_pair(unsigned char* band, int at, const Pair<U>& pair) {
  if (Precision::kPairs) {
    *reinterpret_cast<Pair<U>*>(band + at) = pair;
  } else {
    *reinterpret_cast<U*>(band + at) = pair.values[0];
    *reinterpret_cast<U*>(band + (at ^ 16)) = pair.values[1];
  }
}

// Finishes and stores a warp's results. `affine` is its columns' part of the table; `staged` may be
// written, and has the residual if there is one. `statistics` is of the lane's columns and rows.
template <Epilogue kEpilogue, class Precision, class T, class Staged, class U>
FR_DEVICE void finish_packs(const typename T::Accumulators& acc, const Staged& staged, int lane,
                            const float2* affine, Activate activate, const WarpMap<U>& y,
                            Moments<2 * T::kCols8>& statistics) {
  const int first = Staged::offset(lane >> 2, Precision::column(0, lane));
#pragma unroll
  for (int j = 0; j < T::kCols8; ++j) {
    const int at = first ^ j * 8 * static_cast<int>(sizeof(U));
    float2 by[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (kEpilogue != Epilogue::kPartial) by[e] = affine[8 * j + Precision::column(e, lane)];
    }
#pragma unroll
    for (int b = 0; b < Staged::kBands; ++b) {
      unsigned char* const band = staged.band(b);
      Pair<U> pair;
      if (kEpilogue == Epilogue::kResidual) pair = load_pair<Precision, U>(band, at);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v = acc[b / 2][j][b % 2 * 2 + e];
        if (kEpilogue != Epilogue::kPartial) v = fmaf(v, by[e].x, by[e].y);
        if (kEpilogue == Epilogue::kResidual) v += to_float(pair.values[e]);
        if (kEpilogue == Epilogue::kPacks || kEpilogue == Epilogue::kResidual) v = activate(v);
        pair.values[e] = from_float<U>(v);
        if (kEpilogue == Epilogue::kStatistics && 8 * b + (lane >> 2) < y.rows) {
          statistics.of[2 * j + e].add(to_float(pair.values[e]), 1.0f / static_cast<float>(b + 1));
        }
      }
      store_pair<Precision, U>(band, at, pair);
    }
  }
  __syncwarp();
#pragma unroll
  for (int part = 0; part < Staged::kParts; ++part) {
    Staged::for_each_chunk(part, lane, [&](int b, int row, int column) {
      const int band = part * Staged::kPerStage + b, pixel = 8 * band + row;
      if (!y.has(pixel, column)) return;
      *reinterpret_cast<uint4*>(y.at(pixel, column)) =
          *reinterpret_cast<const uint4*>(staged.band(band) + Staged::offset(row, column));
    });
  }
}

// The same, element by element, for all kinds of epilogues. `row0` and `channel0` are the warp's
// first ones, `end` is the end of the group's channels.
template <class Precision, class T>
FR_DEVICE void finish_elements(const typename T::Accumulators& acc, const ConvParams& p, int lane,
                               const float2* affine, int row0, int channel0, int end,
                               Moments<2 * T::kCols8>& statistics) {
  using S = typename Precision::Storage;
  const ConvEpilogue& e = p.epilogue;
  const Activate activate(e.activation);
#pragma unroll
  for (int c = 0; c < 2 * T::kCols8; ++c) {
    const int column = c / 2 * 8 + Precision::column(c % 2, lane), channel = channel0 + column;
    if (channel >= end) continue;
    // A part without steps has no barrier after which the table could be read.
    const float2 by = p.partial ? make_float2(1.0f, 0.0f) : affine[column];
#pragma unroll
    for (int b = 0; b < 2 * T::kRows16; ++b) {
      const int row = row0 + 8 * b + (lane >> 2);
      if (row >= p.rows) continue;
      const float sum = acc[b / 2][c / 2][b % 2 * 2 + c % 2];
      const int64_t at = static_cast<int64_t>(row) * e.k + channel;
      if (p.partial) {
        p.partial[static_cast<int64_t>(blockIdx.y) * p.rows * e.k + at] = sum;
        continue;
      }
      float r = e.residual ? to_float(static_cast<const S*>(e.residual)[at]) : 0.0f;
      if (e.residual_scale) r = fmaf(r, e.residual_scale[channel], e.residual_shift[channel]);
      const S rounded = from_float<S>(activate(fmaf(sum, by.x, by.y) + r));
      static_cast<S*>(e.y)[at] = rounded;
      if (p.statistics) {
        statistics.of[c].add(to_float(rounded), 1.0f / static_cast<float>(b + 1));
      }
    }
  }
}

// Merges the statistics of a warp's lanes and stores them for the warp's rows, of which `rows` and
// more are not in the map; and the columns from `channels` on are not.
template <class Precision, class T>
FR_DEVICE void store_statistics(Moments<2 * T::kCols8>& statistics, float* slab, int k, int lane,
                                int rows, int channels) {
  const int seen = (rows - (lane >> 2) + 7) / 8;
  statistics.seen = static_cast<float>(max(0, min(seen, 2 * T::kRows16)));
  for (int lanes = 4; lanes < 32; lanes *= 2) statistics.merge_lane(lanes);
  if (lane >= 4) return;
#pragma unroll
  for (int c = 0; c < 2 * T::kCols8; ++c) {
    const int column = c / 2 * 8 + Precision::column(c % 2, lane);
    if (column >= channels) continue;
    slab[column] = statistics.of[c].mean;
    slab[k + column] = statistics.of[c].m2;
  }
}

}  // namespace fr
