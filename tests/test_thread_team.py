"""The thread team's barrier with more threads than processors, where waiting threads sleep."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Four threads on one processor: most waits end in sleep, and a wake-up that is lost hangs.
PROGRAM = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before OpenMP counts the processors
import torch
import fused_resnet as fr

torch.manual_seed(0)
model = fr.freeze(fr.cifar_resnet(20).eval())
x = torch.randn(2, 3, 32, 32)
torch.set_num_threads(1)
expected = model(x)
torch.set_num_threads(4)
for _ in range(50):
    assert torch.equal(model(x), expected)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sets a process's processors")
def test_four_threads_on_one_processor() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
