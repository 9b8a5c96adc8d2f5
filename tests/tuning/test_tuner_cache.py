"""The tuner's cache file: its format, damage to it, and processes that write it concurrently."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path

import pytest
import torch
from candidates import FAST, MACHINE, SLOW, choose
from warm_process import WarmProcess

from fused_resnet.tuning import cache as tuning_cache


def read() -> dict:
    return json.loads(tuning_cache.path().read_text())


def test_the_file_is_readable_json():
    choose(cpu=SLOW, library=FAST)
    entries = read()["machines"][MACHINE]
    (key,) = entries
    assert key == "op(2x3 float32)"
    assert entries[key]["cpu"] > entries[key]["library"] > 0
    assert "threads" in MACHINE
    assert torch.__version__ in MACHINE


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 99, "machines": {}}', '{"format": 1, "machines": 3}', "\0"],
)
def test_a_corrupt_file_is_ignored_with_one_warning_and_rewritten(text):
    file = tuning_cache.path()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match="ignored and will be rewritten") as caught:
        assert choose(cpu=SLOW, library=FAST) == "library"
    assert len(caught) == 1
    assert list(read()["machines"]) == [MACHINE]


def test_corrupt_entries_are_ignored():
    good, bad = {"cpu": 2.0, "library": 1.0}, {"cpu": "fast"}
    tuning_cache.add(MACHINE, {"op(2x3 float32)": bad, "op(5 float32)": good, "op(6)": {}})
    assert tuning_cache.load(MACHINE) == {"op(5 float32)": good}
    assert choose(cpu=SLOW, library=FAST) == "library"


def test_another_machines_entries_are_kept_and_not_used():
    other = MACHINE.replace("threads", "threads of another card")
    tuning_cache.add(other, {"op(2x3 float32)": {"cpu": 1.0, "library": 2.0}})
    assert choose(cpu=SLOW, library=FAST) == "library"
    assert read()["machines"][other] == {"op(2x3 float32)": {"cpu": 1.0, "library": 2.0}}


def test_timings_of_missing_candidates_are_not_used():
    tuning_cache.add(MACHINE, {"op(2x3 float32)": {"triton": 0.1, "cpu": 1.0, "library": 2.0}})
    assert choose(cpu=FAST, library=FAST) == "cpu"


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    """The folder's path is a file, so even root cannot create it."""
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "home" / "tuning.json"))
    with pytest.warns(UserWarning, match="timings are not saved"):
        assert choose(cpu=SLOW, library=FAST) == "library"
    assert choose(cpu=SLOW, library=FAST) == "library"  # from memory


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSED_RESNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_cache.path() == tmp_path / "fused_resnet" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning_cache.path() == Path.home() / ".cache" / "fused_resnet" / "tuning.json"


WRITER = """
import sys, time
from types import SimpleNamespace
import torch
from fused_resnet.tuning import tuner
tuner.QUIET = 0  # store also what was timed on a busy machine
fast = SimpleNamespace(op=lambda x: x, own=lambda x: x)
slow = SimpleNamespace(op=lambda x: time.sleep(0.002), own=lambda x: time.sleep(0.002))
for i in range(1, 31):
    for op in ("op", "own"):
        x = torch.zeros(i, 3 if op == "op" else int(sys.argv[1]))
        assert tuner.choose(op, "cpu", {"cpu": slow, "library": fast}, (x,)) == "library"
"""


def writer(width: int, before: str = "") -> WarmProcess:
    """A process that tunes 30 calls that all writers have, and 30 of its own."""
    return WarmProcess(["-c", before + WRITER, str(width)], stdout=1, stderr=2)


def kept_by(width: int) -> set[str]:
    sizes = range(1, 31)
    return {f"own({i}x{width} float32)" for i in sizes} | {f"op({i}x3 float32)" for i in sizes}


def one_machine() -> dict[str, dict[str, float]]:
    """The entries of the one machine in the file: all processes have as many threads."""
    (entries,) = read()["machines"].values()
    return entries


def test_two_concurrent_processes_lose_no_entries():
    writers = [writer(width) for width in (5, 7)]
    assert [w.wait(120) for w in writers] == [0, 0]
    entries = one_machine()
    assert set(entries) == kept_by(5) | kept_by(7)
    assert all(set(times) == {"cpu", "library"} for times in entries.values())


KILLED = {
    # The new file is half written, or complete but not yet renamed.
    "while it writes": """
import json
def dump(document, part, **options):
    text = json.dumps(document)
    part.write(text if writes.append(1) or len(writes) < 4 else text[: len(text) // 2])
    if len(writes) == 4:
        part.flush()
        os.kill(os.getpid(), signal.SIGKILL)
json.dump = dump
""",
    "before it replaces": """
replace = os.replace
def replaced(*names):
    if writes.append(1) or len(writes) < 4:
        return replace(*names)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replaced
""",
}


@pytest.mark.parametrize("when", KILLED)
def test_a_process_killed_while_writing_leaves_the_old_file(when):
    """The file of its third write; its temporary file does not disturb the next process."""
    killed = writer(5, f"import os, signal\nwrites = []\n{KILLED[when]}")
    assert killed.wait(120) == -signal.SIGKILL
    assert set(one_machine()) == {"op(1x3 float32)", "own(1x5 float32)", "op(2x3 float32)"}
    assert list(tuning_cache.path().parent.glob("*.part"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning_cache.load(MACHINE)
    assert writer(7).wait(120) == 0
    assert set(one_machine()) == kept_by(7) | {"own(1x5 float32)"}
