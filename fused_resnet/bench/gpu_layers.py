"""The roofline's blocks, timed by PyTorch, by cuDNN and by us, and PyTorch's single operators."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr

from ..backends import reference
from ..backends.availability import use_backend
from ..roofline import Kernel, card_of, kernels
from ..roofline.layers import BlockShape, Conv, Pool
from . import gpu_cells
from .calibration import calibrate, randomise
from .clock import Clock
from .networks import LIMITS, relative_error
from .subject import Subject, UnavailableError

#: Number of images that are checked: a float64 convolution of a whole batch takes seconds.
CHECKED = 2

Operands = dict[str, Tensor]


def cells(model: str, batch: int, precision: str, size: int = 224) -> list[dict[str, Any]]:
    """One cell for each whole block, and for each operator of PyTorch's but the convolutions.

    Args:
        model: One of :data:`fused_resnet.models.sources.MODELS`.
        batch: Number of images.
        precision: A key of :data:`fused_resnet.bench.gpu_cells.DTYPES`.
        size: Height and width of the images.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for fusion in ("block", "none"):
        for kernel in kernels(model, batch, precision, fusion, size):
            whole = kernel.steps == ("block",)
            single = kernel.steps[0] in ("bn", "relu", "add", "maxpool") and len(kernel.steps) == 1
            if not (whole if fusion == "block" else single):
                continue
            cell = {"model": model, "batch": batch, "precision": precision, "size": size}
            providers = ["eager", "cudnn", "frozen"] if whole else ["eager"]
            cell |= {"fusion": fusion, "what": kernel.what, "providers": providers}
            found.setdefault((fusion, kernel.what), cell)
    return list(found.values())


def run(
    model: str,
    batch: int,
    precision: str,
    size: int,
    fusion: str,
    what: str,
    providers: list[str],
    device: str = "cuda",
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure a cell.

    Args:
        model: One of :data:`fused_resnet.models.sources.MODELS`.
        batch: Number of images.
        precision: A key of :data:`fused_resnet.bench.gpu_cells.DTYPES`.
        size: Height and width of the images.
        fusion: A key of :data:`fused_resnet.roofline.FUSIONS`.
        what: Description of the kernel.
        providers: Names of the providers to measure.
        device: The device.
        rounds: Number of turns of each provider.

    Returns:
        The result of :func:`fused_resnet.bench.gpu_cells.measure`, with complete rows.
    """
    kernel = next(k for k in kernels(model, batch, precision, fusion, size) if k.what == what)
    where, dtype = torch.device(device), gpu_cells.DTYPES[precision]
    card = card_of(torch.cuda.get_device_name(where)) if where.type == "cuda" else None
    # This package's CUDA kernels, also where the tuner finds others faster.
    backend = use_backend("cuda" if where.type == "cuda" else "auto")
    with gpu_cells.settings(precision), torch.no_grad(), backend:
        problem = _problem(model, kernel, batch, dtype, where)
        answer = gpu_cells.measure(
            {name: functools.partial(problem, name) for name in providers},
            Clock(where, cold=True),
            # tf32 has 10 mantissa bits, like float16.
            LIMITS["float16" if precision == "tf32" else precision],
            1e6,
            "us",
            rounds=rounds,
        )
    about = {"model": model, "batch": batch, "precision": precision, "size": size}
    about |= {"fusion": fusion, "what": what}
    about["bound_us"] = None if card is None else kernel.seconds(card, precision) * 1e6
    rows = [{**about, "provider": name, **row} for name, row in answer["rows"].items()]
    return {"rows": rows, "lost": answer["lost"]}


Problem = Callable[[str], Subject]


def _problem(
    model: str, kernel: Kernel, batch: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    layer = kernel.layer
    if isinstance(layer, BlockShape):
        return _block_problem(model, layer, batch, dtype, generator)
    assert isinstance(layer, (Conv, Pool))
    return _step_problem(kernel.steps[0], layer, batch, dtype, generator)


def _map(batch: int, channels: int, size: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    shape = (batch, channels, size, size)
    x = torch.empty(shape, dtype=dtype, device=g.device, memory_format=torch.channels_last)
    return x.normal_(generator=g)


def _conv_operands(conv: Conv, dtype: torch.dtype, g: torch.Generator) -> Operands:
    """A weight that keeps the variance, and a batch norm that is not the identity."""
    shape = (conv.filters, conv.channels // conv.groups, conv.kernel, conv.kernel)
    fan_in = shape[1] * shape[2] * shape[3]

    def normal(*sizes: int, scale: float, mean: float = 0.0) -> Tensor:
        t = torch.randn(sizes, generator=g, device=g.device) * scale + mean
        return t.to(dtype)

    weight = normal(*shape, scale=(2 / fan_in) ** 0.5)
    k = conv.filters
    return {
        "conv_weight": weight.contiguous(memory_format=torch.channels_last),
        "bn_weight": normal(k, scale=0.2, mean=1.0),
        "bn_bias": normal(k, scale=0.3),
        "running_mean": normal(k, scale=0.3),
        "running_var": normal(k, scale=0.2).abs() + 0.8,
    }


def _folded(operands: Operands) -> tuple[Tensor, Tensor]:
    """Scale and shift of the batch norm, in float64."""
    scale = operands["bn_weight"].double() * torch.rsqrt(operands["running_var"].double() + 1e-5)
    return scale, operands["bn_bias"].double() - operands["running_mean"].double() * scale


def _checked(call: Callable[[], Tensor], truth: Tensor) -> Subject:
    return Subject(call, lambda: relative_error(call()[:CHECKED], truth))


def _double(operands: Operands) -> Operands:
    """In float64; of maps the images that are checked."""
    return {
        name: (t[:CHECKED] if name in ("x", "residual") else t).double()
        for name, t in operands.items()
    }


def _step_problem(
    step: str, layer: Conv | Pool, batch: int, dtype: torch.dtype, g: torch.Generator
) -> Problem:
    """A single operator of PyTorch's."""
    if isinstance(layer, Pool):
        x = _map(batch, layer.channels, layer.size, dtype, g)

        def pool(x: Tensor) -> Tensor:
            return F.max_pool2d(x, layer.kernel, layer.stride, layer.padding)

        truth = pool(x[:CHECKED].double())
        return lambda _: _checked(lambda: pool(x), truth)
    operands = _conv_operands(layer, dtype, g)
    operands["x"] = _map(batch, layer.filters, layer.out, dtype, g)
    if step == "add":
        operands["residual"] = torch.empty_like(operands["x"]).normal_(generator=g)
    calls: dict[str, Callable[[Operands], Tensor]] = {
        "bn": lambda o: F.batch_norm(
            o["x"], o["running_mean"], o["running_var"], o["bn_weight"], o["bn_bias"]
        ),
        "relu": lambda o: F.relu(o["x"]),
        "add": lambda o: o["x"] + o["residual"],
    }
    truth = calls[step](_double(operands))
    return lambda _: _checked(lambda: calls[step](operands), truth)


def _geometry(conv: Conv) -> dict[str, int]:
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }


