"""``load_frozen`` on files that are damaged, hostile or not files: one clear error at once."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import warm_process

import fused_resnet as fr
from fused_resnet.inference import archive

Table = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("frozen") / "served.safetensors"
    torch.manual_seed(0)
    archive.write_frozen(path, "cifar_resnet20", fr.cifar_resnet(20).state_dict())
    return path.read_bytes()


def sealed(whole: bytes, change: Callable[[Table, Table], bytes | None]) -> bytes:
    """The file after a change of its table and document, with a right checksum."""
    length = int.from_bytes(whole[:8], "little")
    table, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    metadata = table["__metadata__"]
    document = json.loads(metadata[archive.KIND])
    data = change(table, document) or data
    metadata |= {archive.KIND: json.dumps(document), "sha256": "0" * 64}
    header = json.dumps(table, separators=(",", ":")).encode()
    zeroed = len(header).to_bytes(8, "little") + header + data
    checksum = archive.hashlib.sha256(zeroed).hexdigest()
    return zeroed.replace(b'"sha256":"' + b"0" * 64, f'"sha256":"{checksum}'.encode(), 1)


def set_field(key: str, value: Any) -> Callable[[Table, Table], None]:
    return lambda table, document: document.update({key: value})


def set_entry(name: str, **entry: Any) -> Callable[[Table, Table], None]:
    return lambda table, document: table[name].update(entry)


def wide(table: Table, document: Table) -> bytes:
    """A bias of ten million classes in the file, and nothing else of that size."""
    document["classes"] = 10**7
    table["linear.bias"] = {"dtype": "F16", "shape": [10**7], "data_offsets": [0, 2 * 10**7]}
    del table["linear.weight"]
    return bytes(2 * 10**7)


def extra(table: Table, document: Table) -> None:
    table["n" * 70000] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


SEALED = {
    "many classes": (set_field("classes", 10**7), "says 10000000 classes, and its weights have 10"),
    "no class": (set_field("classes", 0), "fields are missing or have the wrong type"),
    "negative classes": (set_field("classes", -1), "fields are missing or have the wrong type"),
    "a bool": (set_field("classes", True), "fields are missing or have the wrong type"),
    "a huge number": (set_field("classes", 2**63), "fields are missing or have the wrong type"),
    "an integer flag": (set_field("winograd", 1), "fields are missing or have the wrong type"),
    "a wide bias": (wide, "do not fit|bytes, and it has"),
    "int8": (set_entry("linear.bias", dtype="I8"), "linear.bias has dtype 'I8'; expected one of"),
    "complex": (set_entry("linear.bias", dtype="C64"), "linear.bias has dtype 'C64'"),
    "float8": (set_entry("linear.bias", dtype="F8_E4M3"), "linear.bias has dtype 'F8_E4M3'"),
    "other shape": (set_entry("linear.bias", shape=[5, 2]), "do not fit: 1 of another shape"),
    "a negative size": (set_entry("linear.bias", shape=[-10]), "not the entry of a tensor"),
    "a size that wraps": (set_entry("linear.bias", shape=[2**62, 16]), "linear.bias|bytes"),
    "a size of text": (set_entry("linear.bias", shape=["10"]), "not the entry of a tensor"),
    "no shape": (set_entry("linear.bias", shape=None), "not the entry of a tensor"),
    "offsets": (set_entry("linear.bias", data_offsets=[0, 40]), "truncated or damaged"),
    "a long name": (extra, "do not fit: 1 unexpected"),
}


@pytest.mark.parametrize("case", SEALED)
def test_hostile_files_with_a_right_checksum(tmp_path: Path, whole: bytes, case: str) -> None:
    change, message = SEALED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(sealed(whole, change))
    with pytest.raises(ValueError, match=rf"^frozen file '.*bad.safetensors': .*({message})"):
        fr.load_frozen(path)


def test_the_helper_seals_a_file_that_loads(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(sealed(whole, lambda table, document: None))
    x = torch.randn(1, 3, 32, 32)
    path.with_name("whole").write_bytes(whole)
    assert torch.equal(fr.load_frozen(path)(x), fr.load_frozen(path.with_name("whole"))(x))


def test_every_byte_counts(tmp_path: Path, whole: bytes) -> None:
    """One flipped bit anywhere: length, table, document, checksum, weights."""
    path = tmp_path / "bad.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [0, 2, 7, 8, 30, whole.index(b"sha256") + 20, header - 2, header, len(whole) - 1]
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        # Among the places are those that say what kind of file this is.
        with pytest.raises(ValueError, match=r"bad.safetensors': (truncated|not a file)"):
            fr.load_frozen(path)
    for size in (0, 7, 8, 100, header, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"bad.safetensors': truncated or damaged"):
            fr.load_frozen(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"bad.safetensors': truncated or damaged"):
        fr.load_frozen(path)


def nested(path: Path) -> None:
    header = b'{"__metadata__":' + b"[" * 100000 + b"]" * 100000 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def bomb(path: Path) -> None:
    """An archive of torch.save whose entries are deflated: 64 MiB in 64 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(64 * 2**20))


