"""The examples about serving and about other libraries run as their first lines say."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
import warm_process

import fused_resnet as fr

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MOST_LINES = 60

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="the package is tested without its repository: no examples"
)


def run(name: str, folder: Path, *arguments: str) -> str:
    """What an example prints; small networks, so one thread is enough."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = warm_process.run([str(EXAMPLES / name), *arguments], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_short() -> None:
    files = [*EXAMPLES.rglob("*.py"), *EXAMPLES.rglob("*.cpp")]
    lengths = {path.name: len(path.read_text().splitlines()) for path in files}
    assert lengths
    assert {name: n for name, n in lengths.items() if n >= MOST_LINES} == {}


def test_freeze_ship_load(tmp_path: Path) -> None:
    assert "MiB; class " in run("freeze_ship_load.py", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth", "served.safetensors"]


def test_export_changing_batch(tmp_path: Path) -> None:
    printed = run("export_changing_batch.py", tmp_path).splitlines()
    assert printed == ["1 (1, 10)", "3 (3, 10)", "8 (8, 10)"]


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_cpp(tmp_path: Path) -> None:
    """The lines at the top of serve.cpp, in an empty folder."""
    expected = run("cpp/network.py", tmp_path).strip()
    flags = run("cpp/network.py", tmp_path, "--flags").split()
    program = [*flags, "-o", str(tmp_path / "serve")]
    subprocess.run(["g++", "-std=c++20", EXAMPLES / "cpp/serve.cpp", *program], check=True)
    # A user's environment without Python's.
    done = subprocess.run(
        [tmp_path / "serve", "network.pt2"],
        cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"batch 1: {expected}", f"batch 3: {expected}"]


def test_timm_features(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    first, *maps = run("timm_features.py", tmp_path).splitlines()
    assert first.startswith("20 groups fused"), first
    assert maps[-1] == "512 channels: (2, 512, 2, 2)"


def test_transformers_resnet(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    first, last = run("transformers_resnet.py", tmp_path).splitlines()
    assert first.startswith("20 groups fused"), first
    assert last.startswith("ImageClassifierOutputWithNoAttention: ")


def test_torchvision_detection(tmp_path: Path) -> None:
    first, *levels, last = run("torchvision_detection.py", tmp_path).splitlines()
    assert first.startswith("53 groups fused"), first
    assert len(levels) == 5
    assert last.startswith("2 images")


@pytest.fixture
def serve_fastapi() -> ModuleType:
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("httpx", reason="httpx is not installed, which fastapi's TestClient needs")
    spec = importlib.util.spec_from_file_location("serve_fastapi", EXAMPLES / "serve_fastapi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_serve_fastapi(
    serve_fastapi: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients at the same time have the answers of the eager network, and share batches."""
    import torchvision
    from fastapi.testclient import TestClient

    eager = torchvision.models.resnet18(num_classes=10).eval()
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    labels = [f"class {i}" for i in range(10)]
    served = tmp_path / "served.safetensors"
    fr.save_frozen(eager, served, labels=labels, transform=transform)

    sizes: list[int] = []

    class Recording(serve_fastapi.Batcher):  # type: ignore[name-defined]
        def __init__(self, model: torch.nn.Module) -> None:
            model.register_forward_pre_hook(self.record)
            super().__init__(model)

        def record(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            """The first batch waits until the other requests have come."""
            sizes.append(len(inputs[0]))
            end = time.monotonic() + 120
            while sum(sizes) + self.waiting.qsize() < len(bodies) and time.monotonic() < end:
                time.sleep(0.01)

    monkeypatch.setattr(serve_fastapi, "Batcher", Recording)
    monkeypatch.setenv("MODEL", str(served))
    images = torch.randint(0, 256, (6, 3, 240, 260), dtype=torch.uint8)
    bodies = [torchvision.io.encode_png(image).numpy().tobytes() for image in images]
    with TestClient(serve_fastapi.create_app()) as client:
        assert client.post("/classify", content=b"no image").status_code == 400
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: client.post("/classify", content=body), bodies))
    with torch.inference_mode():
        expected = eager(torch.stack([transform(image) for image in images])).softmax(1)
    for answer, row in zip(answers, expected, strict=True):
        assert answer.status_code == 200
        assert answer.json()["probability"] == pytest.approx(float(row.max()), rel=1e-3)
        assert row[labels.index(answer.json()["label"])] == pytest.approx(
            float(row.max()), rel=1e-3
        )
    assert sum(sizes) == len(bodies)
    assert len(sizes) == 2, "all requests that wait share the next batch"


def test_notebook(tmp_path: Path) -> None:
    """Its code runs in order, in an empty folder, as one program."""
    cells = json.loads((EXAMPLES / "fusion.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert len(code.splitlines()) < MOST_LINES
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = warm_process.run(["-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "relative error" in done.stdout
