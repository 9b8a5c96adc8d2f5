"""Makes the small calls; a program of its own, for compute-sanitizer and for the simulator.

python run_small_calls.py device [cuda|triton]     each on the GPU, synchronised, results unused
python run_small_calls.py emulated [cuda|triton]   one of each operator, emulated, results unused
python run_small_calls.py simulator RESULTS.pt     each on the CPU simulator, results kept
python run_small_calls.py launches LAUNCHES.json   the same, but the kernels' launches are kept

Triton's kernels have no calls of a forced plan of CUDA's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE.parents[1], HERE.parent, HERE.parent / "conformance", HERE.parent / "simt")
sys.path[:0] = map(str, FOLDERS)

import torch  # noqa: E402
from small_calls import Call, calls  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402


def main() -> None:
    kept, *path = sys.argv[1:]
    simt = None
    if kept == "emulated":
        emulated(path[0])
        return
    if kept == "device":
        from fused_resnet.ops.registry import OPERATORS

        operators, device = OPERATORS[path[0] if path else "cuda"], "cuda"
        chosen = [call for call in calls() if has(path[0] if path else "cuda", call)]
    else:
        chosen = list(calls())
        import simulator
        from driver import Simt

        # The simulator defines the CUDA kernels' names a second time: never in one process with the
        # device's own.
        simt = Simt(simulator.build("plain"), "plain", 0)
        operators, device = simt.ops, "cpu"
    results = []
    for call in chosen:
        # Seen in the log when a tool stops the process.
        print(f"{call.operator}: {call.label}", flush=True)
        torch.backends.cudnn.allow_tf32 = call.tf32
        arguments = tree_map(
            lambda a: a.to(device) if isinstance(a, Tensor) else a, list(call.arguments)
        )
        result = getattr(operators, call.operator)(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        else:
            results.append(result)
    if kept == "simulator":
        torch.save(results, path[0])
    if kept == "launches":
        Path(path[0]).write_text(json.dumps([asdict(launch) for launch in simt.launches()]))
    print("all calls were made", flush=True)


def has(backend: str, call: Call) -> bool:
    """Whether a backend has the operator."""
    return backend == "cuda" or call.operator != "conv_bn_add_relu_planned"


def emulated(backend: str) -> None:
    """One call of each operator, in half precision, by the simulator or the interpreter."""
    from emulation import operators

    seen = set()
    with operators(backend) as found:
        for call in calls():
            half = all(
                not isinstance(a, Tensor) or a.dim() != 4 or a.dtype is torch.bfloat16
                for a in call.arguments
            )
            if call.operator in seen or not half or not has(backend, call):
                continue
            seen.add(call.operator)
            print(f"{call.operator}: {call.label}", flush=True)
            getattr(found, call.operator)(*call.arguments)
    print("all calls were made", flush=True)


main()
