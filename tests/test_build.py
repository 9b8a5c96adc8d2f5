"""What the build holds: one OpenMP runtime, portable code, honest errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_process

import fused_resnet as fr
from fused_resnet import _C

LIBRARY = str(Path(_C.__file__).with_name("libfused_resnet.so"))
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return warm_process.run(["-c", code], env={**os.environ, **environment})


def versions(torch_version: str) -> tuple[int, ...]:
    return tuple(map(int, torch_version.split(".")[:2]))


def test_one_openmp_runtime():
    """Two would start two pools of threads that steal each other's cores."""
    code = (
        "import fused_resnet as fr, torch, re\n"
        "x = torch.randn(4, 64, 32, 32)\n"
        "fr.ops.conv_bn_add_relu(x, torch.randn(64, 64, 3, 3), None, None,"
        " torch.zeros(64), torch.ones(64), padding=1)\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(sorted(set(re.findall(r'\\S*lib[gi]?omp[^/\\s]*\\.so\\S*', maps))))\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    libraries = eval(result.stdout)
    assert len(libraries) == 1, libraries


@pytest.mark.parametrize("isa", ISAS)
def test_forced_isa(isa):
    """Every instruction set that the machine has is taken when asked for, and agrees."""
    if isa not in fr.build_info()["isa_supported"]:
        pytest.skip(f"this machine does not support {isa}")
    torch.manual_seed(0)
    code = (
        "import fused_resnet as fr, torch\n"
        "torch.manual_seed(0)\n"
        "x = torch.randn(2, 40, 13, 13, dtype=torch.float64)\n"
        "w = torch.randn(72, 40, 3, 3, dtype=torch.float64)\n"
        "one = torch.ones(72, dtype=torch.float64)\n"
        "y = fr.ops.conv_bn_add_relu(x, w, one, one, one, one, padding=1)\n"
        "z = fr.reference.conv_bn_add_relu(x, w, one, one, one, one, padding=1)\n"
        "torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-10)\n"
        "print(fr.build_info()['isa'])\n"
    )
    result = python(code, FUSED_RESNET_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


def test_an_unknown_instruction_set_stops_the_build():
    """Before anything is compiled; a name that is misspelt must not leave its kernels out."""
    root = Path(__file__).resolve().parent.parent
    code = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code, "build_ext"],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "FUSED_RESNET_ISAS": "avx2,axv512", "FUSED_RESNET_CUDA": "0"},
    )
    assert result.returncode != 0
    assert "expected some of portable,avx2" in result.stderr
    assert "axv512" in result.stderr


def test_unknown_isa_is_an_error_at_import():
    result = python("import fused_resnet", FUSED_RESNET_ISA="mmx")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(r"FUSED_RESNET_ISA: expected one of .*portable.*, got mmx", last)


def test_without_the_extension_one_line_says_what_to_run(tmp_path):
    package = Path(fr.__file__).parent
    (tmp_path / "fused_resnet").mkdir()
    for source in package.glob("*.py"):
        (tmp_path / "fused_resnet" / source.name).write_text(source.read_text())
    # An editable installation finds submodules of a package of this name wherever that one lies.
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import fused_resnet\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fused_resnet: ")
    assert "pip install --no-build-isolation" in last


def test_wide_instructions_stay_behind_the_dispatch():
    """Outside of an instruction set's own namespace, wide registers would kill an older machine."""
    objdump = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", LIBRARY], capture_output=True, text=True
    )
    if objdump.returncode != 0:
        pytest.skip("objdump is not installed")
    function, seen, strays, tiles = "", set(), set(), 0
    for line in objdump.stdout.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2][:-2]
            continue
        tile = re.search(r"%tmm|ldtilecfg|tilerelease", line)
        if tile or "%zmm" in line or "%ymm" in line:
            home = re.search(r"fr::(amx_emulated|amx|avx512_bf16|avx512|avx2)::", function)
            (seen if home else strays).add(home.group(1) if home else function)
            if home and home.group(1) == "avx2" and "%zmm" in line:
                strays.add(function)
            if home and home.group(1) != "amx" and tile:
                strays.add(function)
            tiles += tile is not None
    if not seen:
        pytest.skip("this build has no x86-64 kernels")
    assert seen == {"amx_emulated", "amx", "avx512_bf16", "avx512", "avx2"}
    assert tiles > 0
    assert not strays


def test_build_info():
    info = fr.build_info()
    assert info["isa"] in info["isa_supported"]
    assert info["version"] == fr.__version__
    # The torch that it was compiled with may be another one than that it runs with.
    for known in (info["torch"], torch.__version__):
        assert versions(known) >= versions(info["torch_needed"]) == (2, 11)


@pytest.mark.parametrize("name", ["bn_add_relu", "conv_bn_add_relu", "pack_conv_weight"])
def test_the_module_binds_the_operators(name):
    assert getattr(_C, name) is getattr(torch.ops.fused_resnet, name)


def test_tritons_operators_are_registered():
    pytest.importorskip("triton", reason="Triton is not installed")
    from fused_resnet.backends import triton
    from fused_resnet.ops.registry import TRITON

    assert sorted(TRITON) == sorted(triton.__all__)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has_kernel(f"fused_resnet_triton::{name}", "CUDA") for name in TRITON)