def _cudnn(conv: Conv, operands: Operands, relu: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """cuDNN's fused convolution through PyTorch, the batch norm folded into weight and bias."""
    weight = operands["conv_weight"]
    if weight.device.type != "cuda":
        raise UnavailableError("cuDNN is for CUDA devices")
    scale, shift = _folded(operands)
    folded = (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    folded = folded.contiguous(memory_format=torch.channels_last)
    bias = shift.to(weight.dtype)
    pairs = [[v, v] for v in (conv.stride, conv.padding, conv.dilation)]
    aten = torch.ops.aten

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        if not relu:
            return F.conv2d(x, folded, bias, **_geometry(conv))
        if residual is None:
            return aten.cudnn_convolution_relu(x, folded, bias, *pairs, conv.groups)
        return aten.cudnn_convolution_add_relu(x, folded, residual, 1.0, bias, *pairs, conv.groups)

    return call


@functools.cache
def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(fr, name)()
    randomise(model, torch.Generator().manual_seed(0))
    return model


def _block_problem(
    model: str, block: BlockShape, batch: int, dtype: torch.dtype, g: torch.Generator
) -> Problem:
    """A basic block or bottleneck of a network."""
    first, last = block.convs[0], block.convs[-1]
    x = _map(batch, first.channels, first.size, dtype, g)
    stored = copy.deepcopy(_network(model).get_submodule(block.path))
    stored = stored.to(g.device).to(memory_format=torch.channels_last)
    calibrate(stored, x[:CHECKED].float())
    stored = stored.to(dtype)
    operands = {conv.path: _module_operands(stored, block, conv) for conv in block.all_convs}

    def compose(call: Callable[[Conv, Tensor, Tensor | None, bool], Tensor], x: Tensor) -> Tensor:
        down = block.downsample
        identity = x if down is None else call(down, x, None, False)
        y = x
        for conv in block.convs[:-1]:
            y = call(conv, y, None, True)
        return call(last, y, identity, True)

    def unfused(exact: bool) -> Callable[[Conv, Tensor, Tensor | None, bool], Tensor]:
        def call(conv: Conv, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
            arguments: dict[str, Any] = operands[conv.path]
            if exact:
                arguments = _double(arguments)
            arguments = {**arguments, **_geometry(conv)}
            return reference.conv_bn_add_relu(x, **arguments, residual=residual, relu=relu)

        return call

    truth = compose(unfused(True), x[:CHECKED].double())

    def build(provider: str) -> Subject:
        if provider == "eager":
            eager = unfused(False)
            return _checked(lambda: compose(eager, x), truth)
        if provider == "frozen":
            frozen = fr.freeze(stored)
            return _checked(lambda: frozen(x), truth)
        fused = {
            (conv.path, relu): _cudnn(conv, operands[conv.path], relu)
            for conv in block.all_convs
            for relu in (True, False)
        }
        return _checked(
            lambda: compose(lambda conv, x, r, relu: fused[conv.path, relu](x, r), x), truth
        )

    return build


def _module_operands(module: nn.Module, block: BlockShape, conv: Conv) -> Operands:
    """A convolution's weight and its batch norm, from the block that contains them."""
    name = conv.path.removeprefix(f"{block.path}.")
    norm = "downsample.1" if "downsample" in name else name.replace("conv", "bn")
    bn: Any = module.get_submodule(norm)
    weight: Any = module.get_submodule(name).weight
    return {
        "conv_weight": weight.detach(),
        "bn_weight": bn.weight.detach(),
        "bn_bias": bn.bias.detach(),
        "running_mean": bn.running_mean,
        "running_var": bn.running_var,
    }
