"""The tuner: what it chooses, what it keeps, and what becomes of it when things go wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CONVS, batch_norm, conv_weight, normal

import fused_resnet as fr
from fused_resnet import ops, reference
from fused_resnet.tuning import cache as tuning_cache
from fused_resnet.tuning import defaults as tuning_defaults
from fused_resnet.tuning import tuner

MACHINE = tuner.machine_of(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "cache" / "tuning.json"))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    monkeypatch.setattr(tuning_cache, "_warned", set())
    tuner.forget()
    yield
    tuner.forget()


def runs_for(seconds: float, value: float = 0.0) -> SimpleNamespace:
    """Operators of which ``op`` takes so long."""

    def op(x):
        time.sleep(seconds)
        return x + value

    return SimpleNamespace(op=op)


def choose(**operators) -> str:
    return tuner.choose("op", "cpu", operators, (torch.zeros(2, 3),))


FAST, SLOW = runs_for(0.0), runs_for(0.05)


# What it chooses


def test_the_faster_one_is_chosen():
    assert choose(cpu=SLOW, library=FAST) == "library"


def test_the_devices_own_kernels_win_a_draw(monkeypatch):
    times = iter([10.0, 9.9] * 3)
    monkeypatch.setattr(tuner, "_clock", lambda call: next(times))
    assert choose(cpu=FAST, library=FAST) == "cpu"


def test_a_call_is_timed_once():
    calls = []
    counted = SimpleNamespace(op=lambda x: calls.append(x))
    choose(cpu=counted, library=SLOW)
    assert len(calls) == 1 + tuner.ROUNDS["1"]
    choose(cpu=counted, library=SLOW)
    tuner.forget()
    choose(cpu=counted, library=SLOW)  # from the file
    assert len(calls) == 1 + tuner.ROUNDS["1"]


def test_another_shape_dtype_or_layout_is_another_call():
    x = torch.zeros(2, 3, 4, 4)
    calls = [x, x[:1], x.double(), x.to(memory_format=torch.channels_last)]
    assert len({tuner.key_of("op", (call,)) for call in calls}) == 4
    assert tuner.key_of("op", (x, 1)) != tuner.key_of("op", (x, 2))


def test_more_rounds_when_exhaustive(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_TUNE", "exhaustive")
    calls = []
    choose(cpu=SimpleNamespace(op=lambda x: calls.append(x)))
    assert len(calls) == 1 + tuner.ROUNDS["exhaustive"]


def test_nothing_is_timed_when_it_may_not_be(monkeypatch):
    never = SimpleNamespace(op=lambda x: pytest.fail("timed"))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    assert choose(cpu=never, library=never) == "cpu"
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(cpu=never, library=never) == "cpu"
    finally:
        torch.use_deterministic_algorithms(False)
    assert not tuning_cache.path().exists()


def test_what_was_timed_is_used_when_nothing_may_be(monkeypatch):
    choose(cpu=SLOW, library=FAST)
    tuner.forget()
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    assert choose(cpu=SLOW, library=FAST) == "library"


def test_a_wrong_setting_is_named(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_TUNE", "yes")
    with pytest.raises(ValueError, match="FUSED_RESNET_TUNE: expected 0, 1 or exhaustive, got 'ye"):
        choose(cpu=FAST)


def test_fakes_are_not_timed():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.zeros(2, 3))
        assert tuner.choose("op", "cpu", {"cpu": FAST, "library": FAST}, (x,)) == "cpu"
    assert not tuning_cache.path().exists()


def test_a_candidate_that_fails_is_dropped_with_a_warning():
    def fails(x):
        raise RuntimeError("no kernel for this shape\nand more")

    broken = SimpleNamespace(op=fails)
    with pytest.warns(UserWarning, match="op: library fails and is left out: no kernel for this s"):
        assert choose(cpu=SLOW, library=broken) == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(cpu=SLOW, library=broken) == "cpu"


# What is decided once


def test_a_decision_is_looked_up_and_not_made_again(monkeypatch):
    candidates = {"cpu": SLOW, "library": FAST}
    x = torch.zeros(2, 3)
    assert tuner.choose("op", "cpu", candidates, (x,)) == "library"
    monkeypatch.setattr(tuner, "timings", lambda *arguments: pytest.fail("asked again"))
    assert tuner.choose("op", "cpu", candidates, (x + 1,)) == "library"


def test_the_environment_is_read_when_a_call_is_first_met(monkeypatch):
    """And anew after forget()."""
    candidates = {"cpu": SLOW, "library": FAST}
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    x = torch.zeros(2, 3)
    assert tuner.choose("op", "cpu", candidates, (x,)) == "cpu"
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    assert tuner.choose("op", "cpu", candidates, (x,)) == "cpu"
    assert tuner.choose("op", "cpu", candidates, (x[:1],)) == "library"
    tuner.forget()
    assert tuner.choose("op", "cpu", candidates, (x,)) == "library"


def test_what_tells_calls_apart_is_as_fine_as_their_names():
    """The fast look-up must not take two calls for one that key_of holds apart."""
    x = torch.zeros(2, 3, 4, 4)
    v = torch.zeros(3)
    calls = [
        (x, None), (x, v), (x, v.double()), (x, v[:2]), (x, x), (x[:1], None), (x.double(), None),
        (x.to(memory_format=torch.channels_last), None), (x[:, :, ::2], None), (x, 1), (x, 1.5),
        (x, (1, 1)), (x, (1, 2)), (x, True), (x[..., :1], None), (v, None), (x[0], None),
    ]  # fmt: skip
    names = {tuner.key_of("op", call) for call in calls}
    assert len(names) == len(calls)
    prints = {(tuner._fingerprint(call), str(call[1:])[:5]) for call in calls}
    assert len(prints) == len(calls)


# The table that is shipped

CONV = (
    "conv_bn_add_relu(1x64x56x56 float32 channels_last, 64x64x3x3 float32 channels_last, None, "
    "64 float32, 64 float32, 64 float32, 64 float32, None, (1, 1), (1, 1), (1, 1), 1, 1e-05, True)"
)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """One entry, of an instruction set of its own."""
    file = tmp_path / "defaults.json"
    some = {"calls": {CONV: {"cpu": 2.0, "library": 1.0}}}
    file.write_text(json.dumps({"devices": {"cpu": {"some": some}, "cuda": {}}}))
    monkeypatch.setattr(tuning_defaults, "FILE", file)
    entries = tuning_defaults._entries
    entries.cache_clear()
    yield
    entries.cache_clear()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"1x64x56x56": "2x64x56x56"}, True),  # twice the pixels
        ({"1x64x56x56": "1x64x40x40"}, True),
        ({"1x64x56x56": "4x64x56x56"}, False),  # four times
        ({"64x64x3x3": "128x64x3x3", "1x64x56x56": "2x64x56x56"}, False),  # twice, twice
        ({"1x64x56x56": "4x64x28x28"}, False),  # as many pixels, in other images
        ({"64x64x3x3": "128x64x3x3"}, True),
        ({"64x64x3x3": "64x64x1x1"}, False),
        ({"float32": "bfloat16"}, False),
        ({"56 float32 channels_last": "56 float32 contiguous"}, False),
        ({"None, (1, 1), (1, 1)": "None, (2, 2), (1, 1)"}, False),
        ({"64 float32, None, (1": "64 float32, 1x64x56x56 float32 channels_last, (1"}, False),
        ({"True": "False"}, False),
        ({"conv_bn_add_relu": "bn_add_relu"}, False),
    ],
    ids=str,
)
def test_the_nearest_entry(table, change, found):
    key = CONV
    for old, new in change.items():
        assert old in key
        key = key.replace(old, new)
    assert bool(tuning_defaults.nearest("cpu", "some", key)) == found
    assert bool(tuning_defaults.nearest("cpu", "some_bf16", key)) == found  # as it is float32
    assert tuning_defaults.nearest("cpu", "another", key) == {}
    assert tuning_defaults.nearest("cuda", "some", key) == {}


def test_a_nearer_entry_wins(table, monkeypatch):
    far, near = CONV.replace("1x64x56x56", "1x64x44x44"), CONV.replace("1x64x56x56", "1x64x54x54")
    entries = [
        (tuning_defaults.read_key(key), {"cpu": ms}) for key, ms in ((near, 1.0), (far, 2.0))
    ]
    for order in (entries, entries[::-1]):
        monkeypatch.setattr(tuning_defaults, "_entries", lambda device, isa, order=order: order)
        assert tuning_defaults.nearest("cpu", "some", CONV) == {"cpu": 1.0}


def test_the_shipped_table_is_what_it_says():
    document = json.loads(tuning_defaults.FILE.read_text())
    assert document["made by"] == "python benchmarks/tuning_defaults.py"
    assert "at most 1." in document["rule"]
    assert document["devices"]["cuda"] == {}
    assert "no GPU has measured" in document["about"]
    assert set(document["devices"]["cpu"]) == {"avx2", "avx512"}
    for isa, table in document["devices"]["cpu"].items():
        for key, times in table["calls"].items():
            assert tuning_defaults.read_key(key) is not None
            assert set(times) == {"cpu", "library"}
            assert tuning_defaults.nearest("cpu", isa, key) == times


@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16", "amx", "avx2"])
def test_a_table_holds_for_what_computes_alike(isa):
    assert tuning_defaults.table_of(isa, "bfloat16") == isa
    assert tuning_defaults.table_of(isa, "float32") == ("avx2" if isa == "avx2" else "avx512")


@pytest.mark.parametrize("off", ["FUSED_RESNET_TUNE=0", "deterministic"])
def test_the_table_decides_where_nothing_is_timed(off, monkeypatch):
    monkeypatch.setattr(tuner, "measure", lambda *arguments: pytest.fail("timed"))
    asked = []

    def nearest(device, isa, key):
        asked.append((device, key))
        return {"cpu": 2.0, "library": 1.0}

    monkeypatch.setattr(tuning_defaults, "nearest", nearest)
    if off == "deterministic":
        torch.use_deterministic_algorithms(True)
    else:
        monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    try:
        assert choose(cpu=FAST, library=FAST) == "library"
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [("cpu", "op(2x3 float32)")]


def test_no_table_for_what_is_empty_or_traced(monkeypatch):
    monkeypatch.setattr(tuning_defaults, "nearest", lambda *arguments: pytest.fail("asked"))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    candidates = {"cpu": FAST, "library": FAST}
    assert tuner.choose("op", "cpu", candidates, (torch.zeros(0, 3, 4, 4),)) == "cpu"

    def call(x):
        assert tuner.choose("op", "cpu", candidates, (x,)) == "cpu"
        return x + 1

    torch.jit.trace(call, torch.zeros(1, 3, 4, 4), check_trace=False)


# The operations


@pytest.mark.parametrize("winner", ["cpu", "library"])
def test_an_operation_runs_on_what_was_chosen(winner, monkeypatch):
    """And is as right whichever it is."""
    case = CONVS[3]
    x = normal(*case.x, dtype=torch.float32).to(memory_format=torch.channels_last)
    w, bn = conv_weight(case, torch.float32), batch_norm(case.k, torch.float32)
    times = {"cpu": 2.0, "library": 2.0, winner: 1.0}
    monkeypatch.setattr(tuner, "measure", lambda *arguments: times)
    ran = []
    from fused_resnet.backends import aten as library

    fused = library._onednn
    monkeypatch.setattr(library, "_onednn", lambda *a: ran.append("library") or fused(*a))
    y = ops.conv_bn_add_relu(x, w, *bn, **case.args)
    assert ran == (["library"] if winner == "library" else [])
    expected = reference.conv_bn_add_relu(x, w, *bn, **case.args)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    with fr.use_backend("cpu"):  # asked for by name: nothing to choose
        ops.conv_bn_add_relu(x, w, *bn, **case.args)
    assert ran == (["library"] if winner == "library" else [])


def test_compiled_code_does_not_time(monkeypatch):
    monkeypatch.setattr(tuner, "measure", lambda *arguments: pytest.fail("timed"))
    model = fr.resnet18(num_classes=4).eval()
    x = normal(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager")(x)


# The file


def read() -> dict:
    return json.loads(tuning_cache.path().read_text())


def test_the_file_can_be_read_by_people():
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


def test_another_machines_entries_are_kept_and_not_believed():
    other = MACHINE.replace("threads", "threads of another card")
    tuning_cache.add(other, {"op(2x3 float32)": {"cpu": 1.0, "library": 2.0}})
    assert choose(cpu=SLOW, library=FAST) == "library"
    assert read()["machines"][other] == {"op(2x3 float32)": {"cpu": 1.0, "library": 2.0}}


def test_choices_of_candidates_that_are_not_there_are_not_believed():
    tuning_cache.add(MACHINE, {"op(2x3 float32)": {"triton": 0.1, "cpu": 1.0, "library": 2.0}})
    assert choose(cpu=FAST, library=FAST) == "cpu"


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    """A file stands where the folder should be: that no one can write to, root included."""
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
fast = SimpleNamespace(op=lambda x: x, own=lambda x: x)
slow = SimpleNamespace(op=lambda x: time.sleep(0.002), own=lambda x: time.sleep(0.002))
for i in range(1, 31):
    for op in ("op", "own"):
        x = torch.zeros(i, 3 if op == "op" else int(sys.argv[1]))
        assert tuner.choose(op, "cpu", {"cpu": slow, "library": fast}, (x,)) == "library"
"""


