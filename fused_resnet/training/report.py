"""What a person sees of a run: a bar with numbers on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .settings import Settings
from .steps import Sums


class Reporter(Protocol):
    """Told what happens in a run, in its first process."""

    def begin(self, settings: Settings, done: int, steps: int) -> None:
        """The run starts or goes on.

        Args:
            settings: Settings of the run.
            done: Steps that are done.
            steps: Steps of an epoch.
        """

    def step(self, epoch: int, step: int, seconds: float, lr: float, sums: Sums) -> None:
        """Some steps of an epoch are done.

        Args:
            epoch: Number of the epoch, from 0.
            step: Steps of it that are done.
            seconds: Time that these steps took, in seconds.
            lr: The learning rate.
            sums: Loss and right answers of the epoch so far; reading them waits for the device.
        """

    def epoch(self, entry: dict[str, Any], best: bool) -> None:
        """An epoch is done, validated and saved.

        Args:
            entry: Entry of the epoch in the run's history.
            best: Whether it is the best so far.
        """

    def note(self, text: str) -> None:
        """Something that a person should know.

        Args:
            text: A sentence.
        """

    def close(self) -> None:
        """The run is over, or was interrupted."""


class Silent:
    """Reports nothing."""

    def begin(self, settings: Settings, done: int, steps: int) -> None:
        """Ignore that the run starts or goes on.

        Args:
            settings: Settings of the run.
            done: Steps that are done.
            steps: Steps of an epoch.
        """

    def step(self, epoch: int, step: int, seconds: float, lr: float, sums: Sums) -> None:
        """Ignore that some steps of an epoch are done.

        Args:
            epoch: Number of the epoch, from 0.
            step: Steps of it that are done.
            seconds: Time that these steps took, in seconds.
            lr: The learning rate.
            sums: Loss and right answers of the epoch so far.
        """

    def epoch(self, entry: dict[str, Any], best: bool) -> None:
        """Ignore that an epoch is done.

        Args:
            entry: Entry of the epoch in the run's history.
            best: Whether the epoch is the best so far.
        """

    def note(self, text: str) -> None:
        """Ignore a remark.

        Args:
            text: A sentence.
        """

    def close(self) -> None:
        """Ignore that the run is over."""


class Lines(Silent):
    """A line for each epoch and, in long ones, every half minute.

    Args:
        stream: Stream that the lines are written to.
    """

    #: Seconds between two looks at the numbers of an epoch, which wait for the device.
    every = 30.0

    def __init__(self, stream: TextIO | _Printing) -> None:
        self.stream = stream

    def begin(self, settings: Settings, done: int, steps: int) -> None:
        """One line that says what runs.

        Args:
            settings: Settings of the run.
            done: Steps that are done.
            steps: Steps of an epoch.
        """
        self.settings, self.steps, self.before = settings, steps, done
        self.begun = time.monotonic()
        self.next = self.begun + self.every
        kind = "unfused" if settings.unfused else "fused"
        where = f"after step {done} of {settings.epochs * steps}, " if done else ""
        self.note(
            f"{settings.model} ({kind}, {settings.dtype}) on {settings.data}: {where}"
            f"{settings.epochs} epoch{'s' * (settings.epochs != 1)} of {steps} steps of "
            f"{settings.batch} images"
        )

    def step(self, epoch: int, step: int, seconds: float, lr: float, sums: Sums) -> None:
        """The numbers, if the last ones are long ago.

        Args:
            epoch: Number of the epoch, from 0.
            step: Steps of it that are done.
            seconds: Time that these steps took, in seconds.
            lr: The learning rate.
            sums: Loss and right answers of the epoch so far; reading them waits for the device.
        """
        now = time.monotonic()
        if now >= self.next:
            self.next = now + self.every
            loss, accuracy = _local(sums)
            numbers = (
                f"{step * self.settings.batch / seconds:.0f} images/s, loss {loss:.4f}, accuracy "
                f"{accuracy:.2%}, lr {lr:.4g}, {self._time_left(epoch * self.steps + step)} left"
            )
            self.show(f"epoch {epoch + 1}/{self.settings.epochs}", step, numbers)

    def show(self, epoch: str, step: int, numbers: str) -> None:
        """Show the numbers of an epoch that is not over.

        Args:
            epoch: Label of the epoch, for example ``epoch 1/90``.
            step: Steps of it that are done.
            numbers: Speed, loss, accuracy, rate and time left.
        """
        self.note(f"{epoch}, step {step}/{self.steps}: {numbers}")

    def epoch(self, entry: dict[str, Any], best: bool) -> None:
        """The line of an epoch.

        Args:
            entry: Entry of the epoch in the run's history.
            best: Whether the epoch is the best so far.
        """
        self.next = time.monotonic() + self.every
        self.note(
            f"epoch {entry['epoch']}: training loss {entry['train_loss']:.4f}, accuracy "
            f"{entry['train_accuracy']:.2%}; validation loss {entry['val_loss']:.4f}, accuracy "
            f"{entry['val_accuracy']:.2%}{' (best)' if best else ''}; "
            f"{entry['images_per_s']:.0f} images/s, lr {entry['lr']:.4g}, "
            f"{self._time_left(entry['step'])} left"
        )

    def note(self, text: str) -> None:
        """The text as a line.

        Args:
            text: A sentence.
        """
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def _time_left(self, done: int) -> str:
        total = self.settings.epochs * self.steps
        seconds = (time.monotonic() - self.begun) / max(1, done - self.before)
        rest = round(seconds * (total - done))
        hours, minutes = rest // 3600, rest % 3600 // 60
        return f"{hours}:{minutes:02}:{rest % 60:02}" if hours else f"{minutes}:{rest % 60:02}"


class Bar(Lines):
    """A progress bar of each epoch, and a line for each that is done.

    Args:
        console: A terminal.

    Attributes:
        bar: The bar of the epoch that runs; None between two epochs.
    """

    every = 0.5

    def __init__(self, console: Console) -> None:
        super().__init__(_Printing(console))
        self.console = console
        self.bar: Progress | None = None

    def show(self, epoch: str, step: int, numbers: str) -> None:
        """Move the bar.

        Args:
            epoch: Label of the epoch, for example ``epoch 1/90``.
            step: Steps of it that are done.
            numbers: Speed, loss, accuracy, rate and time left.
        """
        if self.bar is None:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task(epoch, total=self.steps, numbers="")
            self.bar.start()
        self.bar.update(self.task, completed=step, description=epoch, numbers=numbers)

    def epoch(self, entry: dict[str, Any], best: bool) -> None:
        """The line of an epoch in place of its bar.

        Args:
            entry: Entry of the epoch in the run's history.
            best: Whether the epoch is the best so far.
        """
        self.close()
        super().epoch(entry, best)

    def close(self) -> None:
        """Remove the bar, and show the cursor again."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class _Printing:
    """A stream that prints above a console's bar."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, text: str) -> int:
        self.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


def reporter(stream: TextIO) -> Reporter:
    """A bar if the stream is a terminal, else lines.

    Args:
        stream: Stream that progress is printed to.
    """
    return Bar(Console(file=stream)) if stream.isatty() else Lines(stream)


def _local(sums: Sums) -> tuple[float, float]:
    """Loss and accuracy of this process's images; asking the others would have to wait for them."""
    loss, right, count = sums.values.tolist()
    return loss / count, right / count
