"""Bugs planted in batch norm's CUDA kernels; the conformance suite catches each."""

from __future__ import annotations

from planting import Mutant

FORWARD = "csrc/cuda/kernels/bn_add_relu.cuh"
BACKWARD = "csrc/cuda/kernels/bn_add_relu_backward.cuh"
MERGE = "csrc/cuda/kernels/bn_merge.cuh"
MOMENTS = "csrc/cuda/kernels/moments.cuh"
WALK = "csrc/cuda/kernels/bn_walk.cuh"
PLAN = "csrc/cuda/bn_add_relu.cu"

_TESTS = "tests/conformance/test_bn_add_relu.py"
_FORWARD = f"{_TESTS}::test_forward_of_awkward_shapes"
_BACKWARD = f"{_TESTS}::test_backward_of_awkward_shapes"

MUTANTS = [
    Mutant(
        "bn: backwards begins one item past the slab",
        WALK,
        "offset(end_ - 1 - row_ - i * rows_)",
        "offset(end_ - row_ - i * rows_)",
        tests=_FORWARD,
        variants=("plain", "asan"),
    ),
    Mutant(
        "bn: contiguous: images lie one channel too close",
        WALK,
        "static_cast<int64_t>(image) * map_.channels + channel_) * map_.plane",
        "static_cast<int64_t>(image) * (map_.channels - 1) + channel_) * map_.plane",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: Welford's update without the new mean",
        MOMENTS,
        "m2 = fmaf(delta, v - mean, m2);",
        "m2 = fmaf(delta, delta, m2);",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: merging takes the neighbouring lane's part",
        MERGE,
        "mine.merge(shared[threadIdx.x + half * lanes]);",
        "mine.merge(shared[threadIdx.x + half]);",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: no barrier before an exchange is used again",
        MERGE,
        "  __syncthreads();\n  shared[threadIdx.x] = v;",
        "  shared[threadIdx.x] = v;",
        tests=_FORWARD,
        variants=("race",),
    ),
    Mutant(
        "bn: statistics without a pivot",
        FORWARD,
        "pivot[e] = first.get(e);",
        "pivot[e] = 0.0f;",
        tests=f"{_TESTS}::test_statistics_survive_a_large_mean",
    ),
    Mutant(
        "bn: contiguous: each value of an item has its own pivot",
        FORWARD,
        "if (!walk.channels_last()) pivot[e] = pivot[0];",
        "",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: the last slab counts as much as the others",
        FORWARD,
        "return slab == p.slabs - 1 ? last : p.slab_values;",
        "return last > 0.0 ? p.slab_values : last;",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: the residual is added behind ReLU",
        FORWARD,
        "if (residual) v += added[j].get(e);\n          items[j].set(e, activate(v));",
        "v = activate(v);\n          items[j].set(e, residual ? v + added[j].get(e) : v);",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: the residual's gradient is stored before it is masked",
        BACKWARD,
        "dz[j].mask(y, p.activation);\n"
        "          if (to) dz[j].grad.store(to + walk.forwards(i + j));",
        "if (to) dz[j].grad.store(to + walk.forwards(i + j));\n"
        "          dz[j].mask(y, p.activation);",
        tests=_BACKWARD,
    ),
    Mutant(
        "bn: running statistics move with the batch in the backward",
        "csrc/cuda/kernels/bn_add_relu_backward.cuh",
        "if (x) v += fmaf(b[e], items[j].get(e) - mean[e], c[e]);",
        "v += fmaf(b[e], items[j].get(e) - mean[e], c[e]);",
        tests=_BACKWARD,
    ),
    Mutant(
        "bn: the finishing kernel writes past the channels",
        BACKWARD,
        "if (way != 0 || c >= p.channels) return;",
        "if (way != 0) return;",
        tests=_BACKWARD,
        variants=("asan",),
    ),
    Mutant(
        "bn: blocks for too few channels",
        PLAN,
        "map.groups = as_int(ceil_div(packs, map.lanes));",
        "map.groups = as_int(std::max<int64_t>(packs / map.lanes, 1));",
        tests=f"{_TESTS}::test_forward",
    ),
    Mutant(
        "bn: no barrier between writing and reading parts",
        MERGE,
        "shared[threadIdx.x] = mine;\n    __syncthreads();",
        "shared[threadIdx.x] = mine;",
        tests=_FORWARD,
        variants=("race",),
    ),
    Mutant(
        "bn: no barrier between the steps of a sum",
        MERGE,
        "    __syncthreads();\n    if (way < half)",
        "    if (way < half)",
        tests=_FORWARD,
        variants=("race",),
    ),
    Mutant(
        "bn: moments merged without their means' distance",
        MOMENTS,
        "fmaf(delta * delta, seen * share, other.m2)",
        "other.m2",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: what sums round off is lost",
        MERGE,
        "    low += (high - (sum - added)) + (v - added);\n",
        "",
        tests=f"{_TESTS}::test_backward_sums_what_cancels",
    ),
    Mutant(
        "bn: rows that do not fill a step are left out",
        WALK,
        "(left + rows_ - 1) / rows_",
        "left / rows_",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: threads past the last channel go on",
        WALK,
        "return channel_ < map_.channels;",
        "return true;",
        tests=_FORWARD,
        variants=("asan",),
    ),
    Mutant(
        "bn: the last slab is as long as the others",
        WALK,
        "min(begin_ + map.slab_items, map.items);",
        "begin_ + map.slab_items;",
        tests=_FORWARD,
        variants=("asan",),
    ),
    Mutant(
        "bn: slabs merged without their means' distance",
        FORWARD,
        "partial[p.channels] + values(i) * delta * delta;",
        "partial[p.channels];",
        tests=f"{_TESTS}::test_forward",
    ),
    Mutant(
        "bn: the batch's variance is the unbiased one",
        FORWARD,
        "bn_sum_ways(m2, exchange) / p.values;",
        "bn_sum_ways(m2, exchange) / (p.values - 1.0);",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: the shared memory that is asked for is half of what is used",
        PLAN,
        "kBnThreads * sizeof(Moments<vector()>), stream, p);",
        "kBnThreads / 2 * sizeof(Moments<vector()>), stream, p);",
        tests=_FORWARD,
    ),
    Mutant(
        "bn: LeakyReLU's gradient is ReLU's",
        "csrc/cuda/element.cuh",
        "g * static_cast<float>(kLeakySlope) : 0.0f;",
        "0.0f : 0.0f;",
        tests=f"{_TESTS}::test_backward_flags",
    ),
    Mutant(
        "bn: the gradient passes where y is zero",
        "csrc/cuda/element.cuh",
        "return at <= 0.0f;",
        "return at < 0.0f;",
        tests=_BACKWARD,
    ),
    Mutant(
        "bn: dx lacks the mean's part",
        BACKWARD,
        "static_cast<float>(-scale * dz / p.values);",
        "0.0f;",
        tests=_BACKWARD,
    ),
]
