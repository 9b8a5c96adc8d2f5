"""The tuner's decisions: what is timed, what is chosen, and when a call is new."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from candidates import FAST, SLOW, choose
from cases import CONVS, batch_norm, conv_weight, normal

import fused_resnet as fr
from fused_resnet import ops, reference
from fused_resnet.tuning import cache as tuning_cache
from fused_resnet.tuning import tuner


def test_the_faster_one_is_chosen():
    assert choose(cpu=SLOW, library=FAST) == "library"


def test_the_devices_own_kernels_win_a_tie(monkeypatch):
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


def test_nothing_is_timed_when_timing_is_off(monkeypatch):
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


def test_cached_timings_are_used_when_timing_is_off(monkeypatch):
    choose(cpu=SLOW, library=FAST)
    tuner.forget()
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    assert choose(cpu=SLOW, library=FAST) == "library"


def test_what_is_decided_is_logged(caplog, monkeypatch):
    """Timings at INFO, decisions with their source at DEBUG, and neither unless asked for."""
    choose(cpu=SLOW, library=FAST)
    assert not caplog.records
    tuner.forget()
    tuning_cache.path().unlink()
    caplog.set_level("DEBUG", logger="fused_resnet")
    choose(cpu=SLOW, library=FAST)
    timed, decided = caplog.messages
    assert timed.startswith("timed op(2x3 float32): cpu ")
    assert ", library " in timed
    assert decided == "op(2x3 float32) runs on library, by its times"
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    tuner.forget()
    tuning_cache.path().unlink()
    choose(cpu=SLOW, library=FAST)
    assert caplog.messages[2:] == ["op(2x3 float32) runs on cpu, by the default"]
    assert {record.name for record in caplog.records} == {"fused_resnet.tuning.tuner"}


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


def test_a_decision_is_made_once(monkeypatch):
    candidates = {"cpu": SLOW, "library": FAST}
    x = torch.zeros(2, 3)
    assert tuner.choose("op", "cpu", candidates, (x,)) == "library"
    monkeypatch.setattr(tuner, "timings", lambda *arguments: pytest.fail("asked again"))
    assert tuner.choose("op", "cpu", candidates, (x + 1,)) == "library"


def test_the_environment_is_read_at_the_first_call(monkeypatch):
    """It is read again after forget()."""
    candidates = {"cpu": SLOW, "library": FAST}
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    x = torch.zeros(2, 3)
    assert tuner.choose("op", "cpu", candidates, (x,)) == "cpu"
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    assert tuner.choose("op", "cpu", candidates, (x,)) == "cpu"
    assert tuner.choose("op", "cpu", candidates, (x[:1],)) == "library"
    tuner.forget()
    assert tuner.choose("op", "cpu", candidates, (x,)) == "library"


def test_fingerprints_distinguish_calls_as_keys_do():
    """Calls with different keys must have different fingerprints."""
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


@pytest.mark.parametrize("winner", ["cpu", "library"])
def test_an_operation_runs_on_the_chosen_backend(winner, monkeypatch):
    """The result is equally exact with each of them."""
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


def test_a_gpus_name_in_the_cache(monkeypatch):
    """Another GPU, driver, library, kernel or arithmetic is another machine."""
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


def test_threads_share_decisions():
    chosen = []

    def run() -> None:
        chosen.append(choose(cpu=SLOW, library=FAST))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == ["library"] * 4


@pytest.mark.parametrize(
    ("shares", "noisy"),
    [([0.9] * 3, False), ([0.1] * 3 + [0.9] * 3, False), ([0.1] * 9, True)],
    ids=["quiet", "quiet later", "noisy"],
)
def test_a_noisy_measurement_is_not_stored(monkeypatch, shares, noisy):
    """Shares of a processor that the thread had in each round, of which the last is the fastest."""
    clock, rounds = [0.0], iter(range(len(shares)))

    def timed(call):
        at = next(rounds)
        ms = 1 - 0.01 * at
        clock[0] += shares[at] * ms * 1e-3
        return ms

    monkeypatch.setattr(tuner, "QUIET", 0.8)
    monkeypatch.setattr(tuner, "_clock", timed)
    monkeypatch.setattr(tuner.time, "thread_time", lambda: clock[0])
    assert choose(cpu=FAST) == "cpu"
    assert next(rounds, None) is None  # as many rounds as it takes, and no more
    machine = tuner.machine_of(torch.device("cpu"))
    assert bool(tuning_cache.load(machine)) != noisy
