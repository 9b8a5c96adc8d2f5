"""The program of make gpu: builds for the card, tests and benchmarks it.

python benchmarks/gpu.py [--minutes 10] [--phases build,tests,layers,training,networks] ...

Writes results/gpu-<card>.json and .txt. Needs a GPU, torch for CUDA, nvcc, a C++ compiler,
setuptools and pytest; no network and no virtual environment. Continues after a failure, and writes
the results after each phase. Exit code 0 if nothing failed, 1 if something did, 2 if it could not
start.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

#: The phases in order, with the largest share of the time that each may use. Networks come last and
#: use the remaining time, since compiling them takes long.
PHASES = {"build": 0.4, "tests": 0.35, "layers": 0.15, "training": 0.1, "networks": 1.0}

#: Number of test files at a time: most of their work is float64 on the CPU.
TEST_JOBS = 3


def main() -> int:
    arguments = parse()
    os.chdir(ROOT)
    missing, notes = preflight()
    for note in notes:
        print(f"gpu: {note}", flush=True)
    if missing:
        print(f"gpu: missing: {'; '.join(missing)}", file=sys.stderr)
        return 2
    session = Session(arguments)
    try:
        for name in PHASES:
            if name in arguments.phases:
                session.run(name)
    except KeyboardInterrupt:
        print("gpu: interrupted", file=sys.stderr)
    session.save()
    text = session.format.summary(session.document)
    session.path.with_suffix(".txt").write_text(text)
    print(f"\n{text}\nwritten to {os.path.relpath(session.path)} and .txt")
    return 0 if session.format.passed(session.document) else 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit (default: 10)")
    parser.add_argument(
        "--phases",
        type=lambda text: text.split(","),
        default=list(PHASES),
        help=f"default: {','.join(PHASES)}",
    )
    parser.add_argument("--model", default="resnet50", help="the network whose layers are timed")
    parser.add_argument(
        "--batch", type=int, default=256, help="batch size of the layers (default: 256)"
    )
    parser.add_argument(
        "--precision", default="bfloat16", help="precision of the layers (default: bfloat16)"
    )
    parser.add_argument(
        "--max-autotune",
        action="store_true",
        help="also time torch.compile's max-autotune, which takes minutes",
    )
    parser.add_argument(
        "--tune",
        choices=("0", "1", "exhaustive"),
        default="0",
        help="FUSED_RESNET_TUNE of the benchmarks: 0 (the default) measures this package's CUDA "
        "kernels; otherwise fused networks run the fastest backend, after minutes of timing",
    )
    parser.add_argument("--commit", help="the commit, for a copy without .git")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.phases if name not in PHASES]
    if unknown:
        parser.error(f"--phases: expected some of {','.join(PHASES)}, got {unknown[0]!r}")
    if not arguments.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {arguments.minutes}")
    return arguments


def preflight() -> tuple[list[str], list[str]]:
    """What is missing, and notes on what is optional."""
    missing = [
        f"{name} (pip install '{name}{least}')"
        for name, least in (("torch", ">=2.11"), ("setuptools", ">=77"), ("pytest", ">=8"))
        if version(name) < tuple(map(int, least[2:].split(".")))
    ]
    if missing:
        return missing, []
    import torch

    notes = []
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch, this is {torch.__version__}")
    elif not torch.cuda.is_available():
        missing.append("a GPU: PyTorch sees no CUDA device")
    if toolkit_home() is None:
        missing.append("nvcc with its headers (set CUDA_HOME)")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        missing.append("a C++ compiler (g++, or set CXX)")
    if shutil.which("ninja") is None:
        notes.append("no ninja: the build compiles one file after the other (pip install ninja)")
    if importlib.util.find_spec("torchvision") is None:
        notes.append("no torchvision: the unfused network is this package's, module by module")
    return missing, notes


def version(distribution: str) -> tuple[int, ...]:
    """The first two numbers of its version; empty if it is not installed."""
    try:
        text = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def toolkit_home() -> str | None:
    """The folder of the CUDA toolkit, found as in setup.py."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        places.append(str(Path(nvcc).resolve().parents[1]))
    for place in places:
        if place and Path(place, "bin/nvcc").exists():
            return place
    return None


