"""What nvcc made of every kernel: ``python tests/simt/static_gate.py [FILE]`` prints it.

Reads the built extension (or a cubin, an object or another library): registers, stack, shared
memory and instructions of each instance of each kernel, the occupancy that follows, and the one
that its `__launch_bounds__` were written for. What is wrong is said below the table.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import launch_record
import simulator
from rich.console import Console
from rich.table import Table
from sass import instructions
from simulator import ROOT
from toolkit import tool

KERNELS = sorted((ROOT / "csrc" / "cuda" / "kernels").glob("*.cuh"))


@dataclass(frozen=True)
class Card:
    """Limits of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities"."""

    threads: int
    blocks: int
    shared_kib: int


CARDS = {
    "sm_80": Card(2048, 32, 164),
    "sm_86": Card(1536, 16, 100),
    "sm_89": Card(1536, 24, 100),
    "sm_90": Card(2048, 32, 228),
    "sm_100": Card(2048, 32, 228),
    "sm_120": Card(1536, 24, 100),
}
REGISTERS = 64 * 1024  # of a multiprocessor, in four parts
RESERVED = 1024  # bytes of shared memory that the driver takes for each block
#: Where a multiprocessor has less shared memory than this, fewer blocks than designed are meant.
AMPLE_KIB = 164


@dataclass
class Instance:
    """One instance of a kernel template, compiled for one architecture."""

    architecture: str
    mangled: str
    kernel: str
    registers: int
    stack: int
    static_shared: int
    opcodes: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return name_of(self.kernel)

    @property
    def base(self) -> str:
        return base_of(self.kernel)

    def count(self, opcode: str) -> int:
        return sum(n for name, n in self.opcodes.items() if name.split(".")[0] == opcode)


@dataclass(frozen=True)
class Design:
    """What a kernel's `__launch_bounds__` say."""

    threads: int
    blocks: int


def name_of(kernel: str) -> str:
    """A demangled kernel without namespace, parameters and return type; its epilogue in words."""
    text = re.sub(r"\(fr::Epilogue\)(\d)", lambda m: epilogues()[int(m[1])], kernel)
    return re.sub(r"^void |fr::|\([^()]*\)$", "", text)


@functools.cache
def epilogues() -> list[str]:
    """The enumerators of the convolution's epilogue: packs, residual and so on."""
    text = (ROOT / "csrc/cuda/kernels/conv_epilogue.cuh").read_text()
    body = text.split("enum class Epilogue {")[1].split("}")[0]
    return [name.lower() for name in re.findall(r"^  k(\w+),", body, re.MULTILINE)]


def base_of(kernel: str) -> str:
    """some_kernel, of the demangled `void fr::some_kernel<...>(...)`."""
    return re.sub(r"^void |fr::|[<(].*$", "", kernel)


def demangled(names: list[str]) -> dict[str, str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, done.stdout.splitlines(), strict=True))


