"""The jobs of each step, for a card and, smaller, for a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .children import Job
from .sanitizer import CELLS

ROOT = Path(__file__).resolve().parents[2]
CASES = "fused_resnet.bench.gpu"

#: Processes that compile Triton's kernels during the build, and that check them later.
COMPILERS, CHECKERS = 8, 8

#: Test files that need a step of their own, and the order of the others: what a card alone can show
#: first, and last what first builds the simulator.
RUNTIME = ("test_gpu_runtime.py", "test_gpu_graphs.py")
_LAST = ("test_gpu_sanitizer.py", "test_gpu_backends.py")
_FIRST = ("test_gpu_operations.py", "test_gpu_gradients.py", "test_gpu_networks.py")


class Steps:
    """Makes the jobs of one window.

    Args:
        environment: All variables of their processes.
        rehearse: Whether the simulator and the interpreter stand in for a card.
    """

    def __init__(self, environment: Mapping[str, str], rehearse: bool) -> None:
        self.environment, self.rehearse = dict(environment), rehearse

    def job(self, step: str, name: str, module: str, **more: Any) -> Job:
        """A job of a step.

        Args:
            step: Name of the step.
            name: Name of the job.
            module: Of its cases.
            **more: Its options, or fields of :class:`.children.Job`.
        """
        fields = {key: more.pop(key) for key in ("stub", "nice") if key in more}
        environment = {**self.environment, **more.pop("variables", {})}
        return Job(name, step, module, more, environment, rehearse=self.rehearse, **fields)

    def triton(self) -> list[Job]:
        """What compiles Triton's kernels while the extension is being built."""
        shards = 1 if self.rehearse else COMPILERS
        return [
            self.job("build", f"triton {i + 1}", f"{CASES}.precompile", stub=True, nice=5,
                     shard=i, shards=shards)
            for i in range(shards)
        ]  # fmt: skip

    def inductor(self) -> list[Job]:
        """What compiles the unfused network."""
        return [self.job("build", "inductor", f"{CASES}.precompile_networks", stub=True, nice=5)]

    def machine(self) -> list[Job]:
        """What the card can do at all."""
        return [self.job("machine", "machine", f"{CASES}.machine")]

    def correctness(self) -> list[Job]:
        """One process or more for each backend, and the suite of the tests."""
        jobs = []
        for backend in ("cuda", "triton"):
            shards = 1 if self.rehearse else CHECKERS if backend == "triton" else 2
            jobs += [
                self.job("correctness", f"{backend} {i + 1}", f"{CASES}.check_conv",
                         backend=backend, shard=i, shards=shards)
                for i in range(shards)
            ]  # fmt: skip
            for kind in ("others", "training"):
                jobs.append(
                    self.job("correctness", f"{backend} {kind}", f"{CASES}.check_{kind}",
                             backend=backend)
                )  # fmt: skip
        files = self.suite_files()
        shards = 1 if self.rehearse else 3
        jobs += [
            self.suite("correctness", f"tests {i + 1}", files[i::shards]) for i in range(shards)
        ]
        return jobs

    def suite_files(self) -> list[str]:
        """The files of the suite, in the order in which they are worth running."""
        if self.rehearse:
            return ["tests/conformance/test_bn_add_relu.py"]
        gpu = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_gpu_*.py"))
        gpu = [name for name in gpu if name not in RUNTIME and name not in _LAST[:1]]
        gpu.sort(key=lambda name: (name not in _FIRST, name in _LAST))
        conformance = sorted((ROOT / "tests" / "conformance").glob("test_*.py"))
        files = [f"tests/gpu/{name}" for name in gpu]
        return files[:3] + [str(path.relative_to(ROOT)) for path in conformance] + files[3:]

    def suite(self, step: str, name: str, files: Sequence[str]) -> Job:
        """Test files, each test a row.

        Args:
            step: Name of the step.
            name: Name of the job.
            files: Paths from the root of the repository.
        """
        arguments = ["--backend", "device"]
        if self.rehearse:
            # The simulator in place of the device, and of many tests a few.
            arguments = ["--backend", "simulator", "-k", "no_affine_no_statistics or empty_batch"]
        return self.job(step, name, "gpu_window.suite", files=list(files), arguments=arguments)

    def layers(self) -> list[tuple[float, Job]]:
        """Each with its part of what is left of the step's time."""
        return [
            (0.5, self.job("layers", "inference", f"{CASES}.layers")),
            (0.7, self.job("layers", "training", f"{CASES}.layers_training")),
            (1.0, self.job("layers", "others", f"{CASES}.roofline_layers")),
        ]

    def networks(self) -> list[tuple[float, Job]]:
        """Each with its part of what is left of the step's time. The tuner may time here."""
        tuned = {"FUSED_RESNET_TUNE": "0" if self.rehearse else "1"}
        # On some processors weights of half precision are packed as float32, which no card reads.
        precision = "float32" if self.rehearse else "bfloat16"
        return [
            (
                0.55,
                self.job(
                    "networks",
                    "inference",
                    f"{CASES}.networks",
                    variables=tuned,
                    precision=precision,
                ),
            ),
            (1.0, self.job("networks", "training", f"{CASES}.training", variables=tuned)),
        ]

    def runtime(self) -> list[Job]:
        """Graphs, streams, and tensors of more than 2^31 elements."""
        files = [f"tests/gpu/{name}" for name in RUNTIME]
        if self.rehearse:
            files = ["tests/conformance/test_residual_block.py"]
        return [self.suite("runtime", Path(name).stem, [name]) for name in files]

    def sanitizer(self) -> Sequence[tuple[str, str]]:
        """Tools and backends; each tool and each backend once where neither is a card's."""
        return CELLS[::3] if self.rehearse else CELLS

    def sweep_compilers(self, whats: Sequence[str]) -> list[Job]:
        """What compiles the configurations of a sweep.

        Args:
            whats: The layers, by their names in the roofline.
        """
        shards = 1 if self.rehearse else 12
        return [
            self.job("sweep", f"compile {i + 1}", f"{CASES}.sweep", whats=list(whats),
                     compile_only=True, shard=i, shards=shards)
            for i in range(shards)
        ]  # fmt: skip

    def sweep(self, whats: Sequence[str]) -> Job:
        """What times them.

        Args:
            whats: The layers, by their names in the roofline.
        """
        return self.job("sweep", "time", f"{CASES}.sweep", whats=list(whats))

    def autotune(self) -> Job:
        """``max-autotune`` of the whole network."""
        return self.job("autotune", "max-autotune", f"{CASES}.autotune")
