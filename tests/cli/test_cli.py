"""The command ``fused-resnet``: the output of each subcommand, and one line for each error."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_process

import fused_resnet as fr
from fused_resnet.bench import harness
from fused_resnet.bench.networks import random_model
from fused_resnet.bench.results import load
from fused_resnet.cli import _trained, demo, info, main, verify
from fused_resnet.models.optional import install_line
from fused_resnet.verify import Row

Capture = pytest.CaptureFixture[str]


def command(*arguments: str) -> int:
    """The exit code; argparse raises its own."""
    try:
        return main(list(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)


def complaint(capsys: Capture, *arguments: str) -> str:
    """The one line of an error, after checking that there is no other output."""
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fused-resnet")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


# The command itself


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["expected a command", "--help"]),
        (["trian"], ["'trian'", "did you mean train?"]),
        (["info", "--jsn"], ["--jsn"]),
        (["bench", "resnet51"], ["'resnet51'", "did you mean resnet50"]),
        (["bench", "resnet18", "--batch", "1,none"], ["--batch", "'none'", "at least 1"]),
        (["bench", "resnet18", "--batch", "0"], ["--batch", "'0'"]),
        (["bench", "resnet18", "--batch", ","], ["--batch", "nothing"]),
        (["bench", "resnet18", "--dtype", "float8"], ["--dtype", "'float8'", "bfloat16"]),
        (["bench", "resnet18", "--providers", "eager,warp"], ["--providers", "'warp'", "frozen"]),
        (["bench", "resnet18", "--json", "/no/such/folder/f"], ["--json", "'/no/such/folder'"]),
        (["bench", "resnet18", "--plot", "/"], ["--plot", "folder"]),
        (["bench", "resnet18", "--size", "31"], ["--size", "32", "31"]),
        (["verify", "--models", "vgg16"], ["--models", "'vgg16'", "resnet18"]),
        (["verify", "--dtype", "int8"], ["--dtype", "'int8'"]),
        (["verify", "--backend", "tpu"], ["--backend", "'tpu'", "reference"]),
        (["verify", "--backend", "triton"], ["'triton'", "not available"]),
        (["verify", "--json", "/no/such/folder/f"], ["--json", "'/no/such/folder'"]),
        (["freeze", "resnet18"], ["--weights", "--out"]),
        (["freeze", "vgg16", "--weights", "w.pth", "--out", "f"], ["'vgg16'", "resnet18"]),
        (["freeze", "resnet18", "--weights", "w.pth", "--out", "/no/such/f"], ["'/no/such'"]),
        (["serve-check", "none.pt"], ["'none.pt'", "no such file"]),
        (["classify", "photo.jpg"], ["--weights"]),
        (["classify", "--weights", "w.pth"], ["IMAGE"]),
        (["classify", "p.jpg", "f.safetensors"], ["'f.safetensors'", "--model f.safetensors"]),
        (["classify", "w.pth", "p.jpg", "--model", "resnet18"], ["'w.pth'", "--weights w.pth"]),
        (["classify", "resnet18", "p.jpg", "--weights", "w"], ["--model resnet18"]),
        (["train", "resnt50", "--out", "run"], ["'resnt50'", "did you mean resnet50"]),
        (["train", "resnet18", "--data", "cifar10"], ["--out"]),
        (["train", "resnet18", "--out", "run", "--lr", "fast"], ["--lr", "'fast'"]),
        (["demo", "/no/such/photo.jpg"], ["'/no/such/photo.jpg'", "No such file"]),
    ],
    ids=" ".join,
)
def test_mistakes_give_one_line(arguments: list[str], named: list[str], capsys: Capture) -> None:
    line = complaint(capsys, *arguments)
    for text in named:
        assert text in line


@pytest.mark.parametrize(
    "subcommand",
    ["info", "verify", "bench", "train", "story", "freeze", "serve-check", "classify", "demo"],
)
def test_help_says_all(subcommand: str, capsys: Capture) -> None:
    assert command(subcommand, "--help") == 0
    out = capsys.readouterr().out
    assert f"fused-resnet {subcommand}" in out
    assert "--" in out


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fused_resnet", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fr.__version__


def test_a_reader_who_leaves_early_is_no_error() -> None:
    line = f"{sys.executable} -m fused_resnet info --json | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    line = complaint(capsys, "bench", "resnet18", "--size", "32", "--batch", "1")
    assert f"torchvision is not installed; run: {install_line('train')}" in line


def test_an_interruption_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify_operations", interrupted)
    assert command("verify", "--models", "none") == 130
    assert capsys.readouterr().err == "fused-resnet: interrupted\n"


# info


def test_info(capsys: Capture) -> None:
    assert command("info", "--tuning") == 0
    out = capsys.readouterr().out
    for text in (fr.__version__, torch.__version__, fr.build_info()["isa"], "FUSED_RESNET_ISA"):
        assert text in out
    native = fr.build_info()["bfloat16"] == "bfloat16"
    assert ("multiplied as bfloat16" if native else "multiplied as float32") in out
    for name, status in fr.backends().items():
        assert f"backend {name}" in out
        assert status or status.reason[:40] in out


@pytest.mark.parametrize("isa", ["avx512_bf16", "amx_emulated"])
def test_info_calls_no_emulation_an_instruction_set(
    isa: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Unless it is in use, which only FUSED_RESNET_ISA can ask for."""
    supported = ["avx512_bf16", "avx2", "portable", "amx_emulated"]
    build = fr.build_info() | {"isa": isa, "isa_supported": supported}
    monkeypatch.setattr(info, "build_info", lambda: build)
    assert command("info") == 0
    out = " ".join(capsys.readouterr().out.split())
    aside = " (for tests, and slow)" if isa == "amx_emulated" else ""
    assert f"set {isa} in use{aside}, of avx512_bf16, avx2, portable bfloat16 " in out