_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def read(path: Path) -> list[Instance]:
    """Every kernel in a file, for every architecture in it."""
    command = [str(tool("cuobjdump")), "-res-usage", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code = instructions(path)
    names = demangled(sorted({name for _, name in code}))
    found = []
    architecture = function = ""
    for line in done.stdout.splitlines() + done.stderr.splitlines():
        if match := re.match(r"^\s*(?:arch = |code for )(sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"^\s*Function (\S+):", line):
            function = match[1]
        elif (match := _USAGE.search(line)) and (architecture, function) in code:
            opcodes = Counter(opcode(text) for text in code[architecture, function])
            registers, stack, static = map(int, match.groups())
            if static >= RESERVED and int(architecture.removeprefix("sm_")) >= 90:
                static -= RESERVED  # which are among a kernel's from sm_90 on
            usage = registers, stack, static
            found.append(Instance(architecture, function, names[function], *usage, opcodes))
    return found


def opcode(instruction: str) -> str:
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def constants() -> dict[str, str]:
    """Integer constants of the kernels' headers, as they are written."""
    found: dict[str, str] = {}
    for path in KERNELS:
        pattern = r"^constexpr int (k\w+) = ([^;]+);"
        found.update(re.findall(pattern, path.read_text(), re.MULTILINE))
    return found


def bounds() -> dict[str, tuple[str, str]]:
    """Kernel -> its two launch bounds, as they are written."""
    pattern = r"__global__ void __launch_bounds__\(([^,()]+)(?:, ([^()]+))?\)\s*(\w+)\("
    return {
        name: (threads, blocks or "1")
        for path in KERNELS
        for threads, blocks, name in re.findall(pattern, path.read_text())
    }


def design_of(instance: Instance) -> Design:
    """Its launch bounds in numbers. A Tile's are those of its template arguments."""
    known = constants()
    tile = re.search(r"Tile<(\d+), (\d+), (\d+), (\d+), (\d+), (\d+)>", instance.kernel)
    if tile:
        known["T::kThreads"] = f"32 * {tile[3]} * {tile[4]}"
        known["T::kBlocks"] = tile[6]

    def number(text: str) -> int:
        text = text.strip()
        if "*" in text:
            left, _, right = text.rpartition("*")
            return number(left) * number(right)
        return int(text) if text.isdigit() else number(known[text])

    threads, blocks = bounds()[instance.base]
    return Design(number(threads), number(blocks))


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a multiprocessor has room for, by each of its limits."""

    by_registers: int
    by_threads: int
    by_shared: int

    @property
    def blocks(self) -> int:
        return min(self.by_registers, self.by_threads, self.by_shared)


def occupancy(instance: Instance, threads: int, dynamic_shared: int) -> Occupancy:
    card = CARDS[instance.architecture]
    warps = -(-threads // 32)
    each = -(-instance.registers * 32 // 256) * 256  # registers go to a warp in units of 256
    by_registers = REGISTERS // 4 // each * 4 // warps
    shared = -(-(instance.static_shared + dynamic_shared) // 128) * 128 + RESERVED
    by_threads = min(card.threads // threads, card.blocks)
    return Occupancy(by_registers, by_threads, card.shared_kib * 1024 // shared)


def is_tensor_core(instance: Instance) -> bool:
    return any(f"fr::{name}" in instance.kernel for name in ("Float16", "BFloat16", "Tf32"))


def wrong(instance: Instance, run: launch_record.KernelLaunches | None) -> list[str]:
    """What is not as it should be."""
    found = []
    if instance.stack:
        found.append(f"{instance.stack} bytes of stack")
    for name in ("LDL", "STL"):
        if instance.count(name):
            found.append(f"{instance.count(name)} {name}")
    design = design_of(instance)
    room = occupancy(instance, design.threads, run.least_shared if run else 0)
    card = CARDS[instance.architecture]
    if min(room.by_registers, room.by_threads) < min(design.blocks, card.threads // design.threads):
        found.append(f"registers leave room for {room.by_registers} of {design.blocks} blocks")
    if design.threads * design.blocks > card.threads:
        found.append(f"{design.blocks} blocks of {design.threads} threads are meant: too many")
    least = design.blocks if card.shared_kib >= AMPLE_KIB else max(1, design.blocks - 1)
    if room.by_shared < least:
        found.append(f"shared memory leaves room for {room.by_shared} of {design.blocks} blocks")
    if run and run.threads > design.threads:
        found.append(f"launched with {run.threads} threads, compiled for {design.threads}")
    return found + wrong_instructions(instance)


def wrong_instructions(instance: Instance) -> list[str]:
    found = []
    is_conv = instance.base == "conv_bn_add_relu_kernel"
    wanted: dict[str, bool] = {}
    if is_tensor_core(instance):
        wanted |= {"HMMA": True, "LDSM": True}
    elif is_conv:
        wanted |= {"FFMA": True, "HMMA": False}
    if is_conv:
        by_packs = re.search(r", (true|false), (?:true|false), \w+>$", instance.name)
        wanted["LDGSTS"] = by_packs is not None and by_packs[1] == "true"
    if instance.base in ("residual_block_kernel", "conv_bn_relu_maxpool_kernel"):
        wanted["LDGSTS"] = True
    for name, there in wanted.items():
        if (instance.count(name) > 0) != there:
            found.append(f"no {name}" if there else f"{name}, which is not meant")
    return found


def short(name: str) -> str:
    """An instance's name as it fits a table."""
    name = re.sub(r"Tile<(\d+), (\d+), \d+, \d+, \d+, \d+>", r"\1x\2", name)
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("_kernel", "")


def table(instances: list[Instance], runs: dict[str, launch_record.KernelLaunches]) -> Table:
    architectures = [name for name in CARDS if any(i.architecture == name for i in instances)]
    shown = Table("kernel", "threads", "meant", "shared", title="registers / blocks")
    for name in (*architectures, "tensor", "copies"):
        shown.add_column(name, justify="right")
    names = {i.mangled: i.name for i in instances}
    for mangled in sorted(names, key=lambda m: names[m]):
        mine = {i.architecture: i for i in instances if i.mangled == mangled}
        first, run = next(iter(mine.values())), runs.get(mangled)
        design = design_of(first)
        cells = []
        for name in architectures:
            if name not in mine:
                cells.append("[red]missing[/]")
                continue
            room = occupancy(mine[name], design.threads, run.least_shared if run else 0)
            color = "red" if wrong(mine[name], run) else "default"
            cells.append(f"[{color}]{mine[name].registers} / {room.blocks}[/]")
        shared = f"{run.least_shared / 1024:.1f}" if run else "?"
        if run and run.most_shared != run.least_shared:
            shared += f"-{run.most_shared / 1024:.1f}"
        cells += [str(first.count(name) or "") for name in ("HMMA", "LDGSTS")]
        head = (short(first.name), str(design.threads), str(design.blocks), f"{shared} KiB")
        shown.add_row(*head, *cells)
    return shown


def extension() -> Path | None:
    """The built extension, without importing it."""
    return next((ROOT / "fused_resnet").glob("libfused_resnet.so"), None)


def runs() -> dict[str, launch_record.KernelLaunches]:
    """How the kernels are launched, as the simulator sees it where it can be built."""
    return {} if simulator.missing() else launch_record.of_small_calls()


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else extension()
    if path is None or tool("cuobjdump") is None or tool("nvdisasm") is None:
        print("no extension, or no cuobjdump and nvdisasm")
        return 1
    instances = [i for i in read(path) if i.base in bounds()]
    launched = runs()
    Console(width=200).print(table(instances, launched))
    bad = 0
    for instance in instances:
        for what in wrong(instance, launched.get(instance.mangled)):
            bad += 1
            print(f"{instance.architecture} {instance.name}: {what}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
