"""How the seconds of a window are divided among its steps.

Each step has a share. When it starts, the time that is left, less a reserve for the last files, is
divided among it and the steps after it in proportion to their shares: a step that ends early leaves
its time to all that follow, and one that runs over takes it from them, never from the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Seconds of a whole window: a command may run 600, and the machine needs some of them.
LIMIT = 560.0

#: Seconds at the end for the summary and the results file.
RESERVE = 10.0


@dataclass(frozen=True)
class Share:
    """A step's part of the window.

    Attributes:
        step: Name of the step.
        seconds: Planned duration.
        most: The largest multiple of ``seconds`` that the step may take, however much is left.
    """

    step: str
    seconds: float
    most: float = 2.0


#: The first window. Without a build nothing else runs, so the build may take three times its share.
FIRST = (
    Share("build", 60, 3.0),
    Share("machine", 15),
    Share("correctness", 90),
    Share("layers", 135),
    Share("networks", 140),
    Share("runtime", 60),
    Share("sanitizer", 50),
)

#: A later window, which has the compilers' caches of the first.
SECOND = (
    Share("build", 60, 3.0),
    Share("machine", 10),
    Share("sweep", 150),
    Share("autotune", 300),
    Share("archive", 30),
)


class Budget:
    """The clock of a window.

    Args:
        shares: The steps in order.
        seconds: Length of the window, to which the shares are scaled.
        clock: Seconds since any fixed moment.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        seconds: float = LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        planned = sum(share.seconds for share in shares)
        if planned + RESERVE > LIMIT:
            raise ValueError(f"budget: expected at most {LIMIT - RESERVE:g} s, got {planned:g}")
        self._shares, self._clock, self.seconds = tuple(shares), clock, seconds
        self._reserve = RESERVE * seconds / LIMIT
        self.began = clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the window began."""
        return self._clock() - self.began

    def deadline(self, step: str) -> float:
        """When a step that starts now must end, on the budget's clock.

        Args:
            step: Name of the step.
        """
        names = [share.step for share in self._shares]
        rest = self._shares[names.index(step) :]
        end = self.began + self.seconds - self._reserve
        left = max(0.0, end - self._clock())
        part = rest[0].seconds / sum(share.seconds for share in rest)
        most = rest[0].seconds * rest[0].most * self.seconds / LIMIT
        first = step == names[0]
        # Nothing can follow if the first step fails: it is not held to its part of what is left.
        return self._clock() + (min(left, most) if first else min(left * part, most))
