"""Bugs to plant in the kernels of training."""

from __future__ import annotations

from mutant import Mutant

KERNELS = "csrc/cpu/kernels/training/"
HOST = "csrc/cpu/training/"
#: Tests of the convolutions' three directions, of Winograd's alone, and of what surrounds them.
CONVOLUTIONS = "tests/training/test_convolutions.py"
WINOGRAD = "tests/training/test_winograd_passes.py"
PASSES = "tests/training/test_passes.py"

MUTANTS = [
    Mutant(
        "Winograd's sums keep only the last channels",
        KERNELS + "winograd_conv.h",
        "first ? acc[i][v] : acc[i][v] + load(to)",
        "acc[i][v]",
        WINOGRAD,
    ),
    Mutant(
        "Winograd's data gradient without the turned weight",
        KERNELS + "winograd_filters.h",
        "(turned ? 8 - t : t) * tap",
        "t * tap",
        WINOGRAD,
    ),
    Mutant(
        "Winograd's weight gradient keeps only the last block of tiles",
        KERNELS + "winograd_wgrad.h",
        "store(first ? o[j] : o[j] + load(to), to);",
        "store(o[j], to);",
        WINOGRAD,
    ),
    Mutant(
        "the adjoint of Winograd's output transform with a wrong coefficient",
        KERNELS + "winograd_windows.h",
        "wide = 2.0f * y[1] + 8.0f * y[3];",
        "wide = 2.0f * y[1] + 4.0f * y[3];",
        WINOGRAD,
    ),
    Mutant(
        "Winograd's part of the weight gradient begins a tile late",
        KERNELS + "winograd_table.h",
        "min_of(part * plan.part, tiles)",
        "min_of(part * plan.part + (part > 0), tiles)",
        WINOGRAD,
    ),
    Mutant(
        "long direct sums lose their first chains",
        KERNELS + "direct_product.h",
        "if (!first) acc[v][i] += far[v][i];",
        "",
        CONVOLUTIONS,
    ),
    Mutant(
        "pixels that no tap reaches lose the shortcut's gradient",
        KERNELS + "fusion.h",
        "put(Vec<A>{}, i + c, all);",
        "store(Vec<A>{}, g + i + c);",
        CONVOLUTIONS,
    ),
    Mutant(
        "zeros between the pixels of a stride stop a vector early",
        KERNELS + "direct_product.h",
        "e.put_zeros(scratch.at[i] * columns, columns);",
        "e.put_zeros(scratch.at[i] * columns, columns - kLanes<typename M::A>);",
        CONVOLUTIONS,
    ),
    Mutant(
        "a thread takes a block that another has",
        HOST + "blocks.h",
        "first < count; first = next.fetch_add(grain)",
        "first < count; first = next.fetch_add(2 * grain)",
        CONVOLUTIONS,
    ),
    Mutant(
        "a row of an image begins without its padding",
        KERNELS + "few_channels.h",
        "(ox * s.stride_w - s.pad_w) * s.c, elements,",
        "ox * s.stride_w * s.c, elements,",
        CONVOLUTIONS,
    ),
    Mutant(
        "a weight gradient keeps only a block's last pixels",
        KERNELS + "direct_weight.h",
        "store(load(at) + acc[i][v], at);",
        "store(acc[i][v], at);",
        CONVOLUTIONS,
    ),
    Mutant(
        "the data gradient of a stride takes its taps in the wrong order",
        KERNELS + "direct_grid.h",
        "stride > 1 ? -1 : -dilation",
        "stride > 1 ? 1 : -dilation",
        CONVOLUTIONS,
    ),
    Mutant(
        "weights of the data gradient packed for the kernel's first column",
        KERNELS + "direct.h",
        "grid.x.tap0 + t % grid.x.taps * grid.x.tap_step",
        "grid.x.tap0",
        CONVOLUTIONS,
    ),
    Mutant(
        "the direct weight gradient forgets the first chain of pixels",
        KERNELS + "direct_weight.h",
        "if (!first) acc[i][v] += far[i][v];",
        "",
        CONVOLUTIONS,
    ),
    Mutant(
        "a pair's second term left out",
        KERNELS + "direct_terms.h",
        "_mm512_or_si512(low, _mm512_slli_epi32(high, 16))",
        "_mm512_or_si512(low, _mm512_slli_epi32(low, 16))",
        CONVOLUTIONS,
        "avx512_bf16",
    ),
    Mutant(
        "zeros of the padding put in front of the prologue",
        KERNELS + "direct_product.h",
        "if (from[p] >= 0) value = in.get(from[p] * channels + c + v * lanes, channel[v]);",
        "value = in.get(max_of(from[p], 0) * channels + c + v * lanes, channel[v]);",
        CONVOLUTIONS,
    ),
    Mutant(
        "the mask of a ReLU lets zero pass",
        KERNELS + "fusion.h",
        "return x * scale + shift <= 0 ? V{} : v;",
        "return x * scale + shift < 0 ? V{} : v;",
        CONVOLUTIONS,
    ),
    Mutant(
        "statistics about a pivot of zero's place",
        KERNELS + "fusion.h",
        "total[i] = set ? near[i] : total[i] + near[i];",
        "total[i] = total[i] + near[i];",
        CONVOLUTIONS,
    ),
    Mutant(
        "the gradient of a batch norm without its constant",
        KERNELS + "fusion.h",
        "return a * g + (b * z + c);",
        "return a * g + b * z;",
        CONVOLUTIONS,
    ),
    Mutant(
        "a block's end adds the projection without its shift",
        KERNELS + "passes.h",
        "return [=](int64_t i) { return lanes.get(shortcut + i) * k + b; };",
        "return [=](int64_t i) { return lanes.get(shortcut + i) * k + Vec<A>{}; };",
        PASSES,
    ),
    Mutant(
        "of equal places in a window the last is kept",
        KERNELS + "stem.h",
        "(v > best) | (v != v)",
        "(v >= best) | (v != v)",
        PASSES,
    ),
    Mutant(
        "the stem's gradient leaves the last window over a pixel out",
        KERNELS + "stem.h",
        "x1 < out_w && x1 * p.stride_w",
        "x1 < out_w - 1 && x1 * p.stride_w",
        PASSES,
    ),
    Mutant(
        "the running variance is biased",
        HOST + "coefficients.cpp",
        "update(running_var, var, unbiased);",
        "update(running_var, var, 1);",
        PASSES,
    ),
    Mutant(
        "the weight's gradient of a batch norm without the deviation",
        HOST + "coefficients.cpp",
        "dweight[i] = g_xc[i] * invstd[i];",
        "dweight[i] = g_xc[i];",
        PASSES,
    ),
    Mutant(
        "blocks merged without their means' distance",
        HOST + "blocks.cpp",
        " + delta * delta * both",
        "",
        CONVOLUTIONS,
    ),
    Mutant(
        "the last part of a weight gradient is not added",
        KERNELS + "passes.h",
        "for (int64_t p = 1; p < count; ++p)",
        "for (int64_t p = 1; p + 1 < count; ++p)",
        f"{CONVOLUTIONS} {WINOGRAD}",
    ),
    Mutant(
        "a data gradient without the shortcut's",
        HOST + "conv_backward.cpp",
        "if (o.add.defined()) {",
        "if (false) {",
        CONVOLUTIONS,
    ),
    Mutant(
        "filters laid out as they came",
        KERNELS + "filters.h",
        "to + column * f.rows + row",
        "to + row * f.columns + column",
        "tests/training/test_filters.py",
    ),
    Mutant(
        "a float32 weight beside maps of 16 bits is read as they are",
        HOST + "filters.cpp",
        "from.scalar_type() != maps",
        "false",
        "tests/training/test_filters.py",
    ),
]