def writer(width: int, before: str = "") -> subprocess.Popen[bytes]:
    """A process that tunes: 30 calls that all of them meet, and 30 of its own."""
    return subprocess.Popen([sys.executable, "-c", before + WRITER, str(width)])


def kept_by(width: int) -> set[str]:
    sizes = range(1, 31)
    return {f"own({i}x{width} float32)" for i in sizes} | {f"op({i}x3 float32)" for i in sizes}


def one_machine() -> dict[str, dict[str, float]]:
    """Of the only one in the file: the processes' numbers of threads are alike."""
    (entries,) = read()["machines"].values()
    return entries


def test_two_processes_at_once_lose_nothing():
    writers = [writer(width) for width in (5, 7)]
    assert [w.wait(120) for w in writers] == [0, 0]
    entries = one_machine()
    assert set(entries) == kept_by(5) | kept_by(7)
    assert all(set(times) == {"cpu", "library"} for times in entries.values())


KILLED = {
    # The new file half written, or whole and not yet in the old one's place.
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
def test_a_process_that_is_killed_in_mid_write_leaves_a_whole_file(when):
    """That of its third write; and what it left behind does not stop the next one."""
    killed = writer(5, f"import os, signal\nwrites = []\n{KILLED[when]}")
    assert killed.wait(120) == -signal.SIGKILL
    assert set(one_machine()) == {"op(1x3 float32)", "own(1x5 float32)", "op(2x3 float32)"}
    assert list(tuning_cache.path().parent.glob("*.part"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning_cache.load(MACHINE)
    assert writer(7).wait(120) == 0
    assert set(one_machine()) == kept_by(7) | {"own(1x5 float32)"}


def test_what_a_card_is_known_by(monkeypatch):
    """Another card, driver, library, kernel or arithmetic is another machine."""
    card = SimpleNamespace(name="Card", major=9, minor=0, multi_processor_count=132)
    cuda = torch.device("cuda", 0)

    def name() -> str:
        for cached in (tuner._versions, tuner._cuda_machine):
            cached.cache_clear()
        return tuner.machine_of(cuda)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(tuner, "_driver", lambda: "13000")
    monkeypatch.setattr(tuner, "_triton", lambda: "3.6.0")
    changes = [
        (card, "name", "Other"), (card, "minor", 1), (card, "multi_processor_count", 78),
        (tuner, "_driver", lambda: "13010"), (tuner, "_triton", lambda: "3.7.0"),
        (torch.backends.cudnn, "version", lambda: 91100), (torch.version, "cuda", "99.9"),
        (torch, "__version__", "9.9"), (tuner, "KERNELS", tuner.KERNELS + 1),
    ]  # fmt: skip
    found = [name()]
    for owner, attribute, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            found.append(name())
    with torch.backends.cudnn.flags(allow_tf32=not torch.backends.cudnn.allow_tf32):
        found.append(name())
    assert len(set(found)) == len(found)
    name()
    tuner._versions.cache_clear()
    tuner._cuda_machine.cache_clear()


def test_threads_share_what_is_known():
    chosen = []

    def run() -> None:
        chosen.append(choose(cpu=SLOW, library=FAST))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == ["library"] * 4
