"""``fused-resnet freeze``, ``load_frozen`` and ``serve-check``: one file to serve from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import warm_process
from networks import image, randomize
from safetensors.torch import save_file
from torch import nn

import fused_resnet as fr
from fused_resnet.cli import main
from fused_resnet.inference import archive as frozen_file
from fused_resnet.models import sources

Capture = pytest.CaptureFixture[str]
F32 = torch.float32


def trained(name: str, classes: int) -> nn.Module:
    """The network of its own library, its last layer cut to ``classes``, with odd statistics."""
    torch.manual_seed(0)
    model = randomize(sources.plain_model(name))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, nn.Linear(module.in_features, classes))
    return model.eval()


def frozen_from(folder: Path, name: str, model: nn.Module, *options: str) -> Path:
    """What the command writes of a checkpoint as a training script leaves it."""
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "weights.pth")
    out = folder / "frozen.safetensors"
    arguments = ["freeze", name, "--weights", str(folder / "weights.pth"), "--out", str(out)]
    assert main([*arguments, *options]) == 0
    return out


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("cifar_resnet20", 10),
        ("torchvision:resnet18", 7),
        ("timm:resnet10t", 5),
        ("hf:microsoft/resnet-18", 4),
    ],
)
def test_a_file_serves_the_networks_answers(
    tmp_path: Path, name: str, classes: int, capsys: Capture
) -> None:
    library = {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}
    if ":" in name:
        pytest.importorskip(library[name.partition(":")[0]], reason="the network's library")
    model = trained(sources.parse(name), classes)
    out = frozen_from(tmp_path, name, model)
    assert f"{classes} classes" in capsys.readouterr().out
    x = image(2, 3, 40, 40, dtype=F32)
    with torch.no_grad():
        truth = model.double()(x.double())
    for dtype, limit in ((None, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 5e-2)):
        loaded = fr.load_frozen(out, dtype)
        assert loaded.frozen_dtype is (dtype or F32)
        answer = loaded(x)
        assert answer.shape == (2, classes)
        assert (answer - truth).norm() < limit * truth.norm()
        assert not any(isinstance(m, nn.BatchNorm2d) for m in loaded.modules())


def test_the_hubs_own_keys_are_taken(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the network's library")
    model = trained("hf:microsoft/resnet-18", 4)
    x = image(1, 3, 40, 40, dtype=F32)
    out = frozen_from(tmp_path, "hf:microsoft/resnet-18", model.model)
    with torch.no_grad():
        torch.testing.assert_close(fr.load_frozen(out)(x), model(x), rtol=1e-4, atol=1e-4)


def test_settings_are_kept(tmp_path: Path) -> None:
    model = trained("cifar_resnet20", 10)
    file = frozen_file.read_frozen(
        frozen_from(tmp_path, "cifar_resnet20", model, "--dtype=float16", "--no-winograd")
    )
    assert file[:5] == ("cifar_resnet20", 10, torch.float16, False, fr.__version__)
    assert all(torch.equal(file.state[k], v) for k, v in model.state_dict().items())
    loaded = fr.load_frozen(tmp_path / "frozen.safetensors", F32)
    assert not any(getattr(m, "winograd", False) for m in loaded.modules())


def test_safetensors_are_read(tmp_path: Path) -> None:
    model, out = trained("cifar_resnet20", 10), tmp_path / "frozen.safetensors"
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    assert main(["freeze", "cifar_resnet20", "--weights", weights, "--out", str(out)]) == 0
    x = image(1, 3, 32, 32, dtype=F32)
    with torch.no_grad():
        torch.testing.assert_close(fr.load_frozen(out)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_a_file_is_for_every_instruction_set(tmp_path: Path, isa: str) -> None:
    if isa not in fr.build_info()["isa_supported"]:
        pytest.skip(f"this machine or build has no {isa} kernels")
    out = frozen_from(tmp_path, "cifar_resnet20", trained("cifar_resnet20", 10))
    x = image(1, 3, 32, 32, dtype=F32)
    torch.save((x, fr.load_frozen(out)(x)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, fused_resnet as fr\n"
        "file, expected, isa = sys.argv[1:]\n"
        "x, y = torch.load(expected)\n"
        "assert fr.build_info()['isa'] == isa\n"
        "error = (fr.load_frozen(file)(x) - y).norm() / y.norm()\n"
        f"assert error == 0 if isa == {fr.build_info()['isa']!r} else error < 1e-5, error\n"
        # Nothing but torch was needed.
        "assert not {'torchvision', 'timm', 'transformers'} & set(sys.modules)\n"
    )
    command = ["-c", script, str(out), str(tmp_path / "expected.pt"), isa]
    warm_process.run(command, check=True, env=os.environ | {"FUSED_RESNET_ISA": isa})


# What can go wrong


def complaint(capsys: Capture, *arguments: str) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fused-resnet: error: ")
    assert err.count("\n") == 1, err
    return err


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch ran",)


def test_files_that_cannot_be_used(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = frozen_from(tmp_path, "cifar_resnet20", trained("cifar_resnet20", 10))
    whole = out.read_bytes()

    def changed(old: bytes, new: bytes) -> None:
        assert len(old) == len(new)
        assert whole.count(old) == 1
        Path("bad.pt").write_bytes(whole.replace(old, new))

    state = torch.load(tmp_path / "weights.pth", weights_only=True)["state_dict"]
    cases = [
        (lambda: Path("bad.pt").write_bytes(whole[: len(whole) // 2]), "truncated or damaged"),
        (lambda: changed(whole[-40:], bytes(40)), "damaged"),
        (lambda: Path("bad.pt").write_text("hello"), "truncated or damaged"),
        (lambda: Path("bad.pt").write_bytes(b""), "truncated or damaged"),
        (lambda: torch.save(state, "bad.pt"), "not a file that fused-resnet freeze"),
        (lambda: torch.save(Code(), "bad.pt"), "not a file that fused-resnet freeze"),
        (lambda: save_file(state, "bad.pt"), "damaged, or not a file that fused-resnet freeze"),
        (lambda: changed(b'format\\": 2', b'format\\": 9'), "has format 9 .*reads format 2"),
        (lambda: changed(b"cifar_resnet20", b"cifar_resnet21"), "damaged"),
        (lambda: Path("bad.pt").unlink(), "there is no such file"),
    ]
    for make, message in cases:
        make()
        with pytest.raises(ValueError, match=f"frozen file 'bad.pt': .*{message}"):
            fr.load_frozen("bad.pt")
        line = complaint(capsys, "serve-check", "bad.pt")
        assert "bad.pt" in line
    assert not Path("ran").exists()


def test_weights_that_cannot_be_used(tmp_path: Path, capsys: Capture) -> None:
    torch.save(trained("cifar_resnet20", 10).state_dict(), tmp_path / "w.pth")
    old = tmp_path / "old.pt"
    old.write_text("as it was")
    for model, weights, named in (
        ("cifar_resnet56", "w.pth", "cifar_resnet56: weights"),
        ("resnet18", "w.pth", "resnet18: weights do not fit"),
        ("cifar_resnet20", "none.pth", "there is no such file"),
        ("cifar_resnet20", "old.pt", "truncated or not a file of weights"),
    ):
        line = complaint(
            capsys, "freeze", model, "--weights", str(tmp_path / weights), "--out", str(old)
        )
        assert named in line
    line = complaint(
        capsys, "freeze", "cifar_resnet20", "--weights", "IMAGENET1K_V2", "--out", str(old)
    )
    assert "no such file; only torchvision's networks have named weights" in line
    assert old.read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.pt", "w.pth"]


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = trained("cifar_resnet20", 10), tmp_path / "frozen.safetensors"
    out.write_text("as it was")

    def half(state: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(frozen_file.safetensors.torch, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        frozen_file.write_frozen(out, "cifar_resnet20", model.state_dict())
    assert out.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [out]


# serve-check

QUICK = ("--batch=2", "--rounds=1", "--threads=1")


def test_serve_check_reports_parity_and_speed(tmp_path: Path, capsys: Capture) -> None:
    out = frozen_from(tmp_path, "cifar_resnet20", trained("cifar_resnet20", 10))
    report = tmp_path / "rows.json"
    assert main(["serve-check", str(out), *QUICK, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "within the limit of 0.0001" in printed
    assert "batch 2: 1 program of 23 steps, micro-batches of 2 images, " in printed
    rows = {row["provider"]: row for row in json.loads(report.read_text())}
    assert set(rows) == {"eager", "channels_last", "file"}
    assert all(row["status"] == "ok" and row["median_ms"] > 0 for row in rows.values())
    assert rows["file"]["error"] < 1e-5
    assert rows["file"]["ratio_to_best_peer"] > 0


def test_serve_check_fails_where_the_answer_is_wrong(tmp_path: Path, capsys: Capture) -> None:
    """In float16 a batch norm with a weight of 1e6 overflows, in eager PyTorch as in ours."""
    model = trained("cifar_resnet20", 10)
    model.bn1.weight.data.fill_(1e6)
    out = frozen_from(tmp_path, "cifar_resnet20", model, "--dtype=float16")
    assert main(["serve-check", str(out), *QUICK]) == 1
    printed = capsys.readouterr()
    assert "beyond the limit of 0.02" in printed.out
    assert "cifar_resnet20, batch 2, file: wrong: relative error" in printed.err
