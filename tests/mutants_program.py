"""Bugs to plant in the CPU's programs: places, micro-batches, kept plans, the head."""

from __future__ import annotations

from mutant import BLOCKS, CALLS, HEAD, POOLS, PROGRAM, Mutant

BLOCK = "csrc/cpu/residual_block.cpp"
LAYERS = "csrc/cpu/layers.cpp"
LINEAR = "csrc/cpu/kernels/linear.h"
AVERAGE = "csrc/cpu/kernels/average.h"
PLAN = "csrc/cpu/program_plan.cpp"
RUN = "csrc/cpu/run_program.cpp"
RUNS = "csrc/cpu/program_runs.cpp"

MUTANTS = [
    Mutant(
        "a part of the batch takes the first part's residual",
        RUN,
        "nullptr : address(step.residual, n0);",
        "nullptr : address(step.residual, 0);",
        f"{PROGRAM} {BLOCKS}",
    ),
    Mutant(
        "the residual is the input",
        RUN,
        "nullptr : address(step.residual, n0);",
        "nullptr : address(step.input, n0);",
        PROGRAM,
    ),
    Mutant(
        "a part starts an image late",
        RUN,
        "n0 = batch * part / r.micro_batches,",
        "n0 = batch * part / r.micro_batches + (part > 0),",
        PROGRAM,
    ),
    Mutant(
        "a micro-batch's place by the size of the input's images",
        RUN,
        "base + n0 * plan_.program.image_bytes(value)",
        "base + n0 * plan_.program.image_bytes(0)",
        PROGRAM,
    ),
    Mutant(
        "a micro-batch's algorithm is its own",
        RUN,
        "return run_conv(team, p.dtype, f, plan_.algorithms[static_cast<size_t>(index)]);",
        "return run_conv(team, p.dtype, f, conv_algorithm(p.dtype, f.shape, step.winograd));",
        PROGRAM,
    ),
    Mutant(
        "memory is free in the step that reads it last",
        PLAN,
        "if (o.first > b.last || b.first > o.last) continue;",
        "if (o.first >= b.last || b.first >= o.last) continue;",
        PROGRAM,
    ),
    Mutant(
        "a value is needed no longer than by its first reader",
        RUNS,
        "last[static_cast<size_t>(step.input)] = static_cast<int64_t>(i);",
        "if (last[static_cast<size_t>(step.input)] < step.input)"
        " last[static_cast<size_t>(step.input)] = static_cast<int64_t>(i);",
        PROGRAM,
    ),
    Mutant(
        "an output is written over where it was a residual",
        PLAN,
        "if (outputs_[static_cast<size_t>(residual)] >= 0) return 0;",
        "",
        PROGRAM,
    ),
    Mutant(
        "a residual is written over that is read again",
        PLAN,
        "if (last_[static_cast<size_t>(residual)] != own.first) return 0;",
        "",
        PROGRAM,
    ),
    Mutant(
        "a result takes the place of the convolution's input",
        PLAN,
        "if (residual <= 0 || residual == step.input) return 0;",
        "if (residual <= 0) return 0;",
        PROGRAM,
    ),
    Mutant(
        "memory for one image of a micro-batch",
        PLAN,
        "(b.whole ? batch : run.most_images(batch))",
        "(b.whole ? batch : 1)",
        f"{PROGRAM} {BLOCKS}",
    ),
    Mutant(
        "a value between two runs has memory during its own steps only",
        PLAN,
        "if (!b.whole) continue;",
        "continue;",
        PROGRAM,
    ),
    Mutant(
        "a kept plan for another shape",
        RUN,
        "if (!x.sizes().equals(sizes) ||",
        "if (",
        CALLS,
    ),
    Mutant(
        "a kept plan for other memory",
        RUN,
        "!(TensorMark::of(now[i]) == tensors[i])",
        "false",
        CALLS,
    ),
    Mutant(
        "no ReLU between a block's convolutions",
        BLOCK,
        "h = conv(block.convs[i], h, -1, activation, winograd);",
        "h = conv(block.convs[i], h, -1, Activation::kNone, winograd);",
        BLOCKS,
    ),
    Mutant(
        "a shortcut that pads takes neighbouring rows",
        LAYERS,
        "line = row % rows * pad.stride_h;",
        "line = row % rows;",
        PROGRAM,
    ),
    Mutant(
        "a pool's second image lies where the first one's result is",
        LAYERS,
        "p.y = static_cast<char*>(y) + image * out;",
        "p.y = y;",
        PROGRAM,
    ),
    Mutant(
        "a linear layer's last rows belong to nobody",
        LAYERS,
        "const int64_t rows = ceil_div(f.k, kLinearRowsAtOnce);",
        "const int64_t rows = std::max<int64_t>(f.k / kLinearRowsAtOnce, 1);",
        HEAD,
    ),
    Mutant(
        "a linear layer loses the features behind the last vector",
        LINEAR,
        "if (c < end) step([&](const T* p) { return load_part(p, end - c); }, c);",
        "",
        HEAD,
    ),
    Mutant(
        "a linear layer loses all chains but the last",
        LINEAR,
        "total[i][r] += acc[i][r];",
        "total[i][r] = acc[i][r];",
        HEAD,
    ),
    Mutant(
        "an average takes each row's sum for the map's",
        AVERAGE,
        "for (int v = 0; v < kVectors; ++v) total[v] += sum[v];",
        "for (int v = 0; v < kVectors; ++v) total[v] = sum[v];",
        HEAD,
    ),
    Mutant(
        "a pool's last window begins beyond the map",
        "csrc/cpu/kernels/table.h",
        "return (last < most ? last : most) + 1;",
        "return last + 1;",
        POOLS,
    ),
    Mutant(
        "what lies beyond the padding counts in an average",
        "csrc/cpu/kernels/max_pool.h",
        "const int64_t count = high * min_of(f.kernel_w, f.w + f.pad_w - left);",
        "const int64_t count = f.kernel_h * f.kernel_w;",
        POOLS,
    ),
]
