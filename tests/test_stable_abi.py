"""The compiled files know PyTorch by its stable C interface alone: one build for every torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fused_resnet import _C

MODULE = Path(_C.__file__)
LIBRARY = MODULE.with_name("libfused_resnet.so")

#: The functions of torch 2.11's stable interface that the library calls; later versions keep them.
IN_TORCH_2_11 = {
    *(f"aoti_torch_dtype_{name}" for name in (
        "bfloat16", "bool", "complex128", "complex32", "complex64", "element_size", "float16",
        "float32", "float64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
        "int16", "int32", "int64", "int8", "uint16", "uint32", "uint64", "uint8",
    )),
    *(f"aoti_torch_layout_{name}" for name in (
        "_mkldnn", "jagged", "sparse_bsc", "sparse_bsr", "sparse_coo", "sparse_csc", "sparse_csr",
        "strided",
    )),
    *(f"aoti_torch_memory_format_{name}" for name in (
        "channels_last", "channels_last_3d", "contiguous_format", "preserve_format",
    )),
    *(f"aoti_torch_device_type_{name}" for name in (
        "cpu", "cuda", "meta", "mps", "privateuse1", "xpu",
    )),
    *(f"aoti_torch_get_{name}" for name in (
        "current_cuda_stream", "device_index", "device_type", "dim", "dtype", "layout", "numel",
        "sizes", "storage_offset", "storage_size", "strides",
    )),
    *(f"aoti_torch_{name}" for name in (
        "abi_version", "copy_", "create_device_guard", "delete_device_guard",
        "delete_library_object", "delete_tensor_object", "empty_strided", "grad_mode_is_enabled",
        "grad_mode_set_enabled", "is_contiguous", "is_defined", "library_def",
        "library_init_def", "library_init_fragment", "library_init_impl", "new_tensor_handle",
        "new_uninitialized_tensor", "zero_",
    )),
    *(f"torch_{name}" for name in (
        "call_dispatcher", "delete_list", "dtype_float4_e2m1fn_x2", "dtype_float8_e8m0fnu",
        "from_blob", "get_const_data_ptr", "get_mutable_data_ptr", "get_num_threads",
        "library_impl", "list_get_item", "list_push_back", "list_size", "new_list_reserve_size",
        "parallel_for",
    )),
}  # fmt: skip


def symbols(path: Path, which: str) -> list[tuple[str, str]]:
    """Kind and mangled name of each dynamic symbol."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-D", which, str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [line.split()[-2:] for line in lines]
    return [(kind, name.partition("@")[0]) for kind, name in pairs]


def is_of_torch(name: str) -> bool:
    """Whether a mangled name is one of namespace at, c10, caffe2 or torch."""
    return re.match(r"_Z(T[ISV]|GV|Z)?N?K?(2at|3c10|6caffe2|5torch)\d", name) is not None


def needed(path: Path) -> set[str]:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    output = subprocess.run(
        ["readelf", "-d", str(path)], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", output.stdout))


def test_names_of_torch_are_found() -> None:
    for name in ("_ZN2at4_ops5empty4callE", "_ZNK3c105Error4whatEv", "_ZN5torch7LibraryD1Ev",
                 "_ZTIN3c105ErrorE"):  # fmt: skip
        assert is_of_torch(name)
    for name in ("_ZN2fr6TensorC1ERKS0_", "_ZN2fr6appendERNSt6stringEN3c1010ScalarTypeE"):
        assert not is_of_torch(name)


def test_the_library_calls_the_stable_interface_of_torch_2_11() -> None:
    undefined = {name for kind, name in symbols(LIBRARY, "--undefined-only") if kind == "U"}
    assert not [name for name in undefined if is_of_torch(name)]
    assert {n for n in undefined if n.startswith(("aoti_", "torch_"))} <= IN_TORCH_2_11
    assert "torch_library_impl" in undefined  # it does register operators by that interface


def test_the_library_has_no_symbol_of_python() -> None:
    for which in ("--undefined-only", "--defined-only"):
        names = [name for _, name in symbols(LIBRARY, which)]
        assert not [n for n in names if n.startswith(("Py", "_Py")) or "8pybind11" in n]


def test_what_the_library_has_of_torch_is_inline() -> None:
    """Of its headers alone, and weak: the library defines no function of torch's."""
    kinds = {kind for kind, name in symbols(LIBRARY, "--defined-only") if is_of_torch(name)}
    assert kinds <= {"W", "V", "u"}


def test_the_module_knows_nothing_of_torch() -> None:
    for which in ("--undefined-only", "--defined-only"):
        names = [name for _, name in symbols(MODULE, which)]
        assert not [n for n in names if is_of_torch(n) or n.startswith(("aoti_", "torch_"))]


def test_the_libraries_that_are_needed() -> None:
    torchs = {name for name in needed(LIBRARY) if "torch" in name or "c10" in name}
    assert torchs - {"libtorch_cuda.so"} == {"libtorch_cpu.so"}
    assert not [name for name in needed(LIBRARY) if "python" in name or "gomp" in name]
    assert not [name for name in needed(MODULE) if "torch" in name or "c10" in name]
    assert "libfused_resnet.so" in needed(MODULE)


def test_auditwheel_names_a_manylinux_tag(tmp_path: Path) -> None:
    """Of a wheel with the two files; torch's libraries come with torch."""
    pytest.importorskip("auditwheel", reason="auditwheel is not installed (extra dev)")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheel = tmp_path / f"fused_resnet-0-{tag}-{tag}-linux_x86_64.whl"
    info = "fused_resnet-0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in (MODULE, LIBRARY):
            archive.write(file, f"fused_resnet/{file.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fused_resnet\n")
        lines = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}-{tag}-linux_x86_64\n"
        archive.writestr(f"{info}/WHEEL", lines)
        record = "".join(f"fused_resnet/{file.name},,\n" for file in (MODULE, LIBRARY))
        archive.writestr(f"{info}/RECORD", record)
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"manylinux_2_\d+_x86_64", done.stdout), done.stdout
    external = set(re.findall(r"\b(lib[\w.+-]+\.so[\d.]*)\b", done.stdout))
    assert {name for name in external if "torch" not in name} <= {
        "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0",
        "libdl.so.2", "librt.so.1", "libcudart.so.12", "libcudart.so.13", "libfused_resnet.so",
    }  # fmt: skip
