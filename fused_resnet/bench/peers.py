"""The other runtimes: ONNX Runtime, OpenVINO and ncnn, on files of :mod:`.export`.

Each is configured for latency as its manual says: static shapes, and all threads of the process on
one request. Their processes load no PyTorch network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .export import exported, require
from .subject import UnavailableError


class Served(NamedTuple):
    """A loaded network of a runtime.

    Attributes:
        call: Computes the batch's logits.
        threads: Number of threads that the runtime reports.
    """

    call: Callable[[], Tensor]
    threads: int


def onnxruntime(folder: Path, model: str, images: Tensor) -> Served:
    """ONNX Runtime's own CPU kernels, with all graph optimisations; they have no bfloat16.

    Args:
        folder: The problem's folder.
        model: The network's name.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.
    """
    require("onnxruntime", "onnx", "onnxscript")
    _only(images, torch.float32, reason="onnxruntime: its CPU kernels have no")
    import onnxruntime as runtime

    path = exported("onnx", model, folder).with_suffix(".onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    threads = session.get_session_options().intra_op_num_threads
    return Served(lambda: torch.from_numpy(session.run(None, inputs)[0]), threads)


def openvino(folder: Path, model: str, images: Tensor) -> Served:
    """OpenVINO's CPU plugin on the ONNX file; bfloat16 by its inference precision hint.

    Inputs and results are shared with it, not copied.

    Args:
        folder: The problem's folder.
        model: The network's name.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.
    """
    require("openvino", "onnx", "onnxscript")
    hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
    _only(images, *hints, reason="openvino: no such precision on this processor:")
    import openvino as runtime

    path = exported("onnx", model, folder).with_suffix(".onnx")
    core = runtime.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hints[images.dtype],
    }
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != hints[images.dtype]:
        raise UnavailableError(f"openvino: no {hints[images.dtype]} on this processor, but {used}")
    request = compiled.create_infer_request()
    array, result = images.float().numpy(), compiled.output(0)

    def call() -> Tensor:
        answer = request.infer([array], share_inputs=True, share_outputs=True)
        return torch.from_numpy(answer[result])

    return Served(call, compiled.get_property("INFERENCE_NUM_THREADS"))


def ncnn(folder: Path, model: str, images: Tensor) -> Served:
    """ncnn, converted by pnnx, one image at a time: its maps have no batch dimension.

    Its bfloat16 is a storage type; float16 is off, since the comparison is in float32.

    Args:
        folder: The problem's folder.
        model: The network's name.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.
    """
    require("ncnn", "pnnx")
    _only(images, torch.float32, torch.bfloat16, reason="ncnn: this comparison has no")
    import ncnn as runtime
    import numpy as np

    path = exported("ncnn", model, folder)
    net = runtime.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_vulkan_compute = False
    net.opt.use_bf16_storage = images.dtype is torch.bfloat16
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
        setattr(net.opt, name, False)
    if net.load_param(f"{path}.param") or net.load_model(f"{path}.bin"):
        raise RuntimeError("ncnn: can't load what pnnx wrote")
    source, result = net.input_names()[0], net.output_names()[0]
    # Cloned, since a Mat made from an array does not keep it alive.
    maps = [runtime.Mat(image.numpy()).clone() for image in images.float()]

    def call() -> Tensor:
        answers = []
        for image in maps:
            extractor = net.create_extractor()
            extractor.input(source, image)
            answers.append(torch.from_numpy(np.array(extractor.extract(result)[1])))
        return torch.stack(answers)

    return Served(call, net.opt.num_threads)


def _only(images: Tensor, *dtypes: torch.dtype, reason: str) -> None:
    if images.dtype not in dtypes:
        raise UnavailableError(f"{reason} {str(images.dtype).removeprefix('torch.')}")


#: The runtimes by name.
RUNTIMES: dict[str, Callable[[Path, str, Tensor], Served]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ncnn": ncnn,
}
