"""Bugs to plant in the Python sources."""

from __future__ import annotations

from mutant import ALIASING, BACKWARD, SWAP, Mutant

CHECKED = "tests/ops/test_checked_calls.py"
DISPATCH = "fused_resnet/ops/dispatch.py"
AUTOGRAD = "fused_resnet/ops/autograd.py"
LOWERING = "tests/inference/test_lowering.py tests/inference/test_frozen_changes.py"
OPS = "fused_resnet/ops/functional.py"

ZERO_PADDING = "tests/training/test_block_zero_padding.py"
UNIT = "fused_resnet/ops/training_unit.py"
PATTERNS = "fused_resnet/fusion/trace/patterns.py"
PURITY = "fused_resnet/fusion/trace/purity.py"
CLOSURES = "tests/fusion/test_traced_closures.py"

MUTANTS = [
    Mutant(
        "the gradient of a shortcut of zeros lacks the stride",
        UNIT,
        "g_x[:, :, ::stride, ::stride] += g",
        "g_x[:, :, : g.shape[2], : g.shape[3]] += g",
        ZERO_PADDING,
    ),
    Mutant(
        "the gradient of a shortcut of zeros from the first channels",
        UNIT,
        "g = g[:, channels:-channels]",
        "g = g[:, : -2 * channels]",
        ZERO_PADDING,
    ),
    Mutant(
        "a projection is computed again whatever it costs",
        UNIT,
        "if depths[i] <= depths[2]]",
        "if depths[i]]",
        "tests/training/test_block_numbers.py",
    ),
    Mutant(
        "a shortcut that is padded with any value is one of zeros",
        PATTERNS,
        'mode == "constant" and value in (None, 0, 0.0)',
        'mode == "constant"',
        ZERO_PADDING,
    ),
    Mutant(
        "a shortcut that subsamples from any pixel does from the first",
        PATTERNS,
        "i.start is not None or i.stop is not None",
        "i.stop is not None",
        ZERO_PADDING,
    ),
    Mutant(
        "a shortcut of any strides has the first of them",
        "fused_resnet/fusion/trace/whole_block.py",
        "strides[0] == strides[1] > 0",
        "strides[0] > 0",
        ZERO_PADDING,
    ),
    Mutant(
        "a list of the function around a lambda is a constant",
        PURITY,
        "elif not (isinstance(value, fx.Proxy) or _is_constant(value)):",
        "elif False:",
        CLOSURES,
    ),
    Mutant(
        "an attribute of a class by its name is a constant",
        PURITY,
        'return f"reads {name}.{attribute}, which can change unseen"',
        'return ""',
        CLOSURES,
    ),
    Mutant(
        "a list that is a default argument is a constant",
        PURITY,
        'return "has a default argument that can change unseen" if found else ""',
        'return ""',
        CLOSURES,
    ),
    Mutant(
        "an empty container has no parent",
        "fused_resnet/fusion/trace/generate.py",
        "if child is not None  #",
        "if child  #",
        "tests/training/test_block_numbers.py",
    ),
    Mutant(
        "a batch that is refused stays counted",
        "fused_resnet/nn/group_calls.py",
        "batches.sub_(1)",
        "batches.sub_(0)",
        "tests/training/test_block_semantics.py",
    ),
    Mutant(
        "a block in eval mode is traced for training",
        "fused_resnet/nn/block_calls.py",
        "(_wants_grad(x, convs, norms) and not torch.jit.is_tracing())",
        "_wants_grad(x, convs, norms)",
        "tests/fusion/test_traced_in_pytorch.py",
    ),
    Mutant(
        "calls on other devices need no checks",
        DISPATCH,
        "t.stride(), t.device)",
        "t.stride())",
        CHECKED,
    ),
    Mutant(
        "calls with other settings need no checks",
        DISPATCH,
        "settings, kinds, metadata)",
        "metadata)",
        CHECKED,
    ),
    Mutant(
        "a call under autocast is one without",
        DISPATCH,
        "        or torch._C._is_any_autocast_enabled()\n",
        "",
        CHECKED,
    ),
    Mutant(
        "momentum reversed",
        "csrc/cpu/training/coefficients.cpp",
        "old + momentum * (now[i] * factor - old)",
        "old + (1 - momentum) * (now[i] * factor - old)",
        "tests/training/test_passes.py",
    ),
    Mutant(
        "weight's gradient without batch norm's scale",
        AUTOGRAD,
        "dweight = (d.to(wide) * scale.view(-1, 1, 1, 1)).to(weight.dtype)",
        "dweight = d.to(weight.dtype)",
        BACKWARD,
    ),
    Mutant(
        "batch-norm weight's gradient without the mean",
        AUTOGRAD,
        "(inner + offset * total)",
        "inner",
        BACKWARD,
    ),
    Mutant(
        "an addition that may broadcast becomes part of a convolution",
        "fused_resnet/inference/lowering.py",
        "if not self._same_shape(pending, other):",
        "if False:",
        LOWERING,
    ),
    Mutant(
        "an addition comes before the ReLU that is in front of it",
        "fused_resnet/inference/lowering.py",
        "return pending.residual is None and not pending.step.activation",
        "return pending.residual is None",
        LOWERING,
    ),
    Mutant(
        "conditions on shapes are not asked",
        "fused_resnet/inference/lowered.py",
        "bool(result) is not conditions[item.output]",
        "False",
        LOWERING,
    ),
    Mutant(
        "what was derived from tensors outlives them",
        "fused_resnet/inference/frozen_module.py",
        "        self.generation += 1\n        self.values = {}",
        "        self.generation += 1",
        LOWERING,
    ),
    Mutant(
        "the running mean is ignored",
        "fused_resnet/nn/group_calls.py",
        '"running_mean": mean,',
        '"running_mean": None if mean is None else mean * 0,',
        SWAP,
    ),
    Mutant(
        "a group of convolution, ReLU and batch norm",
        "fused_resnet/fusion/trace/matching.py",
        "while is_identity(module, node) and len(node.users) == 1:",
        "while is_identity(module, node) or activation_path(module, node):",
        SWAP,
    ),
    Mutant(
        "a group moves behind a write to its input",
        "fused_resnet/fusion/trace/matching.py",
        "aliases.written(node) & read",
        "False",
        ALIASING,
    ),
    Mutant(
        "guards check no attribute",
        "fused_resnet/fusion/trace/codegen.py",
        'f"check_attributes_{index}", self._attributes(attributes), attributes',
        'f"check_attributes_{index}", [], attributes',
        SWAP,
    ),
    Mutant(
        "a batch norm that two groups share is folded",
        "fused_resnet/fusion/trace/generated_forward.py",
        "foldable = paths.foldable",
        "foldable = True",
        SWAP,
    ),
    Mutant(
        "y += x is traced as y + x",
        "fused_resnet/fusion/trace/tracing.py",
        'setattr(_Proxy, f"__i{_name}__",',
        'setattr(_Proxy, f"_i{_name}",',
        ALIASING,
    ),
    Mutant(
        "statistics of processes are merged as if their batches were of one size",
        "fused_resnet/ops/training_sync.py",
        "share = each[:, -1:] / each[:, -1].sum()",
        "share = torch.full_like(each[:, -1:], 1 / len(gathered))",
        "tests/training/test_block_sync_batch_norm.py",
    ),
    Mutant(
        "backward sums over one process only",
        "fused_resnet/ops/training_unit.py",
        "whole = sum_over_processes(layer.group, sum_g, sum_g_xc)",
        "sum_over_processes(layer.group, sum_g, sum_g_xc)",
        "tests/training/test_block_sync_batch_norm.py",
    ),
    Mutant(
        "Winograd's algorithm is forbidden, and runs where nothing learns",
        "fused_resnet/nn/no_grad_block.py",
        "middle.groups, winograd,",
        "middle.groups, True,",
        "tests/training/test_no_grad_block.py",
    ),
    Mutant(
        "a block whose stride is on its first 1x1 runs as if it were on the 3x3",
        "fused_resnet/nn/no_grad_block.py",
        "found != _geometry(middle, length, len(layers) > length)",
        "False",
        "tests/training/test_no_grad_block.py",
    ),
    Mutant(
        "a block in inference runs as one in training",
        "fused_resnet/nn/block_calls.py",
        "(owner.training and not _is_recorded())",
        "not _is_recorded()",
        "tests/training/test_no_grad_block.py",
    ),
]
