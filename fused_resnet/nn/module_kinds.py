"""Predicates on single modules: their kind, and why an operation cannot compute them.

They read the module at every call, so a hook, a replaced method or a replaced module takes effect
from the next call on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _has_any_global_hook

from ..backends import activation as activations
from ..backends.activation import LEAKY_SLOPE, Activation
from ..ops.program_shapes import windows
from .module_settings import conv_setting_reason, has_pool_settings, norm_setting_reason

#: A module for each activation, which stands for it where a forward applies it as a function. It
#: keeps no state, and is no child of any module, so that a trace must record the function in its
#: place: see :func:`activate`.
FUNCTIONS: dict[Activation, nn.Module] = {
    Activation.RELU: nn.ReLU(),
    Activation.LEAKY_RELU: nn.LeakyReLU(LEAKY_SLOPE),
}

#: The classes of modules that are activations of the operations, given the right settings.
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)


def activation_module(activation: Activation) -> nn.Module:
    """A new module, in place, that applies an activation.

    Args:
        activation: Activation that the module applies.
    """
    if activation is Activation.RELU:
        return nn.ReLU(inplace=True)
    if activation is Activation.LEAKY_RELU:
        return nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
    return nn.Identity()


class PackedConv(nn.Module):
    """A packed convolution with its batch norm; :func:`fused_resnet.freeze` puts it in their place.

    Called with a map it computes the convolution and its batch norm.
    """


class FoldedBatchNorm(nn.Identity):
    """Replaces a batch norm that was folded into the :class:`PackedConv` of its convolution.

    It applies the activation that the batch norm contained, if any. It is called where its owner's
    code runs, and not a program.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation that the batch norm contained, if any.

        Args:
            input: Result of the :class:`PackedConv`.
        """
        act = self._modules.get("act")
        return input if act is None else act(input)


#: Methods that decide what PyTorch's layers compute, as PyTorch defines them. Libraries replace
#: them on an instance or on the class itself, for example to pad circularly.
_METHODS: dict[type[nn.Module], tuple[tuple[str, Any], ...]] = {
    cls: tuple((name, getattr(cls, name)) for name in names)
    for cls, names in (
        (nn.Conv2d, ("forward", "_conv_forward")),
        (nn.BatchNorm2d, ("forward", "_check_input_dim")),
        (nn.ReLU, ("forward",)),
        (nn.LeakyReLU, ("forward",)),
        (nn.MaxPool2d, ("forward",)),
        (nn.AvgPool2d, ("forward",)),
        (nn.AdaptiveAvgPool2d, ("forward",)),
        (nn.Flatten, ("forward",)),
        (nn.Dropout, ("forward",)),
        (nn.Identity, ("forward",)),
        (nn.Linear, ("forward",)),
    )
}


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before this package derived another one from it.

    Args:
        module: Any module.
    """
    cls = type(module)
    # The layers of PyTorch are none of those, and asking them for a missing attribute is slow.
    return cls if cls in _METHODS else getattr(cls, "fused_resnet_base", cls)


def tensor_of(module: nn.Module, name: str) -> Any:
    """A parameter or buffer of a module; None where it has it as None.

    The same as ``module.<name>``, which ``nn.Module`` looks for in Python: a call of a small
    operation reads half a dozen, and that would take longer than its kernel.

    Args:
        module: The owner.
        name: The attribute.
    """
    for held in (module._parameters, module._buffers):
        if name in held:
            return held[name]
    return getattr(module, name)


def child_of(module: nn.Module, name: str) -> Any:
    """A child of a module, the same as ``module.<name>``; see :func:`tensor_of`.

    Args:
        module: The owner.
        name: The attribute.
    """
    children = module._modules
    return children[name] if name in children else getattr(module, name)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its class's own methods, such as a hook.

    Args:
        module: Any module.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_replaced_method(module)
    )


def has_replaced_method(module: nn.Module) -> bool:
    """Whether a method that decides what the module computes was replaced.

    On the instance, or for the layers of PyTorch that the operations stand for on the class.

    Args:
        module: Any module.
    """
    members = module.__dict__
    if "forward" in members:
        return True
    cls = original_class(module)
    for name, method in _METHODS.get(cls, ()):
        if name in members or getattr(cls, name) is not method:
            return True
    return False


