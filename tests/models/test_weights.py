"""Weights from files and names: what is accepted, what is an error, and its message."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
import warm_process

import fused_resnet as fr
from fused_resnet.models.weights import load_weights


@pytest.fixture(scope="module")
def source() -> fr.CifarResNet:
    torch.manual_seed(5)
    return fr.cifar_resnet(20)


def assert_loaded(model: fr.CifarResNet, source: fr.CifarResNet) -> None:
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_files(tmp_path: Path, source: fr.CifarResNet, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    assert_loaded(fr.cifar_resnet(20, weights=path), source)
    assert_loaded(fr.cifar_resnet(20, weights=str(path)), source)


@pytest.mark.parametrize("nested", ["", "state_dict", "model", "model_state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_checkpoints_around_a_state_dict(
    tmp_path: Path, source: fr.CifarResNet, nested: str, prefix: str
) -> None:
    state = {prefix + k: v for k, v in source.state_dict().items()}
    checkpoint = {nested: state, "epoch": 3} if nested else state
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert_loaded(fr.cifar_resnet(20, weights=tmp_path / "checkpoint.pth"), source)
    assert_loaded(fr.cifar_resnet(20, weights=checkpoint), source)


def test_what_was_removed_is_logged(
    source: fr.CifarResNet, caplog: pytest.LogCaptureFixture
) -> None:
    """An average is not taken in silence, nor left in silence."""
    state = {"module." + key: value for key, value in source.state_dict().items()}
    averaged = state | {"n_averaged": torch.tensor(3)}
    with caplog.at_level("INFO", "fused_resnet"):
        assert_loaded(fr.cifar_resnet(20, weights={"model_ema": averaged}), source)
        assert_loaded(fr.cifar_resnet(20, weights={"model_ema": {}, "model": state}), source)
        load_weights(source.state_dict())
    assert [record.getMessage() for record in caplog.records] == [
        "weights: took 'model_ema', left out 'n_averaged', removed the prefix 'module.'",
        "weights: took 'model' and not 'model_ema', removed the prefix 'module.'",
    ]


def test_files_without_counters_load(source: fr.CifarResNet) -> None:
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    assert_loaded(fr.cifar_resnet(20, weights=state), source)


class Payload:
    """Unpickling an instance creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def truncated(folder: Path, source: fr.CifarResNet) -> Path:
    path = folder / "short.pth"
    torch.save(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:20000])
    return path


def truncated_safetensors(folder: Path, source: fr.CifarResNet) -> Path:
    path = folder / "short.safetensors"
    pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:20000])
    return path


def empty(folder: Path, source: fr.CifarResNet) -> Path:
    (folder / "empty.pth").touch()
    return folder / "empty.pth"


def text(folder: Path, source: fr.CifarResNet) -> Path:
    (folder / "page.pth").write_text("<html>404</html>")
    return folder / "page.pth"


def code(folder: Path, source: fr.CifarResNet) -> Path:
    torch.save({"conv1.weight": Payload(folder / "ran")}, folder / "code.pth")
    return folder / "code.pth"


def code_in_an_old_file(folder: Path, source: fr.CifarResNet) -> Path:
    path = folder / "old.pth"
    torch.save({"w": Payload(folder / "ran")}, path, _use_new_zipfile_serialization=False)
    return path


def whole_module(folder: Path, source: fr.CifarResNet) -> Path:
    torch.save(source, folder / "module.pth")
    return folder / "module.pth"


def list_of_tensors(folder: Path, source: fr.CifarResNet) -> Path:
    torch.save([torch.zeros(2)], folder / "list.pth")
    return folder / "list.pth"


def numbers(folder: Path, source: fr.CifarResNet) -> Path:
    torch.save({"epoch": 3, "loss": 0.1}, folder / "numbers.pth")
    return folder / "numbers.pth"


def nothing(folder: Path, source: fr.CifarResNet) -> Path:
    return folder / "missing.pth"


def other_network(folder: Path, source: fr.CifarResNet) -> Path:
    torch.save(fr.cifar_resnet(32).state_dict(), folder / "other.pth")
    return folder / "other.pth"


def other_classes(folder: Path, source: fr.CifarResNet) -> Path:
    torch.save(fr.cifar_resnet(20, num_classes=7).state_dict(), folder / "classes.pth")
    return folder / "classes.pth"


def flipped(folder: Path, source: fr.CifarResNet) -> Path:
    """One bit of a weight, which torch.load doesn't see."""
    path = folder / "flipped.pth"
    torch.save(source.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(source.linear.bias.data.numpy().tobytes())) + 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    return path


