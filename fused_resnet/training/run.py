"""A run: its epochs, what is written after each, and how it goes on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models.optional import library
from . import batches, checkpoint, network, optim, recipe, seeds
from .data import Data, load
from .engine import Engine, started
from .errors import DivergedError, TrainingError
from .report import Reporter, Silent
from .settings import FREE, Settings, from_mapping
from .steps import Inputs, Sums, diverged, train_step, validate
from .writers import Writers

#: Steps between two looks at the loss where looking waits for a device or for other processes.
LOOK_EVERY = 20


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        history: For each epoch its number ``epoch``, the number ``step`` of steps so far, ``lr``,
            ``train_loss``, ``train_accuracy``, ``val_loss``, ``val_accuracy``, ``seconds`` and
            ``images_per_s``. Training numbers are of the augmented images, while they were learnt.
        best_accuracy: The best ``val_accuracy``.
        weights: The file with the weights of the epoch that had it.
        classes: Names of the classes.
    """

    history: list[dict[str, Any]]
    best_accuracy: float
    weights: Path
    classes: list[str]


def train(settings: Settings, reporter: Reporter | None = None) -> Result:
    """Train a network, or go on with a run that was interrupted.

    ``settings.out`` gets ``metrics.jsonl`` (a line for each epoch), ``curves.png``,
    ``recipe.yaml``, ``best.safetensors``, ``last`` (the checkpoint) and, if TensorBoard is
    installed, its events. A resumed run ends with the same bits as one that was not interrupted,
    with the same settings and number of processes, on the same machine.

    Args:
        settings: What to train, on which data, and how.
        reporter: Told what happens; None for silence.

    Raises:
        TrainingError: The run can't start or go on; the message is one line.
        UnknownNetworkError: There is no such network.
        MissingPackageError: A package is not installed; the extra ``train`` has all.
    """
    with started(settings) as engine:
        reporter = reporter if reporter is not None and engine.first else Silent()
        try:
            return Run(settings, engine, reporter).go()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                "a process that reads images died, perhaps for want of memory; --resume goes on "
                "from the last checkpoint, and fewer --workers need less"
            ) from None
        finally:
            reporter.close()


