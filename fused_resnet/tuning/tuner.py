"""Finds the fastest backend for a call: timed once, cached in memory and on disk.

With ``FUSED_RESNET_TUNE=1``, the default, the candidates of each new call are timed in three
alternating rounds, with ``exhaustive`` in twenty. With ``0`` nothing is timed: calls without a
cached timing use the shipped table (:mod:`.defaults`), and the device's own kernels where it has no
entry. The table also decides for new calls while a CUDA graph is captured, and for all calls under
``torch.use_deterministic_algorithms``. Calls that a compiler traces use the device's own kernels. A
candidate that fails is dropped with a warning.

A process decides once for each call: ``FUSED_RESNET_TUNE``, ``FUSED_RESNET_CACHE`` and the file are
read at the first one. :func:`forget` drops the decisions, so that a change takes effect.

The decisions are one of the package's two pieces of global state (the other is the forced backend).
A lock protects them; a call that two threads time concurrently is timed twice and stored once.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import functools
import importlib.metadata
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._version import __version__
from . import cache, defaults, processor
from .tf32 import conv_allows_tf32

#: Increased when kernels change, which invalidates older timings.
KERNELS = 6

#: Relative time by which a candidate must beat the device's own kernels: differences below it are
#: within the noise.
MARGIN = 0.03

#: Rounds in which the candidates alternate, by mode; the fastest time counts.
ROUNDS = {"1": 3, "exhaustive": 20}

#: Says what was timed (INFO), and what was decided for each call, and from what (DEBUG).
_log = logging.getLogger(__name__)

_recorded: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar(
    "fused_resnet_recorded_calls", default=None
)
_lock = threading.Lock()
_known: dict[str, dict[str, dict[str, float]]] = {}  # machine, key: milliseconds by candidate
# The candidates and the choice, by the fingerprint of a call. Reads and writes are atomic, so they
# need no lock.
_decided: dict[tuple[Any, ...], tuple[Mapping[str, Any], str]] = {}

#: What callers keep for calls that they have asked about; dropped with the decisions.
calls: dict[tuple[Any, ...], Any] = {}

#: Entries of each of these two: images of ever-changing sizes must not fill the memory. A network
#: needs one for each layer and shape, of about 1.5 KiB.
MOST = 8192


def mode() -> str:
    """``FUSED_RESNET_TUNE``: ``"0"``, ``"1"`` or ``"exhaustive"``.

    Raises:
        ValueError: Anything else.
    """
    value = os.environ.get("FUSED_RESNET_TUNE", "1")
    if value != "0" and value not in ROUNDS:
        raise ValueError(f"FUSED_RESNET_TUNE: expected 0, 1 or exhaustive, got {value!r}")
    return value


class Call(NamedTuple):
    """A recorded call that can be timed later; its four-dimensional tensors are meta tensors.

    Attributes:
        op: Name of the operator.
        default: The candidate that runs without timings.
        candidates: Libraries that have the operator as an attribute, by the backend's name.
        device: Device of the call.
        arguments: Arguments of the operator.
    """

    op: str
    default: str
    candidates: Mapping[str, Any]
    device: torch.device
    arguments: tuple[Any, ...]

    @property
    def key(self) -> str:
        """The key of the call in the cache."""
        return key_of(self.op, self.arguments)

    def with_numbers(self) -> tuple[Any, ...]:
        """The arguments with random numbers in place of the meta tensors."""
        return tuple(
            torch.randn_like(a, device=self.device) if _is_map(a) else a for a in self.arguments
        )

    def decide(self) -> tuple[str, dict[str, float]]:
        """The candidate to run, and the milliseconds of each, timed now if they are not cached."""
        times = timings(self.op, self.candidates, self.with_numbers())
        return fastest(times, self.default, self.candidates), times


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Record the calls of this thread that would be timed, in order, instead of timing them."""
    recorded: list[Call] = []
    token = _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Whether calls of this thread are recorded."""
    return _recorded.get() is not None


def circumstances() -> tuple[int, bool]:
    """What a decision depends on besides the call: PyTorch's threads, and whether it may time."""
    return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def make_room(entries: dict[Any, Any]) -> None:
    """Empty a full dictionary of decisions, which are made again as their calls come.

    Args:
        entries: One of this module's, that is to get another entry.
    """
    if len(entries) >= MOST:
        entries.clear()


