"""Bugs to plant in the CPU's kernels, and the list of all that are not in a GPU's."""

from __future__ import annotations

import mutants_activation
import mutants_program
import mutants_python
import mutants_training
from mutant import BACKWARD, BFLOAT16, PROGRAM, Mutant

CONV = "csrc/cpu/kernels/conv_bn_add_relu.h"
TILE = "csrc/cpu/kernels/conv_tile.h"
INPUT = "csrc/cpu/kernels/conv_input.h"
BN = "csrc/cpu/kernels/bn_add_relu.h"
HOST = "csrc/cpu/bn_add_relu.cpp"
RESULTS = "csrc/cpu/result_cache.cpp"
PAIRS = "csrc/cpu/kernels/conv_bfloat16.h"
TILES = "csrc/cpu/kernels/conv_amx.h"
#: Tests and instruction set of AVX512-BF16's kernel.
PAIRED = (BFLOAT16, "avx512_bf16")
#: And of AMX's.
TILED = (BFLOAT16, "amx_emulated")


MUTANTS = [
    Mutant(
        "epilogue channel off by one",
        CONV,
        "e.shift = static_cast<const A*>(f.shift) + k;",
        "e.shift = static_cast<const A*>(f.shift) + (k > 0 ? k - 1 : 0);",
    ),
    Mutant("missing ReLU", TILE, "store(floor_vector(floor, r), y);", "store(r, y);"),
    Mutant(
        "missing ReLU behind Winograd's output transform",
        "csrc/cpu/kernels/winograd.h",
        "store(floor_vector(floor, r), y + at);",
        "store(r, y + at);",
    ),
    Mutant(
        "missing ReLU in a partial panel",
        TILE,
        "e.y[at] = floor_vector(floor, r);",
        "e.y[at] = r;",
    ),
    Mutant(
        "missing residual in a partial panel",
        TILE,
        "if (e.residual) r += e.residual[at];",
        "",
    ),
    Mutant(
        "narrowed tile without its ReLU",
        TILE,
        "store(floor_vector(floor, r), y + k);",
        "store(r, y + k);",
    ),
    Mutant(
        "narrowed tile takes its first pixel's residual",
        TILE,
        "const T* const residual = e.residual + i * e.stride;",
        "const T* const residual = e.residual;",
    ),
    Mutant(
        "narrowed tile's last channels without residual",
        TILE,
        "if (e.residual) r += to_acc(residual[k]);",
        "",
    ),
    Mutant(
        "long sums lose their first chains",
        TILE,
        "spilled ? total[i][v] + acc[i][v] : acc[i][v]",
        "acc[i][v]",
    ),
    Mutant("padding column too few", INPUT, "min_of(max_of(-x0, 0), cols)", "max_of(-x0 - 1, 0)"),
    Mutant("wrong group's input", CONV, "group * s.group_c();", "0 * s.group_c();"),
    Mutant(
        "last tile one pixel short",
        CONV,
        "ox1 = ox0 + narrow + (t < wider);",
        "ox1 = ox0 + narrow + (t + 1 < tiles ? t < wider : -1);",
    ),
    Mutant(
        "ReLU swallows NaN",
        "csrc/cpu/kernels/activation.h",
        "return floor > v ? floor : v;",
        "return v > floor ? v : floor;",
    ),
    Mutant(
        "bfloat16 truncated, not rounded",
        "csrc/cpu/kernels/vec.h",
        "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16;\n  const U32 result",
        "u >> 16;\n  const U32 result",
    ),
    Mutant(
        "max-pool window one column short",
        "csrc/cpu/kernels/max_pool.h",
        "min_of(left + f.kernel_w, f.w)",
        "min_of(left + f.kernel_w - 1, f.w)",
    ),
    Mutant(
        "stem's band starts a row late",
        "csrc/cpu/conv_driver.cpp",
        "p.x_first = row0;",
        "p.x_first = row0 - (row0 > 0);",
    ),
    Mutant(
        "batch normalised by the unbiased variance",
        HOST,
        "var_of[k] /= total;",
        "var_of[k] /= total - 1;",
    ),
    Mutant(
        "chunks merged without their means' distance",
        HOST,
        " + delta * delta * (total - size) * size / total",
        "",
    ),
    Mutant(
        "Winograd's output transform with a wrong coefficient",
        "csrc/cpu/kernels/winograd_transforms.h",
        "o[3] = d1 + 8.0f * d2 + m[5];",
        "o[3] = d1 + 4.0f * d2 + m[5];",
    ),
    Mutant(
        "copied pixels read at their distance in the map",
        CONV,
        "source.pixel = pixel_step<A>(s);",
        "source.pixel = s.c;",
    ),
    Mutant(
        "a group's narrow last panel taken for a whole one",
        "csrc/cpu/kernels/panels.h",
        "group_width = ceil_div(packed_group<A>(s), kLanes<A>) * kLanes<A>;",
        "group_width = ceil_div(packed_group<A>(s), kPanel<A>) * kPanel<A>;",
    ),
    Mutant(
        "a transposed square's steps leave a block where it was",
        "csrc/cpu/kernels/transpose.h",
        "if constexpr (kStep > 1) swap_blocks<A, kStep / 2>(rows);",
        "if constexpr (kStep > 2) swap_blocks<A, kStep / 2>(rows);",
    ),
    Mutant(
        "memory handed out twice",
        RESULTS,
        "free_.erase(std::next(at).base());",
        "at->data = Memory(data.get());",
        "tests/test_result_cache.py",
    ),
    Mutant(
        "memory that never comes back",
        RESULTS,
        "while (kept_ > limit())",
        "while (!free_.empty())",
        "tests/test_result_cache.py",
    ),
    Mutant(
        "all pages of old memory in one place",
        "csrc/cpu/memory.cpp",
        "kHugePage, to.get() + at)",
        "kHugePage, to.get())",
        "tests/test_result_cache.py",
    ),
    Mutant(
        "a page of old memory that is in use twice",
        "csrc/cpu/memory.cpp",
        "block = rest_of(std::move(block), kHugePage, left);",
        "block = rest_of(std::move(block), 0, left);",
        "tests/test_result_cache.py",
    ),
    Mutant(
        "a tile goes on in the wrong row",
        INPUT,
        "const int64_t row = n * source.image + oy * source.row;",
        "const int64_t row = n * source.image + oy * (source.row - source.pixel);",
    ),
    Mutant(
        "Winograd's weight transform with a wrong sign",
        "csrc/cpu/kernels/winograd_transforms.h",
        "o[4] = (1.0f / 24) * (far - 2.0f * g[1]);",
        "o[4] = (1.0f / 24) * (far + 2.0f * g[1]);",
    ),
    Mutant(
        "Winograd's products lose all channels but the last pass's",
        "csrc/cpu/kernels/winograd.h",
        "first ? acc[i][v] : acc[i][v] + load(to)",
        "acc[i][v]",
    ),
    Mutant(
        "Winograd's transform of a small tile's input with a wrong sign",
        "csrc/cpu/kernels/winograd_transforms.h",
        "o[3] = d[1] - d[3];",
        "o[3] = d[3] - d[1];",
    ),
    Mutant(
        "Winograd's panels begin at the first one's channel",
        "csrc/cpu/kernels/winograd.h",
        "f, b.tile0, b.tile1, q * kPanel<float>, panel, l, product);",
        "f, b.tile0, b.tile1, b.panel0 * kPanel<float>, panel, l, product);",
    ),
    Mutant(
        "Winograd takes a pair's first weight for the second",
        "csrc/cpu/kernels/winograd.h",
        "c % 2 == 0 ? words << 16 : words & 0xffff0000u",
        "words << 16",
        isa="avx512_bf16",
    ),
    Mutant(
        "rows that two blocks of a max-pool share come from one row too high",
        "csrc/cpu/conv_driver.cpp",
        "map + (row0 - first) * row_bytes",
        "map + (row0 - first - 1) * row_bytes",
    ),
    Mutant(
        "Winograd's second group of tiles begins one late",
        "csrc/cpu/kernels/winograd.h",
        "const WinogradBlock group{b.tile0 + tiles * g / groups,",
        "const WinogradBlock group{b.tile0 + tiles * g / groups + (g > 0),",
    ),
    Mutant(
        "Winograd's frame of zeros lacks a tile's last column",
        "csrc/cpu/kernels/winograd.h",
        "for (int64_t j = col0; j < col1; ++j)",
        "for (int64_t j = col0; j < col1 - 1; ++j)",
    ),
    Mutant(
        "Winograd's tiles never reach the next image",
        "csrc/cpu/kernels/winograd.h",
        "    y = 0;\n    ++n;",
        "    y = 0;",
    ),
    Mutant(
        "groups in a vector take each other's channels",
        TILE,
        "turned[i] = i / kShare * kShare + (i % kShare + kShare - 2 * t) % kShare;",
        "turned[i] = i / kShare * kShare + (i % kShare + 2 * t + 2) % kShare;",
        isa="avx2",
    ),
    Mutant(
        "groups in a vector take the even channels twice",
        "csrc/cpu/kernels/vec.h",
        "kOdd ? _mm256_movehdup_ps(v) : _mm256_moveldup_ps(v)",
        "kOdd ? _mm256_moveldup_ps(v) : _mm256_moveldup_ps(v)",
        isa="avx2",
    ),
    Mutant(
        "threads do not wait for each other between two loops",
        "csrc/cpu/thread_team.h",
        "if (loops_ > 0 && size_ > 1) barrier_.wait(loops_, size_);",
        "",
        PROGRAM,
    ),
    Mutant(
        "nobody wakes the threads that sleep in the barrier",
        "csrc/cpu/thread_team.h",
        "all_arrived_.notify_all();",
        "",
        "tests/test_thread_team.py",
    ),
    Mutant(
        "a loop loses its last share",
        "csrc/cpu/thread_team.h",
        "if (begin < count) body(begin,",
        "if (begin + share < count) body(begin,",
        PROGRAM,
    ),
    Mutant("pairs in the wrong order", PAIRS, "+ in_run % 2;", "+ 1 - in_run % 2;", *PAIRED),
    Mutant(
        "half a pair reads its neighbour",
        PAIRS,
        "if (half) step(broadcast_half);",
        "if (half) step(broadcast_pair);",
        *PAIRED,
    ),
    Mutant(
        "no zero behind an odd run of weights",
        PAIRS,
        "__builtin_memset(p + panel * numel, 0,",
        "__builtin_memset(p + panel * numel, 0xff,",
        *PAIRED,
    ),
    Mutant(
        "every square of pairs is the filters' first",
        PAIRS,
        "reinterpret_cast<const float*>(w + k * words + i)",
        "reinterpret_cast<const float*>(w + k * words)",
        *PAIRED,
    ),
    Mutant(
        "pairs truncated, not rounded",
        PAIRS,
        "_mm512_cvtne2ps_pbh(v[1], v[0]);",
        "_mm512_inserti64x4(_mm512_castsi256_si512("
        "_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v[0]), 16))),"
        "_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v[1]), 16)), 1);",
        *PAIRED,
    ),
    Mutant(
        "taps of a dilated row too near",
        PAIRS,
        "col + t * s.dilation_w, 1,",
        "col + t, 1,",
        *PAIRED,
    ),
    Mutant(
        "a partial panel leaves its last channel out",
        PAIRS,
        "_mm512_mask_storeu_epi16(to, t.channels, y);",
        "_mm512_mask_storeu_epi16(to, t.channels >> 1, y);",
        *PAIRED,
    ),
    Mutant(
        "a NaN's sign reaches the max-pool", PAIRS, "if (t.relu) y =", "if (false) y =", *PAIRED
    ),
    Mutant(
        "rows of a tile of weights too near",
        TILES,
        "load_tile<7>(w + kChannels, kStepBytes);",
        "load_tile<7>(w + kChannels, kStepBytes / 2);",
        *TILED,
    ),
    Mutant(
        "pairs behind the tiles left out",
        TILES,
        "part.begun = t.runs->length / (2 * kTilePairs) * kTilePairs;",
        "part.begun = ceil_div(t.runs->length, 2);",
        *TILED,
    ),
    Mutant(
        "tiles keep the height of the first",
        TILES,
        "if (pixels != pixels_) configure(pixels);",
        "if (pixels_ == 0) configure(pixels);",
        *TILED,
    ),
    Mutant(
        "a dilated row's sums depend on the block",
        PAIRS,
        "if (!adjacent && !straddling) {",
        "if (!adjacent && !by_column) {",
        *TILED,
    ),
    Mutant("residual left out", BN, "if (residual) v += Load<A>::from(residual + i);", ""),
    Mutant(
        "backward mask lets zero pass",
        "csrc/cpu/kernels/activation.h",
        "return at <= bound ? Vec<A>{} : g;",
        "return at < bound ? Vec<A>{} : g;",
        BACKWARD,
    ),
    Mutant(
        "gradient misses the mean's part",
        HOST,
        "constant[i] = -scale[i] * s1[i] / count;",
        "constant[i] = 0 * scale[i] * s1[i] / count;",
        BACKWARD,
    ),
    Mutant(
        "residual's gradient not masked",
        BN,
        "store(dz.vector(i), to + i);",
        "store(Load<A>::from(dz.grad + i), to + i);",
        BACKWARD,
    ),
    *mutants_activation.MUTANTS,
    *mutants_program.MUTANTS,
    *mutants_python.MUTANTS,
    *mutants_training.MUTANTS,
]
