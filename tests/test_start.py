"""What starting loads, in place of the time that it takes."""

from __future__ import annotations

import importlib
import importlib.machinery
import subprocess
import sys

import pytest
import torch
import warm_process

import fused_resnet as fr
import fused_resnet_command
from fused_resnet.backends.constant import assume_constant_result

#: Each takes longer to import than this package.
SLOW = (
    "torch._dynamo",
    "torch._inductor",
    "triton",
    "sympy",
    "networkx",
    "torch.utils.flop_counter",
)
OTHERS = ("torchvision", "timm", "transformers", "matplotlib", "rich", "filelock", "onnx", "PIL")


def run(script: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, **options
    )


def test_import_loads_nothing_slow() -> None:
    script = (
        "import sys, torch; before = set(sys.modules)\n"
        "import fused_resnet\n"
        f"print([name for name in {SLOW + OTHERS} if name in set(sys.modules) - before])\n"
    )
    assert run(script, check=True).stdout == "[]\n"


@pytest.mark.parametrize("first", ["fused_resnet", "torch.utils.flop_counter"])
def test_flops_are_counted_whichever_is_imported_first(first: str) -> None:
    script = (
        f"import torch, {first}, fused_resnet as fr\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "w, one, x = torch.zeros(8, 4, 1, 1), torch.ones(8), torch.zeros(1, 4, 5, 6)\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    fr.ops.conv_bn_add_relu(x, w, one, one, one, one)\n"
        "print(counter.get_total_flops())\n"
    )
    done = warm_process.run(["-c", script], check=True)  # which has not imported either
    assert done.stdout == f"{2 * 4 * 8 * 5 * 6}\n"


def test_constants_are_marked_as_torch_marks_them() -> None:
    def one() -> int:
        return 1

    def other() -> int:
        return 1

    torch.compiler.assume_constant_result(one)
    assert assume_constant_result(other) is other
    assert vars(one) == vars(other) != {}


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--version"], 0, fr.__version__),
        (["--help"], 0, "serve-check"),
        (["-h"], 0, "fused-resnet COMMAND --help"),
        (["benhc"], 2, "unknown command 'benhc'; did you mean bench?"),
        (["zzz"], 2, "unknown command 'zzz'; expected one of info, "),
        ([], 2, "expected a command (see fused-resnet --help)"),
    ],
)
def test_the_command_answers_without_torch(arguments: list[str], code: int, named: str) -> None:
    script = (
        "import sys, fused_resnet_command\n"
        "code = fused_resnet_command.main()\n"
        "assert not {'torch', 'rich', 'fused_resnet'} & set(sys.modules), 'loaded'\n"
        "sys.exit(code)\n"
    )
    done = run(script, *arguments)
    assert done.returncode == code, done.stderr
    assert named in (done.stderr if code else done.stdout)
    assert not code or done.stderr.count("\n") == 1


def test_every_listed_command_exists() -> None:
    for name in fused_resnet_command.COMMANDS:
        module = importlib.import_module(f"fused_resnet.cli.{name.replace('-', '_')}")
        assert callable(module.add)
        assert callable(module.run)
    assert max(map(len, fused_resnet_command.help_text().splitlines())) <= 80