def flipped_name(folder: Path, source: fr.CifarResNet) -> Path:
    """One bit of the pickle: a key's name."""
    path = folder / "name.pth"
    torch.save(source.state_dict(), path)
    path.write_bytes(path.read_bytes().replace(b"layer1.0.bn1.bias", b"layer1.0.bn1.biar", 1))
    return path


def deflated(folder: Path, source: fr.CifarResNet) -> Path:
    """A zip whose entries are compressed: this one has a thousandth of what it unpacks to."""
    path = folder / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(2**26))
    return path


def integers(folder: Path, source: fr.CifarResNet) -> Path:
    state = source.state_dict()
    torch.save(state | {"linear.bias": state["linear.bias"].to(torch.int8)}, folder / "int8.pth")
    return folder / "int8.pth"


WRONG = {
    flipped: "truncated or not a file of weights",
    flipped_name: "truncated or not a file of weights",
    deflated: "truncated or not a file of weights",
    integers: "linear.bias: expected a dense tensor of real numbers, got torch.int8",
    nothing: "there is no such file",
    truncated: "truncated or not a file of weights",
    truncated_safetensors: "truncated or not a file of weights",
    empty: "truncated or not a file of weights",
    text: "truncated or not a file of weights",
    code: "holds code or objects other than tensors",
    code_in_an_old_file: "holds code or objects other than tensors",
    whole_module: "holds code or objects other than tensors",
    list_of_tensors: "expected a dict of tensors .* got list",
    numbers: "expected tensors only, got int under 'epoch'",
    other_network: r"72 unexpected \(layer1.3.conv1.weight",
    other_classes: r"linear.weight has shape \(7, 64\), expected \(10, 64\)",
}


@pytest.mark.parametrize("make", WRONG, ids=lambda f: f.__name__)
def test_wrong_files(tmp_path: Path, source: fr.CifarResNet, make) -> None:
    path = make(tmp_path, source)
    with pytest.raises(ValueError, match=WRONG[make]) as caught:
        fr.cifar_resnet(20, weights=path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not (tmp_path / "ran").exists()


def test_the_legacy_format_says_that_it_has_no_checksums(
    tmp_path: Path, source: fr.CifarResNet
) -> None:
    path = tmp_path / "old.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match=r"old.pth': the format .* has no checksums"):
        assert_loaded(fr.cifar_resnet(20, weights=path), source)


def test_missing_keys_are_named(source: fr.CifarResNet) -> None:
    state = {k: v for k, v in source.state_dict().items() if k != "bn1.weight"}
    with pytest.raises(ValueError, match=r"cifar_resnet20: weights dict .* 1 missing \(bn1.weight"):
        fr.cifar_resnet(20, weights=state)


def test_wrong_sources() -> None:
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V9'.*for resnet50 \(IMAGENET1K_V1, IMAGE"):
        fr.resnet50(weights="IMAGENET1K_V9")
    with pytest.raises(ValueError, match="neither a file nor one of torchvision's weights"):
        load_weights("no_such_name")
    with pytest.raises(TypeError, match=r"weights: expected a path, .* got int"):
        load_weights(3)
    with pytest.raises(ValueError, match=r"expected a dict of tensors .* got an empty one"):
        load_weights({})


@pytest.mark.parametrize("spelling", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "enum"])
def test_torchvisions_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    """The file that torchvision would download is put into its cache."""
    models = pytest.importorskip("torchvision.models")
    entry = models.ResNet18_Weights.IMAGENET1K_V1
    torch.manual_seed(6)
    state = models.resnet18().state_dict()

    def get_state_dict(self, *args, **kwargs):
        assert (self, kwargs["check_hash"]) == (entry, True)
        return state

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", get_state_dict)
    model = fr.resnet18(weights=entry if spelling == "enum" else spelling)
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value)
    with pytest.raises(ValueError, match="num_classes: expected 1000 for these weights, got 10"):
        fr.resnet18(weights=entry, num_classes=10)

    def no_network(self, *args, **kwargs):
        raise OSError("name resolution failed")

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", no_network)
    with pytest.raises(RuntimeError, match=r"download failed .* give weights= the path of a file"):
        fr.resnet18(weights=entry)


def test_torchvision_is_imported_for_its_names_only(tmp_path: Path) -> None:
    script = (
        "import sys, torch, fused_resnet as fr; "
        f"m = fr.cifar_resnet(20); torch.save(m.state_dict(), {str(tmp_path / 'w.pth')!r}); "
        f"fr.cifar_resnet(20, weights={str(tmp_path / 'w.pth')!r}); "
        "f = fr.freeze(fr.fuse(fr.resnet18(num_classes=2))); f(torch.zeros(1, 3, 32, 32)); "
        "assert 'torchvision' not in sys.modules"
    )
    warm_process.run(["-c", script], check=True)