class Run:
    """The state of a run in one process.

    Args:
        settings: Settings of the run.
        engine: Device, dtype and processes of the run.
        reporter: Told what happens.

    Attributes:
        out: Folder of the run.
        last: File of the last checkpoint.
        data: Training and validation images, and what is known of them.
        steps_per_epoch: Steps of an epoch.
        model: The network.
        stepped: What a training step calls: the network, compiled and distributed if asked.
        optimizer: Optimizer of the network's parameters.
        scheduler: Learning rate of each step.
        average: Moving average of the network; None for none.
        inputs: Makes the network's input from a batch.
        epoch: Epochs that are done.
        step: Steps of the current epoch that are done.
        seconds: Time of these steps.
        history: An entry of metrics for each epoch that is done.
        sums: Loss and accuracy of the current epoch so far.
        writers: Writes the run's files; None but in the first process.
    """

    def __init__(self, settings: Settings, engine: Engine, reporter: Reporter) -> None:
        self.settings, self.engine, self.reporter = settings, engine, reporter
        self.out = Path(settings.out)
        self.last = self.out / "last"
        found = self._checkpoint()
        seeds.start(settings.seed)
        self.data: Data = load(settings)
        self.steps_per_epoch = len(self.data.train) // settings.batch
        if not self.steps_per_epoch:
            raise TrainingError(
                f"batch {settings.batch}: more than the {len(self.data.train)} training images"
            )
        # A resumed run has its weights in the checkpoint.
        first = dataclasses.replace(settings, weights=None) if found else settings
        self.model = network.build(first, len(self.data.classes), engine, reporter.note)
        self.optimizer = optim.optimizer(settings, self.model)
        self.scheduler = optim.schedule(settings, self.optimizer, self.steps_per_epoch)
        self.average = optim.average(settings, self.model)
        self.inputs = Inputs(settings, self.data, engine)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.sums = Sums(engine)
        if found:
            self._restore(found)
        self.stepped = engine.wrapped(self.model, settings.compile)
        self.writers = Writers(self.out, settings) if engine.first else None

    def go(self) -> Result:
        """Train the epochs that are left."""
        s = self.settings
        if self.writers is not None:
            facts = {
                **recipe.environment(),
                "processes": self.engine.world,
                "device": str(self.engine.device),
                "classes": self.data.classes,
                "mean": list(self.data.mean),
                "std": list(self.data.std),
            }
            self.writers.begin(facts, self.history)
        self.reporter.begin(s, self.epoch * self.steps_per_epoch + self.step, self.steps_per_epoch)
        while self.epoch < s.epochs:
            self._epoch()
        best = max(entry["val_accuracy"] for entry in self.history)
        if self.writers is not None:
            self.writers.close()
        return Result(self.history, best, self.out / "best.safetensors", self.data.classes)

    def _epoch(self) -> None:
        s, engine = self.settings, self.engine
        network.set_training(self.model, s)
        sampler = batches.TrainBatches(
            len(self.data.train), s.batch, s.seed, self.epoch, self.step, engine.rank, engine.world
        )
        begun = time.perf_counter() - self.seconds
        for batch in batches.loader(self.data.train, sampler, s.workers):
            images, labels = self.inputs(batch)
            images, labels = self.inputs.mixed_up(images, labels, self.epoch, self.step)
            lr = float(self.scheduler.get_last_lr()[0])
            loss, logits = train_step(s, engine, self.stepped, self.optimizer, images, labels)
            self.scheduler.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.step += 1
            done = self.epoch * self.steps_per_epoch + self.step
            self.sums.add(loss, logits, labels, done)
            save = s.save_every and done % s.save_every == 0 and self.step < self.steps_per_epoch
            if save or self._looks(done):
                self.sums.check(self.last.exists())
                self.seconds = time.perf_counter() - begun
                self.reporter.step(self.epoch, self.step, self.seconds, lr, self.sums)
            if save:
                self._check_weights()
                self._save()
        self.sums.check(self.last.exists())
        self.seconds = time.perf_counter() - begun
        self._end_of_epoch(lr)

    def _looks(self, done: int) -> bool:
        waits = self.engine.world > 1 or self.engine.device.type != "cpu"
        return not waits or done % LOOK_EVERY == 0

    def _check_weights(self, val_loss: float = 0.0) -> None:
        """Stop before weights are written that a step has made worthless, or their loss."""
        floats = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        if not (math.isfinite(val_loss) and all([bool(t.isfinite().all()) for t in floats])):
            step = self.epoch * self.steps_per_epoch + self.step
            raise DivergedError(diverged("the network after", step, self.last.exists()))

    def _end_of_epoch(self, lr: float) -> None:
        s, engine = self.settings, self.engine
        train_loss, train_accuracy = self.sums.means()
        sampler = batches.ValBatches(
            len(self.data.val), max(1, s.batch // engine.world), engine.rank, engine.world
        )
        judged = self.model if self.average is None else self.average
        val_loss, val_accuracy = validate(
            engine, judged, self.inputs, batches.loader(self.data.val, sampler, s.workers)
        )
        self._check_weights(val_loss)
        entry = {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * self.steps_per_epoch,
            "lr": lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": round(self.seconds, 2),
            "images_per_s": round(self.steps_per_epoch * s.batch / self.seconds, 1),
        }
        best = all(val_accuracy > earlier["val_accuracy"] for earlier in self.history)
        self.history.append(entry)
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, Sums(engine)
        if best and engine.first:
            self._write_best()
        self._save()
        if self.writers is not None:
            self.writers.epoch(self.history)
        self.reporter.epoch(entry, best)

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it goes on with."""
        values = dataclasses.asdict(self.settings)
        return {key: value for key, value in values.items() if key not in FREE}

    def _save(self) -> None:
        generators = self.engine.gathered(seeds.state())
        sums = self.engine.gathered(self.sums.values.cpu())
        if not self.engine.first:
            return
        content = {
            "settings": self._identity(),
            "classes": self.data.classes,
            "data": self.data.facts(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "sums": sums,
            "generators": generators,
            "model": _plain(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.engine.scaler.state_dict(),
            "average": None if self.average is None else _plain(self.average),
        }
        checkpoint.write(self.last, content)

    def _checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to resume from, after checking that it is this run's."""
        if not self.settings.resume:
            if self.last.exists():
                raise TrainingError(
                    f"out {str(self.out)!r}: has a run already; --resume (resume=True) goes on "
                    "with it, another --out starts a new one"
                )
            return None
        if not self.last.exists() and (self.out / "recipe.yaml").exists():
            return None  # it was killed before its first checkpoint
        found = checkpoint.read(self.last)
        what = f"checkpoint {str(self.last)!r}"
        for key, value in self._identity().items():
            of_file = found["settings"].get(key)
            if of_file != value and not (key == "drops" and tuple(of_file) == value):
                line = f"{what}: was made with {key} {of_file!r}, got {value!r}"
                if key == "epochs":
                    line += "; the schedule depends on it, so to train longer start a new run with "
                    line += f"--weights {self.out / 'best.safetensors'}"
                raise TrainingError(line)
        world = len(found["generators"])
        if world != self.engine.world:
            raise TrainingError(
                f"{what}: was made by {world} processes, and {self.engine.world} are running"
            )
        return found

    def _restore(self, found: dict[str, Any]) -> None:
        if found["classes"] != self.data.classes:
            raise TrainingError(
                f"checkpoint {str(self.last)!r}: was made on {len(found['classes'])} other classes"
            )
        facts = self.data.facts()
        if found.get("data", facts) != facts:
            raise TrainingError(
                f"checkpoint {str(self.last)!r}: was made on other images than those of data "
                f"{self.settings.data!r}: {found['data']}, got {facts}"
            )
        try:
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(found["average"])
        except (RuntimeError, ValueError, KeyError) as error:
            why = " ".join(str(error).split())
            raise TrainingError(
                f"checkpoint {str(self.last)!r}: is of another network ({why[:200]})"
            ) from None
        self.scheduler.load_state_dict(found["scheduler"])
        self.engine.scaler.load_state_dict(found["scaler"])
        self.epoch, self.step, self.seconds = found["epoch"], found["step"], found["seconds"]
        self.history = found["history"]
        self.sums.values = found["sums"][self.engine.rank].to(self.engine.device)
        seeds.restore(found["generators"][self.engine.rank])

    def _write_best(self) -> None:
        """The weights in plain layout, with what serving them needs to know."""
        judged = self.model if self.average is None else self.average.module
        data = self.data
        # As a frozen file has it.
        prepared = {"resize": data.resize, "crop": data.size, "interpolation": "bilinear"}
        prepared |= {"mean": data.mean, "std": data.std}
        metadata = {
            "network": self.settings.model,
            "classes": json.dumps(data.classes),
            "preprocessing": json.dumps(prepared),
        }
        state = {key: value.contiguous() for key, value in _plain(judged).items()}
        written = library("safetensors.torch", "train").save(state, metadata)
        checkpoint.write_bytes(self.out / "best.safetensors", _sorted_metadata(written))


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in model.state_dict().items()}


def _sorted_metadata(file: bytes) -> bytes:
    """A safetensors file with its metadata in order: equal weights are then equal bytes.

    safetensors writes them in an order that differs from process to process.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return file[:8] + text.ljust(end - 8) + file[end:]


def resumed(out: str | Path) -> Settings:
    """The settings of a run that was interrupted, to go on with it.

    Args:
        out: The folder of the run.

    Raises:
        TrainingError: There is no run in it.
    """
    path = Path(out) / "recipe.yaml"
    try:
        values = recipe.read(str(path))
    except ValueError as error:
        raise TrainingError(f"out {str(out)!r}: there is no run to resume ({error})") from None
    try:
        return from_mapping({**values, "out": str(out), "resume": True})
    except ValueError as error:
        raise TrainingError(f"recipe {str(path)!r}: {error}") from None