def _is_map(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() == 4


def choose(
    op: str,
    default: str,
    candidates: Mapping[str, Any],
    arguments: tuple[Any, ...],
    measures: bool = True,
) -> str:
    """The fastest candidate for a call.

    Args:
        op: Name of the operator.
        default: The candidate that runs without timings.
        candidates: Libraries that have the operator as an attribute, by the backend's name.
        arguments: Arguments of the operator; the first is the feature map, whose device and dtype
            count.
        measures: Whether a call without cached timings may be timed.
    """
    recorded = _recorded.get()
    if recorded is not None:
        maps = tuple(a.detach().to("meta") if _is_map(a) else a for a in arguments)
        recorded.append(Call(op, default, candidates, arguments[0].device, maps))
        return default
    x = arguments[0]
    # A fake tensor or a proxy, whose sizes may be symbolic; a meta tensor, which takes no time.
    if type(x) not in _PLAIN or x.device.type not in ("cpu", "cuda"):
        return default
    # Everything that the decision depends on; much faster to make than the key of the cache.
    around = circumstances()
    call = (op, around, _fingerprint(arguments))
    decided = _decided.get(call)
    if decided is not None and decided[0] is candidates:
        return decided[1]
    if torch.jit.is_tracing() or x.numel() == 0:  # sizes are tensors; nothing to time
        return default
    deterministic = around[1]
    times = {} if deterministic else timings(op, candidates, arguments, measures)
    shipped = {} if times else _shipped(op, arguments)
    choice = fastest(times or shipped, default, candidates)
    if may_time(x):  # otherwise a later call can be timed
        make_room(_decided)
        _decided[call] = (candidates, choice)
        if _log.isEnabledFor(logging.DEBUG):
            source = "its times" if times else "the shipped table" if shipped else "the default"
            _log.debug("%s runs on %s, by %s", key_of(op, arguments), choice, source)
    return choice


_PLAIN = (Tensor, torch.nn.Parameter)

#: Types of arguments that are not tensors: the fastest test.
_SETTINGS = frozenset((type(None), tuple, int, float, bool))


def _fingerprint(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same information as :func:`key_of` without text, in a quarter of its time."""
    x = arguments[0]
    found: list[Any] = [x.get_device(), x.is_cuda and conv_allows_tf32()]
    add = found.append
    for a in arguments:
        if type(a) is list:
            add(tuple([(t.dtype, t.shape) if isinstance(t, Tensor) else t for t in a]))
            continue
        if type(a) in _SETTINGS:
            add(a)
            continue
        if isinstance(a, int):  # an enumeration, whose own hash is slow
            add(int(a))
            continue
        add(a.dtype)
        if a.dim() == 1:
            add(a.numel())
        else:
            add(a.shape)
            add(a.stride())
    return tuple(found)


def _shipped(op: str, arguments: tuple[Any, ...]) -> dict[str, float]:
    device = arguments[0].device.type
    return defaults.nearest(device, _C.build_info()["isa"], key_of(op, arguments))


def fastest(times: Mapping[str, float], default: str, candidates: Mapping[str, Any]) -> str:
    """The candidate with the least time, if it beats the default by :data:`MARGIN`.

    Args:
        times: Milliseconds of each candidate; may be empty.
        default: The candidate that runs without timings.
        candidates: The candidates that exist, by name.
    """
    times = {name: ms for name, ms in times.items() if name in candidates}
    if not times:
        return default
    best = min(times, key=lambda name: times[name])
    if times[best] > times.get(default, float("inf")) * (1 - MARGIN):
        return default
    return best


def knows(ops: Iterable[str], device: torch.device) -> bool:
    """Whether any call of these operators was timed on a device, by this process or before.

    Args:
        ops: Names of the operators.
        device: The device.
    """
    heads = tuple(f"{op}(" for op in ops)
    with _lock:
        return any(key.startswith(heads) for key in _timings_on(machine_of(device)))


def _timings_on(machine: str) -> dict[str, dict[str, float]]:
    """All timings of a machine; the caller has the lock."""
    known = _known.get(machine)
    if known is None:
        known = _known[machine] = cache.load(machine)
    return known


def timings(
    op: str, candidates: Mapping[str, Any], arguments: tuple[Any, ...], measures: bool = True
) -> dict[str, float]:
    """The timings of a call, from the cache or measured now if that is allowed.

    Args:
        op: Name of the operator.
        candidates: Libraries that have the operator as an attribute, by the backend's name.
        arguments: Arguments of the operator; the first is the feature map.
        measures: Whether it may be timed at all.

    Returns:
        Milliseconds of each candidate; empty if the call may not be timed.
    """
    x = arguments[0]
    machine, key = machine_of(x.device), key_of(op, arguments)
    with _lock:
        known = _timings_on(machine)
        times = known.get(key)
    if times is not None:
        return times
    how = mode()
    if not measures or how == "0" or x.numel() == 0 or not may_time(x):
        return {}
    times = measure(op, candidates, arguments, ROUNDS[how])
    _log.info("timed %s: %s", key, ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items()))
    with _lock:
        known[key] = times
    if times and not getattr(times, "noisy", False):
        cache.add(machine, {key: times})
    return times


def may_time(x: Tensor) -> bool:
    """Whether calls run eagerly, without a trace or the capture of a CUDA graph.

    Under a dispatch mode they don't either: it would count or record every call that is timed.

    Args:
        x: The feature map of the call.
    """
    if type(x) not in _PLAIN or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    if x.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return x.device.type == "cpu"


def key_of(op: str, arguments: tuple[Any, ...]) -> str:
    """The key of a call in the cache: shapes, dtypes, memory formats and settings.

    Args:
        op: Name of the operator.
        arguments: Arguments of the operator.
    """
    return op + "(" + ", ".join(map(_word, arguments)) + ")"


def _word(argument: Any) -> str:
    if isinstance(argument, list):
        return "[" + ", ".join(map(_word, argument)) + "]"
    if isinstance(argument, enum.Enum):
        return argument.name.lower()
    if not isinstance(argument, Tensor):
        return str(argument)
    shape = "x".join(map(str, argument.shape))
    dtype = str(argument.dtype).removeprefix("torch.")
    if argument.dim() != 4:
        return f"{shape} {dtype}"
    if argument.is_contiguous(memory_format=torch.channels_last):
        return f"{shape} {dtype} channels_last"
    return f"{shape} {dtype} {'contiguous' if argument.is_contiguous() else 'strided'}"


def machine_of(device: torch.device) -> str:
    """Everything that timings depend on besides the call: device, versions, settings.

    Args:
        device: Device of the call.
    """
    if device.type == "cuda":
        float32 = "tf32" if conv_allows_tf32() else "strict float32"
        return f"{_cuda_machine(device.index if device.index is not None else 0)}, {float32}"
    return f"{_cpu_machine()}, {torch.get_num_threads()} threads"


@functools.cache
def _versions() -> str:
    return f"torch {torch.__version__}, fused_resnet {__version__} kernels {KERNELS}"


@functools.cache
def _cpu_machine() -> str:
    return f"{processor.name()}, {_C.build_info()['isa']}, {_versions()}"


@functools.cache
def _cuda_machine(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    cudnn = torch.backends.cudnn.version()
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, driver {_driver()}, "
        f"CUDA {torch.version.cuda}, cuDNN {cudnn}, Triton {_triton()}, {_versions()}"
    )


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(version()) if version is not None else "unknown"


#: Share of the time that a thread must have had a processor for a measurement to be kept, and how
#: many times the rounds are repeated until it has.
QUIET, PATIENCE = 0.8, 3


class Timings(dict[str, float]):
    """Milliseconds of each candidate.

    Attributes:
        noisy: Other work on the machine took part of the time of the fastest round of a candidate:
            the timings serve this process and are not stored.
    """

    noisy = False


def measure(
    op: str, candidates: Mapping[str, Any], arguments: tuple[Any, ...], rounds: int
) -> Timings:
    """Time the candidates in alternating rounds.

    Args:
        op: Name of the operator.
        candidates: Libraries that have the operator as an attribute, by the backend's name.
        arguments: Arguments of the operator; the first is the feature map.
        rounds: Number of rounds.

    Returns:
        Milliseconds of each candidate, the fastest of the rounds; on a CPU the rounds are repeated
        while other work on the machine takes part of the time.
    """
    device = arguments[0].device
    with torch.no_grad():
        if device.type != "cuda":
            return _alternate(op, candidates, arguments, rounds, _clock)
        with torch.cuda.device(device):  # the events are recorded on its stream
            return _alternate(op, candidates, arguments, rounds, _cuda_clock)


def _alternate(
    op: str,
    candidates: Mapping[str, Any],
    arguments: tuple[Any, ...],
    rounds: int,
    clock: Callable[[Callable[[], Any]], float],
) -> Timings:
    calls: dict[str, Callable[[], Any]] = {}
    for name, operators in candidates.items():
        call: Callable[[], Any] = functools.partial(getattr(operators, op), *arguments)
        try:
            call()  # compiles, allocates, packs
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"fused_resnet: {op}: {name} fails and is left out: {first}", stacklevel=3
            )
            continue
        calls[name] = call
    times = Timings(dict.fromkeys(calls, float("inf")))
    shares = dict.fromkeys(calls, 1.0)
    for _ in range(PATIENCE):
        for _ in range(rounds):
            for name, call in calls.items():
                began = time.thread_time()
                ms = clock(call)
                if ms < times[name]:
                    times[name] = ms
                    shares[name] = (time.thread_time() - began) * 1e3 / ms
        # A GPU is timed by its own clock, while this thread waits.
        times.noisy = clock is _clock and min(shares.values(), default=1.0) < QUIET
        if not times.noisy:
            break
    return times


def _clock(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _cuda_clock(call: Callable[[], Any], repeats: int = 5) -> float:
    """Milliseconds on the caller's stream of the current device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def forget() -> None:
    """Drop all timings and decisions in memory; the cache file is kept."""
    with _lock:
        _known.clear()
        _decided.clear()
        calls.clear()