def sparse(path: Path) -> None:
    """A header whose one tensor has a tebibyte, which the file has as a hole."""
    table = {"linear.bias": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    document = dict(kind=archive.KIND, format=archive.FORMAT, network="cifar_resnet20")
    document |= dict(classes=2**30, dtype="float32", winograd=True, version="0")
    table["__metadata__"] = {archive.KIND: json.dumps(document), "sha256": "0" * 64}
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + 2**40)


def plain(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"format": "pt"})


FILES = {
    nested: "truncated or damaged",
    bomb: "truncated or damaged",
    sparse: "says 1073741824 classes, and its weights have 274877906944",
    plain: "not a file that fused-resnet freeze wrote",
    os.mkfifo: "there is no such file",
    os.mkdir: "there is no such file",
}


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
def test_other_files(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "bad")
    with pytest.raises(ValueError, match=f"^frozen file '.*/bad': {FILES[make]}"):
        fr.load_frozen(tmp_path / "bad")


def test_names_that_no_file_has() -> None:
    for name in ("n" * 300, "a\0b", "/dev/zero", ""):
        with pytest.raises(ValueError, match="there is no such file"):
            fr.load_frozen(name)


def test_long_names_are_written(tmp_path: Path) -> None:
    """A file's name may have 255 bytes; the temporary file beside it needs room for its own."""
    path = tmp_path / ("é" * 122 + ".safetens")
    archive.write_frozen(path, "cifar_resnet20", fr.cifar_resnet(20).state_dict())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert archive.read_frozen(path).classes == 10


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.to("meta"),
        lambda w: w.to_sparse(),
        lambda w: w.to(torch.complex64),
        lambda w: w.to(torch.int8),
        lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    ],
    ids=["meta", "sparse", "complex", "int8", "quantised"],
)
def test_weights_that_are_no_plain_numbers(tmp_path: Path, spoil: Callable[..., Any]) -> None:
    state = fr.cifar_resnet(20).state_dict()
    state["linear.weight"] = spoil(state["linear.weight"])
    with pytest.raises(ValueError, match=r"linear.weight: expected a dense tensor of real"):
        archive.write_frozen(tmp_path / "f.safetensors", "cifar_resnet20", state)
    assert list(tmp_path.iterdir()) == []


def test_missing_memory_is_said(tmp_path: Path, whole: bytes) -> None:
    """Under a limit on the process's memory the file is not called damaged."""
    path = tmp_path / "served.safetensors"
    path.write_bytes(whole)
    script = (
        "import sys, torch, fused_resnet as fr\n"
        "from fused_resnet.inference import archive\n"
        "def load(data): raise RuntimeError('DefaultCPUAllocator: not enough memory: you tried')\n"
        "archive.safetensors.torch.load = load\n"
        "try:\n    fr.load_frozen(sys.argv[1])\n"
        "except MemoryError as error:\n    print(error)\n"
    )
    run = warm_process.run(["-c", script, str(path)], check=True)
    assert run.stdout == f"frozen file {str(path)!r}: not enough memory for its weights\n"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", ["one"], "has 1 labels for 10 classes"),
        ("labels", [1] * 10, "its labels are not names of classes"),
        ("labels", "0123456789", "its labels are not names"),
        ("preprocessing", {"resize": 2**70}, "its preprocessing is not"),
        ("preprocessing", [], "its preprocessing is not"),
    ],
)
def test_metadata_is_checked(
    tmp_path: Path, whole: bytes, field: str, value: Any, message: str
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(sealed(whole, set_field(field, value)))
    with pytest.raises(ValueError, match=message):
        fr.load_frozen(path)