def is_observed(x: Any) -> bool:
    """Whether a global hook is set or ``torch.fx`` traces, so that modules are called one by one.

    The hook and the trace then see the modules of the unfused network.

    Args:
        x: The input of the call.
    """
    return _has_any_global_hook() or isinstance(x, Proxy)


def conv_reason(conv: nn.Module) -> str:
    """Why a convolution can't be fused; empty when it can.

    Args:
        conv: Module in the place of a convolution.
    """
    cls = original_class(conv)
    if cls is not nn.Conv2d:
        return f"{cls.__name__} is not a plain Conv2d"
    if is_hooked(conv):
        return "a hook or a replaced forward on the Conv2d"
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    setting = conv_setting_reason(conv)
    if setting:
        return setting
    if padding_of(conv) is None:
        return "padding='same' with an even kernel pads one side more than the other"
    return ""


def norm_reason(bn: nn.Module) -> str:
    """Why a batch norm can't be fused; empty when it can.

    Args:
        bn: Module in the place of a batch norm.
    """
    cls = original_class(bn)
    if not is_fusible_norm_class(cls):
        return f"{cls.__name__} is not a plain BatchNorm2d"
    if is_hooked(bn):
        return f"a hook or a replaced forward on the {cls.__name__}"
    if cls is not nn.BatchNorm2d and has_inner_activation(cls):
        drop: nn.Module = bn.drop  # type: ignore[assignment]
        if original_class(drop) is not nn.Identity or is_hooked(drop):
            return f"{original_class(drop).__name__} inside the {cls.__name__}"
    mean, var = bn._buffers.get("running_mean"), bn._buffers.get("running_var")
    if mean is None or var is None:
        mean, var = tensor_of(bn, "running_mean"), tensor_of(bn, "running_var")
        if (mean is None) != (var is None):
            return "one of running_mean and running_var is None"
    if mean is not None and var is not None and (mean.requires_grad or var.requires_grad):
        return "running statistics that require a gradient"
    return norm_setting_reason(eps_of(bn), getattr(bn, "momentum", None))


def has_mode(norm: nn.Module) -> bool:
    """Whether a normalisation is in training or in evaluation mode; frozen classes are in none.

    Args:
        norm: A batch norm, frozen or not.
    """
    return isinstance(norm, _NormBase)


def uses_batch_statistics(norm: Any) -> bool:
    """Whether the next call of a normalisation takes the statistics of its batch.

    Args:
        norm: A batch norm, frozen or not.
    """
    if not has_mode(norm):
        return False
    if norm.training:
        return True
    return tensor_of(norm, "running_mean") is None and tensor_of(norm, "running_var") is None


