"""Bugs to plant in Triton's kernels, each of which a test in the interpreter must catch."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton_mutants_plan
import triton_mutants_stem
import triton_mutants_training
from mutant_of_triton import Mutant
from pytest_process import warm
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("fused_resnet/backends/triton")


OPERATIONS = ("bn_add_relu", "conv_bn_add_relu", "conv_bn_relu_maxpool", "residual_block")
#: The conformance suite's tests, and those of configurations that only Triton's kernels have.
BN, CONV, STEM, BLOCK = (f"tests/conformance/test_{name}.py::" for name in OPERATIONS)
BN_TILES, CONV_TILES = (f"tests/triton_kernels/test_triton_{name}.py::" for name in OPERATIONS[:2])

MUTANTS = [
    Mutant(
        "LeakyReLU lets negative numbers pass",
        "_activation.py",
        "tl.where(v < 0.0, v * SLOPE, v)",
        "v",
        CONV + "test_flags",
    ),
    Mutant(
        "LeakyReLU's gradient is ReLU's",
        "_activation.py",
        "tl.where(at > 0.0, g, g * SLOPE)",
        "tl.where(at > 0.0, g, 0.0)",
        BN + "test_backward_flags",
    ),
    Mutant(
        "ReLU stops NaN",
        "_activation.py",
        "tl.where(v < 0.0, 0.0, v)",
        "tl.maximum(v, 0.0)",
        BN + "test_non_finite_values_pass_through",
    ),
    Mutant(
        "batch norm without epsilon",
        "_common.py",
        "channel_vector(var, c, valid, 1.0) + eps",
        "channel_vector(var, c, valid, 1.0)",
        CONV + "test_awkward_shapes[interpreter-float32-packs]",
    ),
    Mutant(
        "statistics: tiles merged as if their means were one",
        "bn_add_relu.py",
        "m2 += tile_m2.to(tl.float64) + delta * delta * (before * share)",
        "m2 += tile_m2.to(tl.float64)",
        BN_TILES + "test_every_configuration[channels_last-32x64]",
    ),
    Mutant(
        "statistics: the last slab counts as a whole one",
        "bn_add_relu.py",
        "count = tl.minimum(R - s * slab_rows, slab_rows).to(tl.float64)\n        total",
        "count = (s * 0 + slab_rows).to(tl.float64)\n        total",
        BN_TILES + "test_every_configuration[channels_last-32x64]",
    ),
    Mutant(
        "statistics: lanes past the map's end are values",
        "bn_add_relu.py",
        "d = tl.where(valid, v - rough[None, :], 0.0)",
        "d = v - rough[None, :]",
        BN + "test_forward_of_awkward_shapes",
    ),
    Mutant(
        "NCHW: an image's channels follow each other too closely",
        "_bn_map.py",
        "(image.to(tl.int64) * C * P + r - image * P)",
        "(image.to(tl.int64) * C * P + r)",
        BN + "test_forward_of_awkward_shapes",
    ),
    Mutant(
        "backward: the gradient passes where y is 0",
        "_activation.py",
        "tl.where(at <= 0.0, 0.0, g)",
        "tl.where(at < 0.0, 0.0, g)",
        BN + "test_backward_flags",
    ),
    Mutant(
        "backward: sums lose their low part",
        "bn_add_relu_backward.py",
        "low + ((high - (total - part)) + (v - part))",
        "low",
        BN_TILES + "test_backward_sums_what_cancels_in_tiles_of_few_rows",
        quick=True,
    ),
    Mutant(
        "padded zeros go through the prologue",
        "_implicit_gemm.py",
        "a = tl.where(a_valid, v, 0.0).to(a.dtype)",
        "a = v.to(a.dtype)",
        "tests/triton_kernels/test_triton_conv_forward.py::"
        "test_the_prologue_in_every_precision[packs-float16]",
    ),
    Mutant(
        "a tap past the right edge reads the next row",
        "_implicit_gemm.py",
        "inside = row_valid & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)",
        "inside = row_valid & (iy >= 0) & (iy < H) & (ix >= 0)",
        CONV + "test_operation",
    ),
    Mutant(
        "flat: the depth's end is not looked at",
        "_implicit_gemm.py",
        "k_valid = k < KH * KW * TAP_C",
        "k_valid = k >= 0",
        CONV + "test_awkward_shapes[interpreter-float16-no-packs]",
    ),
    Mutant(
        "taps: a block of channels reads the next pixel's",
        "_implicit_gemm.py",
        "k_valid = c < group_c",
        "k_valid = c >= 0",
        CONV_TILES + "test_every_configuration[pointwise-bfloat16-128x128x64x3]",
    ),
    Mutant(
        "tf32 is cut off, not rounded",
        "_implicit_gemm.py",
        "tl.dot(round_to_tf32(a), round_to_tf32(b), acc",
        "tl.dot(a, b, acc",
        CONV + "test_awkward_shapes[interpreter-tf32-packs]",
    ),
    Mutant(
        "program order: the last rows of tiles are taken for whole groups",
        "_implicit_gemm.py",
        "height = tl.minimum(tiles_m - first, GROUP_M)",
        "height = GROUP_M",
        CONV + "test_operation",
    ),
    Mutant(
        "the residual is not scaled",
        "_implicit_gemm.py",
        "r = r * r_scale[None, :] + r_shift[None, :]",
        "r = r + r_shift[None, :]",
        CONV_TILES + "test_residual_with_an_affine_step_of_its_own",
    ),
    Mutant(
        "every group uses the first one's filters",
        "_conv_tile.py",
        "first_filter = group * group_k + tile_n * BLOCK_N",
        "first_filter = tile_n * BLOCK_N",
        CONV + "test_awkward_shapes[interpreter-float16-groups-of-packs]",
    ),
    Mutant(
        "a column too many is stored",
        "_conv_tile.py",
        "columns < group_k, split",
        "columns < group_k + 1, split",
        CONV + "test_awkward_shapes[interpreter-float16-no-packs]",
        quick=True,
    ),
    Mutant(
        "parts of a split overlap by a step",
        "_conv_tile.py",
        "end = begin + steps_per_split",
        "end = begin + steps_per_split + 1",
        CONV_TILES + "test_split_of_awkward_shapes[packs-float16]",
    ),
    Mutant(
        "a split's first part is left out",
        "_conv_kernels.py",
        "for _ in range(0, splits)",
        "for _ in range(1, splits)",
        CONV_TILES + "test_split_of_awkward_shapes[packs-float16]",
    ),
    Mutant(
        "the added convolution uses the first one's filters",
        "_conv_tile.py",
        "w_stride + (depth + c)[:, None]",
        "w_stride + c[:, None]",
        CONV_TILES + "test_a_second_convolution_in_the_same_sum[(24, 40, 16)-float16]",
    ),
    Mutant(
        "statistics of rows that are past the end",
        "_conv_tile.py",
        "d = tl.where(row_valid[:, None], v - rough[None, :], 0.0)",
        "d = v - rough[None, :]",
        CONV + "test_statistics_are_those_of_the_rounded_result[interpreter-float32-packs]",
    ),
    Mutant(
        "the stem pools what is outside of its map",
        "_stem_kernels.py",
        'v = tl.where(in_map[:, None], v, float("-inf")).to(',
        "v = v.to(",
        STEM + "test_stem[interpreter-float16-few-channels-out]",
        quick=True,
    ),
    Mutant(
        "the stem's pooling loses NaN",
        "_stem_kernels.py",
        "propagate_nan=tl.PropagateNan.ALL",
        "propagate_nan=tl.PropagateNan.NONE",
        STEM + "test_non_finite_values_reach_what_they_should",
    ),
    Mutant(
        "the stem's pooled rows are one row apart",
        "_stem_kernels.py",
        "o // TILE_W * STEP_H * TILE_W",
        "o // TILE_W * TILE_W",
        STEM + "test_stem[interpreter-float16-few-channels-out]",
    ),
    Mutant(
        "on chip: no ReLU in the middle",
        "residual_block.py",
        "h = activate(acc * scale[None, :] + shift[None, :], ACTIVATION)",
        "h = (acc * scale[None, :] + shift[None, :])",
        BLOCK + "test_one_tile_on_chip[interpreter-float16-64]",
    ),
    Mutant(
        "on chip: filters past the last one are read",
        "residual_block.py",
        "mask=(n < K)[None, :], other=0.0",
        "mask=(n >= 0)[None, :], other=0.0",
        BLOCK + "test_one_tile_on_chip[interpreter-float16-64]",
    ),
    *triton_mutants_plan.MUTANTS,
    *triton_mutants_stem.MUTANTS,
    *triton_mutants_training.MUTANTS,
]


@dataclass(frozen=True)
class Catch:
    """Which test saw a bug, and what it said."""

    test: str
    words: str


def plant(mutant: Mutant, root: Path) -> None:
    """Makes of ``root`` a copy of the project with the bug; what does not change is a link."""
    for name in ("tests", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    for folder, copied in (("fused_resnet", "backends"), ("fused_resnet/backends", "triton")):
        (root / folder).mkdir()
        for path in (ROOT / folder).iterdir():
            if path.name not in (copied, "__pycache__"):
                (root / folder / path.name).symlink_to(path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / KERNELS, root / KERNELS, ignore=ignored)
    path = root / KERNELS / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        count = text.count(mutant.old)
        raise LookupError(f"{mutant.bug}: {mutant.file} has {mutant.old!r} {count} times, not once")
    path.write_text(text.replace(mutant.old, mutant.new))


def catch(mutant: Mutant) -> Catch | None:
    """Plants the bug and says who sees it."""
    with tempfile.TemporaryDirectory() as scratch:
        plant(mutant, Path(scratch))
        arguments = ["-x", "-v", "--tb=short", "-m", "", "--backend", "interpreter"]
        arguments += ["-p", "no:cacheprovider", mutant.tests]
        done = warm(arguments, Path(scratch), {"PYTHONPATH": scratch})
    out = done.output
    if done.status == 0:
        return None
    if done.status not in (1, None):  # interrupted, internal error, usage error, no tests
        raise RuntimeError(f"{mutant.bug}: pytest did not run {mutant.tests}\n{out[-2000:]}")
    started = re.findall(r"^\S+\.py::(.+?) FAILED", out, re.MULTILINE)
    said = re.findall(r"^E   +(.*)", out, re.MULTILINE)
    return Catch(started[-1] if started else "?", said[0] if said else done.violent_end or "?")


def table(results: list[tuple[Mutant, Catch | None]]) -> Table:
    shown = Table("planted bug", "file", "caught by", "which says", title="Mutants of Triton")
    for mutant, caught in results:
        if caught is None:
            shown.add_row(mutant.bug, mutant.file, "[red]nothing[/]")
        else:
            shown.add_row(mutant.bug, mutant.file, escape(caught.test), escape(caught.words[:90]))
    return shown
