// From accumulators to memory: the affine step, the residual, the activation and one rounding.
//
// A warp's accumulators are distributed over its lanes. Through a slab of shared memory that
// belongs to the warp, 16 rows at a time are regrouped into packs, consecutive channels of one
// pixel. Loads of the residual and stores of y are then 16 bytes per lane and whole sectors per
// row, and no barrier beyond __syncwarp is needed.
#pragma once

#include "conv_tile.cuh"

namespace fr {

constexpr int kSlabRows = 16;

// Rows of the slab have eight floats of padding, so that the 8-byte stores of a half warp's
// fragments fall on different banks.
template <class T>
constexpr int kSlabStride = T::kWarpN + 8;

template <class T>
constexpr int kSlabBytes = kSlabRows * kSlabStride<T> * static_cast<int>(sizeof(float));

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

// Computes y for one pixel's pack of channels. On return `v` holds the stored, rounded values.
template <class S>
FR_DEVICE void finish_pack(const ConvEpilogue& e, const ChannelAffine<kPack<S>>& affine,
                           float (&v)[kPack<S>], int row, int channel, int end) {
  const int64_t at = static_cast<int64_t>(row) * e.k + channel;
  const S* residual = static_cast<const S*>(e.residual);
  float r[kPack<S>];
#pragma unroll
  for (int i = 0; i < kPack<S>; ++i) r[i] = 0.0f;
  if (residual) {
    if (e.vector) {
      load_pack(r, residual + at);
    } else {
      for (int i = 0; i < kPack<S>; ++i) {
        if (channel + i < end) r[i] = to_float(residual[at + i]);
      }
    }
    if (e.residual_scale) {
#pragma unroll
      for (int i = 0; i < kPack<S>; ++i) {
        if (channel + i < end) {
          r[i] = fmaf(r[i], e.residual_scale[channel + i], e.residual_shift[channel + i]);
        }
      }
    }
  }
  Pack<S> pack;
#pragma unroll
  for (int i = 0; i < kPack<S>; ++i) {
    v[i] = fmaf(v[i], affine.scale[i], affine.shift[i]) + r[i];
    v[i] = activate(e.activation, v[i]);
    pack.values[i] = from_float<S>(v[i]);
    v[i] = to_float(pack.values[i]);
  }
  S* y = static_cast<S*>(e.y) + at;
  if (e.vector) {
    *reinterpret_cast<uint4*>(y) = pack.bits;
  } else {
    for (int i = 0; i < kPack<S>; ++i) {
      if (channel + i < end) y[i] = pack.values[i];
    }
  }
}

// Calls visit(values, row, pack) for each pack of the warp's results, one pack per lane at a time.
// `row` counts within the warp's rows; `pack` within its columns, and is constant for a lane.
template <class T, class Precision, class Visit>
FR_DEVICE void for_each_pack(const typename T::Accumulators& acc, float* slab, Visit visit) {
  constexpr int kWidth = kPack<typename Precision::Storage>;
  constexpr int kPacks = T::kWarpN / kWidth;  // in a row
  constexpr int kAtOnce = 32 / kPacks;        // rows
  static_assert(32 % kPacks == 0 && kSlabRows % kAtOnce == 0);
  const int lane = threadIdx.x & 31, pack = lane % kPacks;
#pragma unroll
  for (int i = 0; i < T::kRows16; ++i) {
#pragma unroll
    for (int j = 0; j < T::kCols8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = (lane >> 2) + 8 * (e >> 1), col = 8 * j + Precision::column(e, lane);
        slab[row * kSlabStride<T> + col] = acc[i][j][e];
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kSlabRows; r += kAtOnce) {
      const int row = r + lane / kPacks;
      float v[kWidth];
#pragma unroll
      for (int c = 0; c < kWidth; c += 4) {
        const float* from = slab + row * kSlabStride<T> + pack * kWidth + c;
        const float4 four = *reinterpret_cast<const float4*>(from);
        v[c] = four.x;
        v[c + 1] = four.y;
        v[c + 2] = four.z;
        v[c + 3] = four.w;
      }
      visit(v, kSlabRows * i + row, pack);
    }
    __syncwarp();
  }
}

}  // namespace fr