def running_statistics(norm: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the next call of a normalisation normalises by, or updates by its batch.

    Args:
        norm: A batch norm, frozen or not.

    Returns:
        Running mean, running variance, and the counter of batches where it is to be counted up.

    Source:
        ``torch.nn.modules.batchnorm._BatchNorm.forward``.
    """
    batches = None
    if has_mode(norm) and norm.training:
        if not norm.track_running_stats:
            return None, None, None
        batches = tensor_of(norm, "num_batches_tracked")
    return tensor_of(norm, "running_mean"), tensor_of(norm, "running_var"), batches


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm of any class, fusible or not.

    Args:
        module: Any module.
    """
    is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_batch_norm or is_fusible_norm_class(original_class(module))


# Classes of other libraries are recognised by name: the libraries are optional and not imported
# here.


def is_fusible_norm_class(cls: type[nn.Module]) -> bool:
    """Whether the operations compute the formula of this class.

    Args:
        cls: Class of a module, as :func:`original_class` returns it.
    """
    return cls is nn.BatchNorm2d or has_inner_activation(cls) or _is_frozen_batch_norm(cls)


def has_inner_activation(cls: type[nn.Module]) -> bool:
    """Whether the class is one of timm's batch norms with the children ``drop`` and ``act``.

    Args:
        cls: Class of a module, as :func:`original_class` returns it.
    """
    named = cls.__name__ in ("BatchNormAct2d", "FrozenBatchNormAct2d")
    return named and cls.__module__ == "timm.layers.norm_act"


def _is_frozen_batch_norm(cls: type[nn.Module]) -> bool:
    if not cls.__name__.endswith("FrozenBatchNorm2d"):
        return False
    # Transformers copies the class into each detection model; all have an eps of 1e-5.
    home = cls.__module__
    return home == "torchvision.ops.misc" or home.startswith("transformers.models.")


def eps_of(bn: nn.Module) -> float:
    """The epsilon of a batch norm; the frozen batch norms of transformers don't store theirs.

    Args:
        bn: A batch norm of a class that can be fused.
    """
    return getattr(bn, "eps", 1e-5)


def inner_activation(bn: nn.Module) -> nn.Module | None:
    """The activation that a batch norm contains; None for none.

    Args:
        bn: Module in the place of a batch norm.
    """
    cls = original_class(bn)
    if cls is nn.BatchNorm2d or not has_inner_activation(cls):
        return None
    act = bn._modules.get("act")
    if act is None or (original_class(act) is nn.Identity and not is_hooked(act)):
        return None
    return act


def activation_of(act: nn.Module | None) -> Activation:
    """The activation of the operations that a module is; NONE where it is none of them, or hooked.

    Args:
        act: The module; None for none.
    """
    cls = None if act is None else original_class(act)
    if act is None or cls not in ACTIVATIONS or activation_reason(act):
        return Activation.NONE
    return Activation.LEAKY_RELU if cls is nn.LeakyReLU else Activation.RELU


def activation_reason(act: nn.Module) -> str:
    """Why no operation applies an activation of :data:`ACTIVATIONS`; empty for any other module.

    Args:
        act: Module in the place of an activation.
    """
    if not isinstance(act, ACTIVATIONS):
        return ""
    if is_hooked(act):
        return f"a hook or a replaced forward on the {original_class(act).__name__}"
    if original_class(act) is nn.LeakyReLU and act.negative_slope != LEAKY_SLOPE:
        return f"a LeakyReLU with a slope of {act.negative_slope}; only {LEAKY_SLOPE} is fused"
    return ""


def activate(act: nn.Module | None, y: Tensor) -> Tensor:
    """Apply an activation; None for none.

    Args:
        act: A child of the module that runs, or one of :data:`FUNCTIONS`.
        y: Tensor to activate, of any shape.
    """
    if act is None:
        return y
    for activation, module in FUNCTIONS.items():
        if act is module:
            return activations.activate(y, activation)
    return act(y)


def is_max_pool(pool: nn.Module) -> bool:
    """Whether :func:`fused_resnet.ops.conv_bn_relu_maxpool` computes this max-pool.

    Args:
        pool: Module in the place of a max-pool.
    """
    return (
        isinstance(pool, nn.MaxPool2d)
        and original_class(pool) is nn.MaxPool2d
        and not is_hooked(pool)
        and has_pool_settings(pool)
        and pool.dilation in (1, (1, 1))
        and not pool.ceil_mode
        and not pool.return_indices
    )


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros on each side as ``(height, width)``; None when the two sides differ.

    Args:
        conv: A convolution, whose ``padding`` may be a string.
    """
    if not isinstance(conv.padding, str):
        return conv.padding[0], conv.padding[1]
    if conv.padding == "valid":
        return 0, 0
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if total[0] % 2 or total[1] % 2 else (total[0] // 2, total[1] // 2)


def result_fits(conv: Any, x: Tensor, residual: Tensor) -> bool:
    """Whether a residual has the shape and dtype of the convolution's result.

    PyTorch's addition broadcasts and promotes; the fused operations do neither.

    Args:
        conv: A convolution.
        x: Input of the convolution, ``(N, C, H, W)``.
        residual: The tensor that is added to its result.
    """
    dtype, padding = x.dtype, padding_of(conv)
    if torch._C._is_any_autocast_enabled() and dtype is not torch.float64:
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    shape, given = x.shape, residual.shape
    if residual.dtype is not dtype or len(shape) != 4 or len(given) != 4 or padding is None:
        return False
    rows, columns = windows(shape, conv.kernel_size, conv.stride, padding, conv.dilation)
    return bool(
        given[0] == shape[0]
        and given[1] == conv.out_channels
        and given[2] == rows
        and given[3] == columns
    )