def test_info_json(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert command("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["fused_resnet"] == fr.__version__
    assert facts["build"]["isa"] in facts["build"]["isa_supported"]
    assert facts["cpu"]["cores"] >= 1
    assert facts["backends"]["reference"] == {"available": True, "reason": ""}
    assert facts["backends"]["triton"]["reason"]
    assert facts["environment"]["OMP_NUM_THREADS"] == "7"


# verify


def test_verify_json(capsys: Capture, tmp_path: Path) -> None:
    assert command("verify", "--models", "none", "--dtype", "float64", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert document["limit"] == 1.5
    assert {row["dtype"] for row in document["rows"]} == {"float64"}
    assert all(row["passed"] for row in document["rows"])
    assert document["environment"]["device"]


def row(passed: bool) -> Row:
    return Row("op", "inference", "float32", "contiguous", "y", 2.0, 1.0, 2.0, 1.5, passed)


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_verify_fails_with_its_rows(
    passed: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setattr(verify, "verify_operations", lambda *a, **k: iter([row(True), row(passed)]))
    path = tmp_path / "rows.json"
    assert command("verify", "--models", "none", "--json", str(path)) == code
    out = capsys.readouterr().out
    assert ("FAIL" in out) == (not passed)
    assert f"2 rows, {1 - passed} failed" in out
    assert json.loads(path.read_text())["passed"] == passed


# bench


@pytest.fixture
def _warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers begin with PyTorch imported; how they start is tested in tests/bench."""
    warm_process.instead_of_popen(monkeypatch, harness)


@pytest.mark.usefixtures("_warm")
def test_bench(capsys: Capture, tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    options = "--size 32 --batch 1,2 --rounds 1 --threads 1 --providers channels_last,frozen"
    files = ["--json", str(rows), "--plot", str(picture)]
    assert command("bench", "resnet18", *options.split(), *files) == 0
    out, err = capsys.readouterr()
    assert "channels_last" in out
    assert "frozen" in out
    # Progress, and warnings of a loaded machine, which the test can't choose.
    assert all(line.startswith("fused-resnet: ") for line in err.splitlines())
    assert "error" not in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = load(rows)
    assert [(r["batch"], r["provider"]) for r in found] == [
        (1, "channels_last"),
        (1, "frozen"),
        (2, "channels_last"),
        (2, "frozen"),
    ]
    for r in found:
        assert r["status"] == "ok"
        assert r["threads"] == 1
        assert r["error"] < 1e-5
        assert r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
        assert {"device", "versions", "commit", "command", "dtype", "size"} <= set(r)


# classify


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        image.resize((128, 150)).save(path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(random_model("resnet18", images).state_dict(), path)
    return path


def test_classify(photo: Path, weights: Path, tmp_path: Path, capsys: Capture) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"thing [{i}]\n" for i in range(1000)))
    arguments = ["--model", "resnet18", "--weights", str(weights), "--labels", str(labels)]
    assert command("classify", str(photo), *arguments) == 0
    out = capsys.readouterr().out
    from PIL import Image
    from torchvision.models import ResNet18_Weights

    model = fr.resnet18(weights=str(weights)).eval()
    with Image.open(photo) as image, torch.inference_mode():
        logits = model(ResNet18_Weights.DEFAULT.transforms()(image)[None])[0]
    top = logits.softmax(0).topk(5)
    for i in top.indices.tolist():
        assert out.count(f"thing [{i}] ") == 2, out
    shown = [float(p) / 100 for p in re.findall(r"([0-9.]+)%", out)]
    for column in (shown[0::2], shown[1::2]):
        torch.testing.assert_close(torch.tensor(column), top.values, atol=1e-6, rtol=1e-5)
    assert "PyTorch" in out
    assert "fused_resnet" in out
    assert "relative difference of the logits" in out


def test_classify_runs_a_frozen_file_in_its_dtype(
    photo: Path, weights: Path, tmp_path: Path, capsys: Capture
) -> None:
    differences = []
    for dtype in ("float32", "bfloat16"):
        file = tmp_path / f"{dtype}.safetensors"
        options = ["--weights", str(weights), "--out", str(file), "--dtype", dtype]
        assert command("freeze", "resnet18", *options) == 0
        assert command("classify", str(photo), "--model", str(file)) == 0
        out = capsys.readouterr().out
        differences += [float(n) for n in re.findall("difference of the logits: ([-0-9.e]+)", out)]
    assert differences[0] < 1e-5 < 5e-4 < differences[1] < 5e-2


def test_classify_names_imagenet_classes(photo: Path, weights: Path, capsys: Capture) -> None:
    assert command("classify", str(photo), "--model", "resnet18", "--weights", str(weights)) == 0
    from torchvision.models import ResNet18_Weights

    names = ResNet18_Weights.DEFAULT.meta["categories"]
    out = capsys.readouterr().out
    assert sum(out.count(f" {name} ") >= 2 for name in names) >= 5


def write_truncated(path: Path, photo: Path) -> None:
    path.write_bytes(photo.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        pytest.param(lambda path, photo: None, "No such file", id="missing"),
        pytest.param(lambda path, photo: path.mkdir(), "directory", id="a folder"),
        pytest.param(lambda path, photo: path.write_text("text"), "not a picture", id="text"),
        pytest.param(lambda path, photo: path.write_bytes(b""), "not a picture", id="empty"),
        pytest.param(write_truncated, "not a picture", id="truncated"),
    ],
)
def test_an_unreadable_image(
    make: Callable[[Path, Path], Any],
    why: str,
    photo: Path,
    weights: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    path = tmp_path / "image.jpg"
    make(path, photo)
    line = complaint(
        capsys, "classify", str(path), "--model", "resnet18", "--weights", str(weights)
    )
    assert repr(str(path)) in line
    assert why in line


class Code:
    """Unpickling this would run code."""

    def __reduce__(self) -> Any:
        return print, ("this must not run",)


@pytest.mark.parametrize("kind", ["missing", "truncated", "code", "another network", "a name"])
def test_unusable_weights(
    kind: str, photo: Path, weights: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "weights.pth"
    model = "resnet18"
    if kind == "truncated":
        path.write_bytes(weights.read_bytes()[:100_000])
    elif kind == "code":
        torch.save({"conv1.weight": Code()}, path)
    elif kind == "another network":
        path, model = weights, "resnet50"
    given = "IMAGENET1K_V9" if kind == "a name" else str(path)
    line = complaint(capsys, "classify", str(photo), "--model", model, "--weights", given)
    assert given in line
    assert "this must not run" not in line


def test_labels_must_fit(photo: Path, weights: Path, tmp_path: Path, capsys: Capture) -> None:
    labels = tmp_path / "labels.txt"
    arguments = ["--model", "resnet18", "--weights", str(weights), "--labels", str(labels)]
    assert "No such file" in complaint(capsys, "classify", str(photo), *arguments)
    labels.write_text("one\ntwo\n")
    line = complaint(capsys, "classify", str(photo), *arguments)
    assert "expected 1000 lines" in line
    assert "got 2" in line
    labels.write_bytes(b"\xff\xfe\xfa")
    assert "not text" in complaint(capsys, "classify", str(photo), *arguments)


# demo


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, no network; the folder where the cache keeps its files."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(_trained, "_unreachable", lambda url: "no network")
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.usefixtures("_warm", "offline")
def test_demo(photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """With the smallest network in ResNet-50's place, so that it takes seconds."""
    monkeypatch.setattr(demo, "MODEL", "resnet18")
    options = ["--providers", "channels_last,frozen", "--batch", "1", "--rounds", "1"]
    assert command("demo", str(photo), *options) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No trained weights: none in" in out
    assert "download.pytorch.org: no network. These are seeded random ones" in out
    assert "same five classes in the same order" in out
    assert "times the speed of channels_last" in out


def test_demo_with_trained_weights(
    photo: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(demo, "MODEL", "resnet18")
    monkeypatch.setattr(demo, "measure", lambda *a, **k: [])
    assert command("demo", str(photo), "--weights", str(weights)) == 0
    out = capsys.readouterr().out
    assert "No trained weights" not in out
    assert "same five classes in the same order" in out


def test_demo_finds_weights_in_the_cache(
    photo: Path, weights: Path, offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(demo, "MODEL", "resnet18")
    monkeypatch.setattr(demo, "measure", lambda *a, **k: [])
    offline.mkdir(parents=True)
    (offline / "resnet18-f37072fd.pth").write_bytes(weights.read_bytes())
    assert command("demo", str(photo)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Weights: ResNet18_Weights.IMAGENET1K_V1, from" in out
    assert "random" not in out


def test_a_server_without_an_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that accepts and says nothing, and one that is not there."""
    monkeypatch.setattr(_trained, "ANSWER", 0.2)
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth"
        assert _trained._unreachable(url) in ("timed out", "no answer")
    assert "refused" in str(_trained._unreachable(url))


@pytest.mark.usefixtures("offline")
def test_demo_fails_when_the_answers_differ(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(demo, "MODEL", "resnet18")

    def fuse(model: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.Sequential(model, torch.nn.Softmin(1))

    monkeypatch.setattr(demo.fr, "fuse", fuse)
    monkeypatch.setattr(demo, "measure", lambda *a, **k: [])
    assert command("demo", str(photo)) == 1
    assert "the five classes differ" in capsys.readouterr().out
