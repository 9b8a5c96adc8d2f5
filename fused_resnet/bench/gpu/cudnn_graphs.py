"""cuDNN's fused graphs of a training step, as a peer and a second truth; never a dependency.

Where ``nvidia-cudnn-frontend`` is installed: scale, bias, ReLU, convolution and the sums of its
statistics as one graph; the data gradient with the mask of the ReLU before the convolution and,
where the frontend has that node, the sums of batch norm's backward; the weight gradient with the
same prologue. Their gradients begin with dz, which is a map of its own in memory, where this
package's make it while they read.

Source: the samples of https://github.com/NVIDIA/cudnn-frontend, ``samples/cpp/convolution`` and
``test/python``.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import UnavailableError, line
from .shapes import Layer
from .training_operands import TrainingOperands

Call = Callable[[], Tensor]


def frontend() -> Any:
    """The module ``cudnn`` of ``nvidia-cudnn-frontend``.

    Raises:
        UnavailableError: It is not installed, or cannot be loaded.
    """
    if importlib.util.find_spec("cudnn") is None:
        raise UnavailableError("nvidia-cudnn-frontend is not installed")
    try:
        return importlib.import_module("cudnn")
    except Exception as error:
        raise UnavailableError(f"nvidia-cudnn-frontend: {line(error)}") from None


@functools.cache
def _handle() -> Any:
    return frontend().create_handle()


def call(layer: Layer, o: TrainingOperands, direction: str) -> Call:
    """A call of the graph of one direction, which returns its map or its weight gradient.

    Args:
        layer: The convolution.
        o: Operands of the convolution.
        direction: ``"forward"``, ``"data gradient"`` or ``"weight gradient"``.

    Raises:
        UnavailableError: No frontend, no GPU, or cuDNN has no engine for the graph.
    """
    cudnn = frontend()
    if o.x.device.type != "cuda":
        raise UnavailableError("cuDNN is for CUDA devices")
    build = {"forward": _forward, "data gradient": _dgrad, "weight gradient": _wgrad}[direction]
    half = o.x.dtype is not torch.float32
    kinds = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}
    io, wide = getattr(cudnn.data_type, kinds[o.x.dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        handle=_handle(),
        io_data_type=io,
        # The engine that also sums takes its statistics from the rounded result.
        intermediate_data_type=io if half and direction == "forward" else wide,
        compute_data_type=wide,
    )
    try:
        pack, result = build(cudnn, graph, layer, o)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except Exception as error:
        # What cuDNN has an engine for depends on its version and on the card.
        raise UnavailableError(f"cuDNN has no such graph: {line(error)}") from None
    workspace = torch.empty(
        max(1, graph.get_workspace_size()), dtype=torch.uint8, device=o.x.device
    )

    def run() -> Tensor:
        stream = torch.cuda.current_stream(o.x.device).cuda_stream
        cudnn.set_stream(handle=_handle(), stream=stream)
        graph.execute(pack, workspace, handle=_handle())
        return result

    return run


def dz_of(o: TrainingOperands) -> Tensor:
    """``a g + b z + c``, rounded to the dtype of the maps.

    Args:
        o: The operands.
    """
    a, b, c = (v.view(-1, 1, 1) for v in (o.a, o.b, o.c))
    return (o.g.float() * a + o.z.float() * b + c).to(o.g.dtype)


def _tensor(graph: Any, name: str, t: Tensor) -> Any:
    return graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=t.dtype)


def _vector(v: Tensor, dtype: torch.dtype) -> Tensor:
    """``(1, C, 1, 1)``, as cuDNN takes vectors; these have 8 significant bits and stay exact."""
    return v.to(dtype).view(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)


def _prologue(graph: Any, o: TrainingOperands, pack: dict[Any, Tensor]) -> Any:
    """``relu(x * scale + shift)``."""
    tensors = {"x": o.x}
    tensors |= {"scale": _vector(o.scale, o.x.dtype), "shift": _vector(o.shift, o.x.dtype)}
    named = {name: _tensor(graph, name, t) for name, t in tensors.items()}
    pack.update({named[name]: t for name, t in tensors.items()})
    scaled = graph.scale(name="scaled", input=named["x"], scale=named["scale"])
    return graph.relu(
        name="relu", input=graph.bias(name="shifted", input=scaled, bias=named["shift"])
    )


def _geometry(layer: Layer) -> dict[str, list[int]]:
    stride, padding, dilation, _ = layer.geometry
    return {"padding": padding, "stride": stride, "dilation": dilation}


def _forward(
    cudnn: Any, graph: Any, layer: Layer, o: TrainingOperands
) -> tuple[dict[Any, Tensor], Tensor]:
    pack: dict[Any, Tensor] = {}
    image = _prologue(graph, o, pack)
    weight = _tensor(graph, "w", o.weight)
    y = graph.conv_fprop(image=image, weight=weight, **_geometry(layer))
    y.set_output(True)
    sums = graph.genstats(name="genstats", input=y)
    for one in sums:
        one.set_output(True).set_data_type(cudnn.data_type.FLOAT)
        pack[one] = torch.empty(1, layer.filters, 1, 1, device=o.x.device)
    pack[weight], pack[y] = o.weight, torch.empty_like(o.g)
    return pack, pack[y]


def _dgrad(
    cudnn: Any, graph: Any, layer: Layer, o: TrainingOperands
) -> tuple[dict[Any, Tensor], Tensor]:
    c = layer.channels
    maps = {"dz": dz_of(o), "w": o.weight, "x": o.x}
    # (x - mean) * invstd * scale + shift: cuDNN knows the chain of a batch norm.
    zero, one = torch.zeros_like(o.scale), torch.ones_like(o.scale)
    vectors = {"mean": zero, "invstd": one, "scale": o.scale, "shift": o.shift}
    operands = maps | {name: _vector(v, torch.float32) for name, v in vectors.items()}
    named = {name: _tensor(graph, name, t) for name, t in operands.items()}
    dx = graph.conv_dgrad(loss=named["dz"], filter=named["w"], **_geometry(layer))
    dx.set_dim(list(o.x.shape)).set_stride(list(o.x.stride()))
    v = graph.add(a=named["x"], b=named["mean"])
    v = graph.mul(a=graph.mul(a=v, b=named["invstd"]), b=named["scale"])
    v = graph.add(a=v, b=named["shift"])
    masked = graph.relu_backward(loss=dx, input=v)
    masked.set_output(True)
    pack = {named[name]: t for name, t in operands.items()}
    pack[masked] = torch.empty_like(o.x)
    if hasattr(type(graph), "dbn_weight"):
        sums = graph.dbn_weight(
            dy=masked, x=named["x"], mean=named["mean"], inv_variance=named["invstd"],
            scale=named["scale"],
        )  # fmt: skip
        for one_sum in sums:
            one_sum.set_output(True).set_data_type(cudnn.data_type.FLOAT)
            pack[one_sum] = torch.empty(1, c, 1, 1, device=o.x.device)
    return pack, pack[masked]


def _wgrad(
    cudnn: Any, graph: Any, layer: Layer, o: TrainingOperands
) -> tuple[dict[Any, Tensor], Tensor]:
    pack: dict[Any, Tensor] = {}
    image = _prologue(graph, o, pack)
    dz = dz_of(o)
    loss = _tensor(graph, "dz", dz)
    dw = graph.conv_wgrad(name="wgrad", image=image, loss=loss, **_geometry(layer))
    dw.set_output(True).set_dim(list(o.weight.shape)).set_stride(list(o.weight.stride()))
    pack[loss], pack[dw] = dz, torch.empty_like(o.weight)
    return pack, pack[dw]
