"""The package opens no connection: not at import, nor while it fuses, times, runs and freezes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__":
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
import torch
import fused_resnet as fr

x = torch.randn(1, 3, 32, 32)
with torch.no_grad():
    fr.fuse(fr.cifar_resnet(20).eval())(x.contiguous(memory_format=torch.channels_last))
    fr.freeze(fr.cifar_resnet(20))(x)
fr.fuse(fr.cifar_resnet(20))(x).sum().backward()
print(fr.report(fr.cifar_resnet(20)).summary())
"""


def test_no_connection_is_opened(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "FUSED_RESNET_TUNE": "1",
        "FUSED_RESNET_CACHE": str(tmp_path / "tuning.json"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "groups fused" in done.stdout
    assert (tmp_path / "tuning.json").exists(), "the tuner has timed something"
