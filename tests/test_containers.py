"""Containers: quotas, no home folder, an unknown user, threads, and processes that are started."""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import warm_process

import fused_resnet as fr
from fused_resnet.inference import archive
from fused_resnet.tuning import processor

ROOT = Path(__file__).resolve().parents[1]


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"a/b": "150000 100000"}, 1.5),
        ({"a/b": "max 100000", "a": "300000 100000"}, 3),
        ({"a/b": "400000 100000", "a": "200000 100000"}, 2),
        ({".": "250000 50000"}, 5),  # as a container sees its own group
        ({"a/b": "max 100000"}, math.inf),
        ({"a/b": "nonsense"}, math.inf),
        ({"a/b": "1000 0"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_quota_of_version_2(tmp_path: Path, limits: dict[str, str], expected: float) -> None:
    for path, text in limits.items():
        group(tmp_path / path, cpu_max=text)
    (tmp_path / "self").write_text("0::/a/b\n")
    assert processor.quota(tmp_path, tmp_path / "self") == expected


def test_the_quota_of_version_1(tmp_path: Path) -> None:
    group(tmp_path / "cpu" / "a", cpu_cfs_quota_us="50000\n", cpu_cfs_period_us="100000\n")
    group(tmp_path / "cpu", cpu_cfs_quota_us="-1\n", cpu_cfs_period_us="100000\n")
    (tmp_path / "self").write_text("4:memory:/x\n3:cpu,cpuacct:/a\n0::/\n")
    assert processor.quota(tmp_path, tmp_path / "self") == 0.5
    (tmp_path / "self").write_text("3:cpuset:/a\n")
    assert processor.quota(tmp_path, tmp_path / "self") == math.inf
    assert processor.quota(tmp_path, tmp_path / "missing") == math.inf


def test_threads_follow_the_quota_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    for quota, variable, available, threads in (
        (math.inf, None, 16, 16),
        (2.5, None, 3, 3),
        (0.1, None, 1, 1),
        (math.inf, "4", 16, 4),
        (math.inf, "64", 16, 16),
        (2, "4,2", 2, 2),
        (math.inf, "many", 16, 16),
    ):
        monkeypatch.setattr(processor, "quota", lambda quota=quota: quota)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert (processor.available(), processor.threads()) == (available, threads)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "served.safetensors"
    torch.manual_seed(0)
    archive.write_frozen(path, "cifar_resnet20", fr.cifar_resnet(20).state_dict())
    return path


def test_more_threads_than_the_quota_are_said(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(processor, "quota", lambda: math.inf)
        fr.load_frozen(served)
    monkeypatch.setattr(processor, "quota", lambda: 1.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    with pytest.warns(UserWarning, match=r"has 3 threads, .* a quota of 2 .*OMP_NUM_THREADS=2"):
        fr.load_frozen(served)


NOBODY = """
import os, pwd, sys
def unknown(user): raise KeyError(user)
pwd.getpwuid = unknown
for name in ("HOME", "XDG_CACHE_HOME", "FUSED_RESNET_CACHE", "USER", "LOGNAME"):
    os.environ.pop(name, None)
"""


def test_a_user_without_name_and_home(served: Path) -> None:
    """Everything runs; the tuner says once that its times are not stored."""
    script = NOBODY + (
        "import warnings, torch, fused_resnet as fr\n"
        "from fused_resnet.cli import main\n"
        "x = torch.randn(1, 3, 32, 32)\n"
        "print(fr.load_frozen(sys.argv[1])(x).shape)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for size in (32, 40):\n"
        "        fr.cifar_resnet(20).eval()(torch.randn(1, 3, size, size))\n"
        "print([str(w.message) for w in caught if 'home' in str(w.message)])\n"
        "assert main(['info']) == 0\n"
        "assert main(['info', '--json']) == 0\n"
        "assert main(['tune', 'resnet18', '--size', '32']) == 2\n"
    )
    environment = os.environ | {"FUSED_RESNET_TUNE": "1", "OMP_NUM_THREADS": "1"}
    done = warm_process.run(["-c", script, str(served)], env=environment)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 10])" in done.stdout
    assert len(re.findall("there is no home folder", done.stdout.splitlines()[1])) in (1, 2)
    assert "tune: the times would be lost: there is no home folder" in done.stderr
    assert "Traceback" not in done.stderr


FORK = """
import os, sys, torch, fused_resnet as fr
torch.set_num_threads(2)
model, x = fr.load_frozen(sys.argv[1]), torch.randn(4, 3, 32, 32)
expected = model(x)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as DataLoader's workers do; OpenMP's threads don't survive a fork
    os._exit(0 if torch.equal(model(x), expected) else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(model(x), expected)
"""


def test_a_forked_process_with_one_thread(served: Path) -> None:
    warm_process.run(["-c", FORK, str(served)], check=True, timeout=300)


def answer(path: str, results: object) -> None:
    torch.set_num_threads(1)
    x = torch.ones(2, 3, 32, 32)
    results.put(fr.load_frozen(path)(x).tolist())


@pytest.mark.thorough
def test_a_spawned_process_loads_the_file(served: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=answer, args=(str(served), results))
    process.start()
    assert results.get(timeout=300) == fr.load_frozen(served)(torch.ones(2, 3, 32, 32)).tolist()
    process.join()


def test_the_dockerfile_names_what_exists() -> None:
    """No container is built here: its options and files are those of the command and README."""
    text = (ROOT / "examples" / "Dockerfile").read_text()
    assert "USER" not in text  # any user: the example gives a number
    command = re.search(r'CMD \["python", "-c", "(.*)"\]', text, re.DOTALL)[1]
    compile(command.replace("\\\n", ""), "Dockerfile", "exec")
    assert "fr.load_frozen" in command


@pytest.mark.parametrize("value", [[1.0], None, "cat.jpg", 3], ids=lambda v: type(v).__name__)
def test_inputs_that_are_no_tensors(value: object) -> None:
    model = fr.cifar_resnet(20)
    for call in (fr.freeze(model.eval()), model.eval(), model.train()):
        with pytest.raises(TypeError, match=rf"x: expected a Tensor, got {type(value).__name__}$"):
            call(value)


def test_an_array_is_no_tensor() -> None:
    array = pytest.importorskip("numpy", reason="what people give").zeros((1, 3, 32, 32))
    with pytest.raises(TypeError, match="x: expected a Tensor, got ndarray"):
        fr.freeze(fr.cifar_resnet(20).eval())(array)
