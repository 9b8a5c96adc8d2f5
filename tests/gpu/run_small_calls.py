"""Makes the small calls; a program of its own, for compute-sanitizer and for the simulator.

python run_small_calls.py device                     each on the GPU, synchronised, results unused
python run_small_calls.py simulator RESULTS.pt        each on the CPU simulator, results kept
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "simt")]

import torch  # noqa: E402
from small_calls import calls  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402


def main() -> None:
    if sys.argv[1] == "simulator":
        import simulator

        # The simulator defines the CUDA kernels' names a second time: never in one process with the
        # device's own.
        torch.ops.load_library(str(simulator.build("plain")))
        operators, device = torch.ops.fused_resnet_simt, "cpu"
    else:
        import fused_resnet  # noqa: F401  (registers the operators)

        operators, device = torch.ops.fused_resnet, "cuda"
    results = []
    for call in calls():
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
    if len(sys.argv) > 2:
        torch.save(results, sys.argv[2])
    print("all calls were made", flush=True)


main()
