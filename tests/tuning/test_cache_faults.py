"""A cache file that is hostile, locked or nowhere: one warning, and the forward goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fused_resnet as fr
from fused_resnet.tuning import cache, tuner

MACHINE = "a machine"
TIMES = {"cpu": 2.0, "library": 1.0}


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    tuner.forget()
    yield tmp_path / "tuning.json"
    tuner.forget()


def forward() -> None:
    """A call that the tuner times."""
    x = torch.randn(1, 4, 5, 5)
    vectors = (torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4))
    fr.ops.conv_bn_add_relu(x, torch.randn(4, 4, 1, 1), *vectors)


HOSTILE = {
    "nested too deep": "[" * 100_000,
    "a number of 400 digits": json.dumps(
        {"format": 1, "machines": {MACHINE: {"op": {"cpu": 10**399, "library": 1.0}}}}
    ),
    "no number": '{"format": 1, "machines": {"a machine": {"op": {"cpu": NaN}}}}',
    "a boolean": '{"format": 1, "machines": {"a machine": {"op": {"cpu": true}}}}',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.filterwarnings("ignore:fused_resnet")
def test_hostile_content_is_ignored(file, text):
    file.write_text(text)
    assert cache.load(MACHINE) == {}
    forward()
    assert json.loads(file.read_text())["format"] == 1


@pytest.mark.parametrize("name", ["/", ".", "/dev/full", "nul\0", "x" * 300])
def test_a_path_that_can_hold_no_file(monkeypatch, name):
    if "\0" in name:
        monkeypatch.setattr(cache, "path", lambda: Path(name))  # no environment variable has it
    else:
        monkeypatch.setenv("FUSED_RESNET_CACHE", name)
    with pytest.warns(UserWarning, match="fused_resnet: the tuner"):
        forward()


def test_a_fifo_does_not_block(file):
    os.mkfifo(file)
    with pytest.warns(UserWarning, match="not a regular file"):
        forward()


def test_no_home_folder(monkeypatch):
    monkeypatch.delenv("FUSED_RESNET_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(home))
    with pytest.warns(UserWarning, match="set FUSED_RESNET_CACHE"):
        forward()


HOLDER = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_process_that_keeps_the_lock_costs_a_bounded_wait(file, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    lock = file.parent / f".{file.name}.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.warns(UserWarning, match="another process has locked"):
            cache.add(MACHINE, {"op": TIMES})
    finally:
        holder.kill()
        holder.wait()
    cache.add(MACHINE, {"op": TIMES})
    assert cache.load(MACHINE) == {"op": TIMES}


def test_the_file_is_bounded_and_keeps_the_newest(monkeypatch):
    monkeypatch.setattr(cache, "MOST_CALLS", 10)
    monkeypatch.setattr(cache, "MOST_MACHINES", 2)
    for i in range(15):
        cache.add(MACHINE, {f"op{i}": TIMES})
    assert list(cache.load(MACHINE)) == [f"op{i}" for i in range(5, 15)]
    for name in ("second", "third"):
        cache.add(name, {"op": TIMES})
    assert cache.load(MACHINE) == {}
    assert cache.load("second") == cache.load("third") == {"op": TIMES}


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_writing_never_replaces_what_is_no_regular_file(tmp_path, kind):
    path = tmp_path / "fifo" if kind == "fifo" else Path("/dev/null")
    if kind == "fifo":
        os.mkfifo(path)
    before = path.stat().st_mode
    with pytest.raises(OSError, match="not a regular file"), cache.replacing(path):
        pass
    assert path.stat().st_mode == before


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with cache.replacing(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_parts_of_killed_processes_are_removed_after_a_while(tmp_path):
    old, fresh = tmp_path / "f.0123abcd.part", tmp_path / "f.4567abcd.part"
    for part in (old, fresh):
        part.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    with cache.replacing(tmp_path / "f") as part:
        part.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", fresh.name]
