// Gradients of y = activation((x - mean) * scale + bias [+ residual]). With dz the gradient of the
// activation's argument (for ReLU zero where y <= 0), which is the residual's gradient too, and xc
// = x - mean:
//   dbias = sum dz,  dweight = sum(dz * xc) / std,
//   dx = scale * (dz - sum dz / m - xc * sum(dz * xc) / (m * var)) = a * dz + b * xc + c
// per channel; with running statistics b and c are zero.
//
// Memory-bound. The reducing kernel reads grad, x and y; the applying kernel reads them again and
// writes dx: 7 elements moved for about 20 flops. If dz is needed, the first kernel writes it and
// the second reads it instead of grad and y: 7 elements again, not 8. As in bn_add_relu.cuh: slabs
// of equal length in one wave, two items of three streams in flight per thread, the second kernel
// traverses slabs backwards to find the end of the first one's data in the L2 cache, and sums are
// merged in a fixed order, in float64 over the slabs.
//
// Occupancy designed for: three blocks of 256 threads, 80 registers or less, with 72 KiB of loads
// in flight per multiprocessor; the reducing kernel with 32 KiB of shared memory.
#pragma once

#include "bn_merge.cuh"
#include "bn_walk.cuh"

namespace fr {

// dz of an item, from the gradient and the output. Where y is NaN the gradient passes, as in
// PyTorch.
template <class T, int kVector>
struct BnMasked {
  BnItem<T, kVector> grad, y;

  FR_DEVICE void load(const T* from, const T* output, int64_t at) {
    grad.load(from + at);
    if (output) y.load(output + at);
  }
  // Leaves dz in grad.
  FR_DEVICE void mask(const T* output, Activation activation) {
    if (!output) return;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (!changes_gradient(activation, y.get(e))) continue;
      grad.set(e, changed_gradient(activation, grad.get(e)));
    }
  }
};

template <class T, int kVector>
__global__ void __launch_bounds__(kBnThreads, 3)
    bn_backward_reduce_kernel(const __grid_constant__ BnBackwardReduceParams p) {
  constexpr int kInFlight = 2;
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  BnSums<kVector>* const parts = arena.take<BnSums<kVector>>(kBnThreads);
  const BnWalk<kVector> walk(p.map);
  const T* const grad = static_cast<const T*>(p.grad);
  const T* const x = static_cast<const T*>(p.x);
  const T* const y = static_cast<const T*>(p.y);
  T* const to = static_cast<T*>(p.dz);

  BnSums<kVector> sums;
  if (walk.active()) {
    float mean[kVector];
    walk.per_channel(mean, p.mean, 0.0f);
    const int count = walk.count();
    for (int i = 0; i < count; i += kInFlight) {
      BnItem<T, kVector> items[kInFlight];
      BnMasked<T, kVector> dz[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (i + j < count) {
          const int64_t at = walk.forwards(i + j);
          items[j].load(x + at);
          dz[j].load(grad, y, at);
        }
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (i + j < count) {
          dz[j].mask(y, p.activation);
          if (to) dz[j].grad.store(to + walk.forwards(i + j));
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            const float v = dz[j].grad.get(e);
            sums.dz[e].add(v);
            sums.dz_xc[e].add_product(v, items[j].get(e) - mean[e]);
          }
        }
      }
    }
  }
  bn_merge_rows(sums, parts, p.map.lanes, walk.row());
  if (walk.row() != 0 || !walk.active()) return;
  if (!walk.channels_last()) sums.join();
  BnSum* const partial = reinterpret_cast<BnSum*>(p.partials) +
                         static_cast<int64_t>(blockIdx.y) * 2 * p.map.channels + walk.channel();
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    if (e > 0 && !walk.channels_last()) break;
    partial[e] = sums.dz[e];
    partial[p.map.channels + e] = sums.dz_xc[e];
  }
}

__global__ void __launch_bounds__(kBnThreads)
    bn_backward_finish_kernel(const __grid_constant__ BnBackwardFinishParams p) {
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  double* const exchange = arena.take<double>(kBnThreads);
  const int c = blockIdx.x * kBnFinishChannels + threadIdx.x % kBnFinishChannels;
  const int way = threadIdx.x / kBnFinishChannels;

  double dz = 0.0, dz_xc = 0.0;
  if (c < p.channels) {
    for (int i = way; i < p.slabs; i += kBnFinishWays) {
      const BnSum* const partial =
          reinterpret_cast<const BnSum*>(p.partials) + static_cast<int64_t>(i) * 2 * p.channels + c;
      dz += partial[0].value();
      dz_xc += partial[p.channels].value();
    }
  }
  dz = bn_sum_ways(dz, exchange);
  dz_xc = bn_sum_ways(dz_xc, exchange);
  if (way != 0 || c >= p.channels) return;
  const double invstd = p.var ? 1.0 / sqrt(p.var[c] + p.eps) : 1.0;
  const double scale = invstd * (p.weight ? p.weight[c] : 1.0);
  p.dweight[c] = static_cast<float>(dz_xc * invstd);
  p.dbias[c] = static_cast<float>(dz);
  if (!p.coefficients) return;
  p.coefficients[c] = static_cast<float>(scale);
  p.coefficients[p.channels + c] = static_cast<float>(-scale * invstd * invstd * dz_xc / p.values);
  p.coefficients[2 * p.channels + c] = static_cast<float>(-scale * dz / p.values);
}

template <class T, int kVector>
__global__ void __launch_bounds__(kBnThreads, 3)
    bn_backward_kernel(const __grid_constant__ BnBackwardParams p) {
  constexpr int kInFlight = 2;
  const BnWalk<kVector> walk(p.map);
  if (!walk.active()) return;
  const T* const grad = static_cast<const T*>(p.grad);
  const T* const x = static_cast<const T*>(p.x);
  const T* const y = static_cast<const T*>(p.y);
  T* const dx = static_cast<T*>(p.dx);

  float mean[kVector], a[kVector], b[kVector], c[kVector];
  walk.per_channel(mean, p.mean, 0.0f);
  walk.per_channel(a, p.a, 0.0f);
  walk.per_channel(b, p.b, 0.0f);
  walk.per_channel(c, p.c, 0.0f);

  const int count = walk.count();
  for (int i = 0; i < count; i += kInFlight) {
    BnItem<T, kVector> items[kInFlight];
    BnMasked<T, kVector> dz[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < count) {
        const int64_t at = walk.backwards(i + j);
        if (x) items[j].load(x + at);
        dz[j].load(grad, y, at);
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < count) {
        dz[j].mask(y, p.activation);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          float v = a[e] * dz[j].grad.get(e);
          if (x) v += fmaf(b[e], items[j].get(e) - mean[e], c[e]);
          items[j].set(e, v);
        }
        items[j].store(dx + walk.backwards(i + j));
      }
    }
  }
}

}  // namespace fr
