"""Measures fused_resnet/tuning/defaults.json's table for this machine's instruction set.

``python benchmarks/tuning_defaults.py [--rounds N] [MODEL:BATCH ...]``: the calls of those networks
replace what the file had of them; without any, all of NETWORKS. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import json

import torch

from fused_resnet import _C
from fused_resnet.bench import environment
from fused_resnet.bench.results import save
from fused_resnet.cli._choices import network_calls
from fused_resnet.tuning import defaults as tuning_defaults
from fused_resnet.tuning import processor, tuner

NETWORKS = ("resnet18:1", "resnet50:1", "resnet18:16", "resnet50:16")
ABOUT = (
    "Which backend runs a live conv_bn_add_relu where nothing may be timed, and was not before: "
    "FUSED_RESNET_TUNE=0, torch.use_deterministic_algorithms, the recording of a CUDA graph. "
    "Times are milliseconds, the fastest of some rounds in which the candidates took turns. A "
    "device that has no table runs its own kernels: no GPU has measured one yet."
)
RULE = (
    "An entry counts for a call of the same device, instruction set, dtype, memory format, kernel "
    "size, stride, padding, dilation, groups, residual or none, ReLU or none. Of these the nearest "
    "one is taken: the sum of |log2| of the ratios of images, pixels of each, input channels and "
    f"output channels is least, and at most {tuning_defaults.REACH:g}. Its fastest candidate runs "
    f"if it beats the device's own kernels by {tuner.MARGIN:.0%}; in all other cases those run."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    given = parser.parse_args()
    document = json.loads(tuning_defaults.FILE.read_text())
    isa = tuning_defaults.table_of(_C.build_info()["isa"], "float32")
    calls = document["devices"]["cpu"].get(isa, {}).get("calls", {})
    for network in given.networks:
        name, batch = network.split(":")
        for call, _ in network_calls(name, int(batch), 224, torch.float32):
            if tuning_defaults.read_key(call.key) is None:
                continue  # the table is one of convolutions
            times = tuner.measure(call.op, call.candidates, call.with_numbers(), given.rounds)
            calls[call.key] = {name: round(ms, 4) for name, ms in times.items()}
    document["devices"]["cpu"][isa] = {
        "machine": f"{processor.name()}, {torch.get_num_threads()} threads",
        "versions": environment.versions(),
        "calls": calls,
    }
    document |= {"about": ABOUT, "rule": RULE, "made by": "python benchmarks/tuning_defaults.py"}
    save(tuning_defaults.FILE, document)


if __name__ == "__main__":
    main()