def results_format() -> ModuleType:
    """The module of the results' format, loaded from its file: the package may not be built."""
    path = ROOT / "fused_resnet" / "bench" / "gpu_results.py"
    spec = importlib.util.spec_from_file_location("gpu_results", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Session:
    """One run: its clock, its document, its phases."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.began = time.monotonic()
        self.seconds = 60 * arguments.minutes
        self.format = results_format()
        self.usable = True
        device = describe_device()
        self.path = arguments.out.resolve() / self.format.file_name(device["name"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "FUSED_RESNET_CUDA": "1"}
        self.environment["TORCH_CUDA_ARCH_LIST"] = device["capability"]
        self.environment["FUSED_RESNET_REQUIRE_GPU"] = "1"
        # Times of earlier runs must not affect what is measured.
        tuning = ROOT / "build" / "gpu-tuning.json"
        tuning.unlink(missing_ok=True)
        os.environ["FUSED_RESNET_CACHE"] = str(tuning)
        os.environ["FUSED_RESNET_TUNE"] = arguments.tune
        home = toolkit_home()
        if home:
            self.environment["CUDA_HOME"] = home
        self.document: dict[str, Any] = {
            "format": self.format.FORMAT,
            "device": device,
            "versions": versions(home),
            "commit": arguments.commit or commit(),
            "command": shlex.join(["python", *sys.argv]),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "tune": arguments.tune,
            "phases": [],
            "layers": [],
            "networks": [],
            "training": [],
        }

    @property
    def remaining(self) -> float:
        """Seconds until the end, with some reserved for writing the results."""
        return self.seconds - (time.monotonic() - self.began) - 3

    def save(self) -> None:
        self.document["seconds"] = time.monotonic() - self.began
        self.format.save(self.path, self.document)

    def run(self, name: str) -> None:
        """One phase, even if earlier ones failed."""
        limit = min(PHASES[name] * self.seconds, self.remaining)
        if limit < 5:
            self.note(name, "skipped", 0.0, "the time was up")
        elif name == "build":
            self.build(limit)
        elif not self.usable:
            self.note(name, "skipped", 0.0, "there is no build that runs here")
        elif name == "tests":
            self.tests(limit)
        else:
            self.bench(name, limit)
        self.save()

    def note(
        self,
        name: str,
        status: str,
        seconds: float,
        summary: str,
        command: str = "",
        log: Sequence[str] = (),
    ) -> None:
        phase = {"name": name, "status": status, "seconds": seconds, "summary": summary}
        self.document["phases"].append({**phase, "command": command, "log": list(log)})
        print(f"gpu: {name}: {status} in {seconds:.0f} s: {summary}", flush=True)

    def build(self, limit: float) -> None:
        """The extension, for this card alone, and in parallel the simulator of the tests."""
        print("gpu: building", flush=True)
        simulator = [sys.executable, "tests/simt/simulator.py", "plain"]
        with ThreadPoolExecutor(1) as pool, ending_all():
            beside = pool.submit(run, simulator, self.environment, limit)
            done = run(
                [sys.executable, "setup.py", "build_ext", "--inplace"], self.environment, limit
            )
            self.note("build", *done.noted(done.last_line()))
            other = beside.result()
        if other.status != "passed":
            self.note("simulator build", *other.noted(other.last_line()))
        check = "import fused_resnet as fr; s = fr.backends()['cuda']; print(s); exit(not s)"
        check_run = run([sys.executable, "-c", check], self.environment, 120)
        self.usable = check_run.status == "passed"
        if not self.usable:
            self.note("import", *check_run.noted(check_run.last_line()))

    def tests(self, limit: float) -> None:
        """Each file in a separate process, since one may leave its CUDA context unusable."""
        print("gpu: testing", flush=True)
        cores = len(os.sched_getaffinity(0))
        environment = {**self.environment, "OMP_NUM_THREADS": str(max(1, cores // TEST_JOBS))}
        # The slowest first, so that none of them runs alone at the end.
        slow = ("networks", "sanitizer", "backends", "conformance", "runtime", "compile")
        tests = ROOT / "tests"
        files = sorted(
            [*(tests / "gpu").glob("test_gpu_*.py"), *(tests / "conformance").glob("test_*.py")],
            key=lambda path: (not any(word in path.stem for word in slow), path.stem),
        )
        end = time.monotonic() + limit

        def one(path: Path) -> tuple[Path, Run]:
            command = [sys.executable, "-m", "pytest", "-q", "-ra", "--tb=short"]
            command += ["-p", "no:cacheprovider", "--backend", "device"]
            command += [str(path.relative_to(ROOT))]
            return path, run(command, environment, max(1.0, end - time.monotonic()))

        with ThreadPoolExecutor(TEST_JOBS) as pool, ending_all():
            for path, done in pool.map(one, files):
                self.note(f"tests: {path.stem}", *done.noted(done.last_line()))

    def bench(self, name: str, limit: float) -> None:
        """Layers, training steps or networks, in child processes."""
        sys.path.insert(0, str(ROOT))
        os.environ["PYTHONPATH"] = os.pathsep.join(
            part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part
        )
        importlib.invalidate_caches()  # the extension is new
        from fused_resnet.bench import gpu_layers, gpu_networks
        from fused_resnet.bench.gpu_session import measure_cells, with_ratios

        a = self.arguments
        target, cells = {
            "layers": ("gpu_layers:run", lambda: gpu_layers.cells(a.model, a.batch, a.precision)),
            "training": ("gpu_networks:run_training", gpu_networks.training_cells),
            "networks": (
                "gpu_networks:run",
                lambda: gpu_networks.cells(max_autotune=a.max_autotune),
            ),
        }[name]
        print(f"gpu: measuring {name}", flush=True)
        began = time.monotonic()
        rows = measure_cells(
            f"fused_resnet.bench.{target}", cells(), seconds=limit, begun=self.show
        )
        self.document[name] = rows if name == "layers" else with_ratios(rows)
        counts: dict[str, int] = {}
        for row in rows:
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        bad = counts.get("failed", 0) + counts.get("wrong", 0)
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        self.note(name, "failed" if bad else "passed", time.monotonic() - began, summary)

    @staticmethod
    def show(cell: dict[str, Any], providers: list[str]) -> None:
        what = cell.get("what") or f"{cell['model']}, batch {cell['batch']}"
        print(f"gpu:   {what}, {cell['precision']}: {', '.join(providers)}", flush=True)


class Run:
    """A command that has exited or was killed."""

    def __init__(self, command: Sequence[str], status: str, seconds: float, output: str) -> None:
        self.command, self.status, self.seconds, self.output = command, status, seconds, output

    def last_line(self) -> str:
        lines = [line.strip("= ") for line in self.output.splitlines() if line.strip("= ")]
        return lines[-1][:200] if lines else "no output"

    def noted(self, summary: str) -> tuple[str, float, str, str, list[str]]:
        """The arguments of Session.note; the log has the names of failures and its last lines."""
        log: list[str] = []
        if self.status != "passed":
            lines = self.output.splitlines()
            failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
            log = [*failures[:60], *lines[-60:]]
        command = ["python" if part == sys.executable else part for part in self.command]
        return self.status, self.seconds, summary, shlex.join(command), log


#: The running commands.
LIVE: set[subprocess.Popen[str]] = set()


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """Kill the commands that threads wait for if the main thread is interrupted."""
    try:
        yield
    except BaseException:
        for process in list(LIVE):
            end(process)
        raise


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(command: Sequence[str], environment: dict[str, str], limit: float) -> Run:
    """Run a command, and kill it at the time limit."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    LIVE.add(process)
    try:
        output, _ = process.communicate(timeout=limit)
        status = "passed" if process.returncode == 0 else "failed"
        if process.returncode < 0:
            output += f"\nended by {signal.Signals(-process.returncode).name}"
    except subprocess.TimeoutExpired:
        end(process)
        output, _ = process.communicate()
        output += f"\nended after {limit:.0f} s"
        status = "timeout"
    except BaseException:
        end(process)
        raise
    finally:
        LIVE.discard(process)
    return Run(command, status, time.monotonic() - began, output)


def describe_device() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "driver": output_of(
            "nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }


def versions(home: str | None) -> dict[str, str | None]:
    import torch

    nvcc = output_of(str(Path(home, "bin", "nvcc")), "--version") if home else None
    triton = importlib.util.find_spec("triton") is not None
    text = (ROOT / "fused_resnet" / "_version.py").read_text()
    return {
        "fused_resnet": text.split('"')[-2],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": str(torch.backends.cudnn.version()),
        "nvcc": nvcc.split("release ")[-1].split(",")[0] if nvcc else None,
        "triton": output_of(sys.executable, "-c", "import triton; print(triton.__version__)")
        if triton
        else None,
    }


def commit() -> str | None:
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def output_of(*command: str) -> str | None:
    """The output of a command on one line; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return " ".join(lines) if done.returncode == 0 and lines else None


if __name__ == "__main__":
    sys.exit(main())
