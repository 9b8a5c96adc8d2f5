"""Bugs to plant in the kernels of the training primitives; see :mod:`triton_mutants`."""

from __future__ import annotations

from mutant_of_triton import Mutant

_FILES = ("training_passes", "conv_forward", "conv_backward", "activations")
PASSES, FORWARD, BACKWARD, OTHERS = (f"tests/triton_kernels/test_triton_{f}.py::" for f in _FILES)

MUTANTS = [
    Mutant(
        "the prologue is ReLU's whatever the activation",
        "_conv_call.py",
        "IN_ACTIVATION=self.in_activation,",
        "IN_ACTIVATION=int(self.in_activation > 0),",
        OTHERS + "test_convolutions",
    ),
    Mutant(
        "the data gradient's mask is ReLU's whatever the activation",
        "_data_gradient.py",
        "ACTIVATION=call.activation,",
        "ACTIVATION=int(call.activation > 0),",
        OTHERS + "test_convolutions",
    ),
    Mutant(
        "the weight gradient's prologue is ReLU's whatever the activation",
        "_weight_gradient.py",
        "ACTIVATION=call.activation,",
        "ACTIVATION=int(call.activation > 0),",
        OTHERS + "test_convolutions",
    ),
    Mutant(
        "sums: a program's slabs and one more",
        "_channel_sums.py",
        "end = tl.minimum(begin + span, slabs)",
        "end = tl.minimum(begin + span + 1, slabs)",
        PASSES + "test_slabs_are_added_once_each",
    ),
    Mutant(
        "sums of a pass lose their low part",
        "_channel_sums.py",
        "low + ((high - (total - part)) + (v - part))",
        "low",
        PASSES + "test_sums_that_cancel_keep_their_digits",
    ),
    Mutant(
        "the running variance is the biased one",
        "_bn_finish.py",
        "var * (n / (n - 1.0))",
        "var",
        FORWARD + "test_the_batch_norm_behind",
    ),
    Mutant(
        "every program counts the batch",
        "_conv_kernels.py",
        "first = tl.program_id(0) == 0",
        "first = tl.program_id(0) >= 0",
        FORWARD + "test_many_tiles_count_one_batch",
    ),
    Mutant(
        "the end of a block: the projection is not scaled",
        "block_end.py",
        "s = s * shortcut_scale[None, :] + shortcut_shift[None, :]",
        "s = s + shortcut_shift[None, :]",
        PASSES + "test_block_end",
    ),
    Mutant(
        "the mask from z forgets the projection's shift",
        "block_end_backward.py",
        "v += s * shortcut_scale[None, :] + shortcut_shift[None, :]",
        "v += s * shortcut_scale[None, :]",
        PASSES + "test_block_end_backward",
    ),
    Mutant(
        "batch norm's gradient without the mean",
        "bn_coefficients.py",
        "c = -a * g / count - b * mean",
        "c = -a * g / count",
        PASSES + "test_coefficients",
    ),
    Mutant(
        "between passes: the gradient passes where ReLU's input is 0",
        "_activation.py",
        "tl.where(at <= 0.0, 0.0, g)",
        "tl.where(at < 0.0, 0.0, g)",
        BACKWARD + "test_pytorchs_convolution_between_passes",
    ),
    Mutant(
        "the stem's pool: the last of equal values wins",
        "stem_end.py",
        "(v > best)",
        "(v >= best)",
        PASSES + "test_stem_end",
    ),
    Mutant(
        "the stem's gradient: a place is that of another row",
        "stem_end.py",
        "(dy * kernel_w + dx)[:, None]",
        "(dx * kernel_w + dy)[:, None]",
        PASSES + "test_stem_end",
    ),
    Mutant(
        "data gradient: the constant of dz reaches pixels outside",
        "_data_gradient.py",
        "dz = tl.where(valid, dz, 0.0)",
        "dz = dz + 0.0",
        BACKWARD + "test_both_gradients",
    ),
    Mutant(
        "data gradient: a phase forgets the padding",
        "_data_gradient.py",
        "ky0 = (py + pad_h) % STRIDE_H",
        "ky0 = py % STRIDE_H",
        BACKWARD + "test_both_gradients",
    ),
    Mutant(
        "data gradient: taps go the forward's way",
        "_data_gradient.py",
        "oy = y0 - ty",
        "oy = y0 + ty",
        BACKWARD + "test_both_gradients",
    ),
    Mutant(
        "data gradient: phases store their sums in one place",
        "_data_gradient.py",
        "phase * most_m + tile_m, C",
        "tile_m, C",
        BACKWARD + "test_both_gradients",
        quick=True,
    ),
    Mutant(
        "data gradient: the mask forgets the scale",
        "_data_gradient.py",
        "acc = gradient(acc, x * scale[None, :]",
        "acc = gradient(acc, x * 0.0",
        BACKWARD + "test_both_gradients",
    ),
    Mutant(
        "data gradient: a filter past the last one is read",
        "_data_gradient.py",
        "k_valid = k < K",
        "k_valid = k <= K",
        BACKWARD + "test_both_gradients",
    ),
    Mutant(
        "weight gradient: padded zeros go through the prologue",
        "_weight_gradient.py",
        "p = tl.where(x_valid, v, 0.0).to(p.dtype)",
        "p = v.to(p.dtype)",
        BACKWARD + "test_both_gradients",
    ),
    Mutant(
        "weight gradient: parts of the pixels overlap by one",
        "_weight_gradient.py",
        "end = tl.minimum(begin + split_rows, M)",
        "end = tl.minimum(begin + split_rows + 1, M)",
        BACKWARD + "test_every_tile_of_the_weight_gradient",
    ),
    Mutant(
        "weight gradient: the first part is left out",
        "_weight_gradient.py",
        "for _ in range(0, splits)",
        "for _ in range(1, splits)",
        BACKWARD + "test_each_gradient_alone_and_any_memory_format",
    ),
    Mutant(
        "weight gradient: rows and columns of taps change places",
        "_weight_gradient.py",
        "ky * stride_h + kx * stride_w",
        "kx * stride_h + ky * stride_w",
        BACKWARD + "test_both_gradients",
        quick=True,
    ),
]
