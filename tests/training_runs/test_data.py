"""Data sets and batches: what is read, in which order, and what is said if it can't be."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch

from fused_resnet.training import TrainingError, batches, data
from fused_resnet.training.seeds import mixed

pytest.importorskip("torchvision", reason="torchvision's transforms are what is run")


def read(found: data.Images, keys: list[tuple[int, int]], workers: int = 0) -> torch.Tensor:
    return next(iter(batches.loader(found, [keys], workers)))[0]


def test_an_archive(tmp_path: Path) -> None:
    found = data.load(tiny_data.settings(tiny_data.archive(tmp_path / "a.npz"), tmp_path))
    images, labels = tiny_data.pixels("val")
    for i in (0, 5):
        image, label = found.val[0, i]
        assert torch.equal(image, torch.from_numpy(images[i]).permute(2, 0, 1))
        assert label == labels[i]
    train = tiny_data.pixels("train")[0] / 255
    np.testing.assert_allclose(found.mean, train.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, train.std((0, 1, 2)), rtol=1e-3)
    assert found.classes == ["0", "1", "2"]
    assert found.size == tiny_data.SIZE


def test_grey_images_get_three_channels(tmp_path: Path) -> None:
    grey = {f"{part}_images": tiny_data.pixels(part)[0][..., 0] for part in tiny_data.COUNT}
    found = data.load(tiny_data.settings(tiny_data.archive(tmp_path / "a.npz", **grey), tmp_path))
    image, _ = found.val[0, 3]
    expected = torch.from_numpy(grey["val_images"][3])
    assert torch.equal(image, expected.expand(3, -1, -1))


def test_jpeg_files_in_an_archive(tmp_path: Path) -> None:
    found = data.load(tiny_data.settings(tiny_data.jpeg_archive(tmp_path / "a.npz"), tmp_path))
    exact = torch.from_numpy(tiny_data.pixels("val")[0][4]).permute(2, 0, 1).float()
    assert (found.val[0, 4][0].float() - exact).abs().max() < 4
    assert found.val[0, 4][1] == 4 % 3


def test_a_folder(tmp_path: Path) -> None:
    place = tiny_data.folder(tmp_path / "photos")
    found = data.load(tiny_data.settings(place, tmp_path, size=8))
    assert found.classes == ["class0", "class1", "class2"]
    image, label = found.train[0, 0]
    assert (image.shape, image.dtype, label) == ((3, 8, 8), torch.uint8, 0)
    assert found.val[0, 13][1] == 2
    assert (found.mean, found.std) == data.IMAGENET


def test_augmentation_belongs_to_seed_epoch_and_image(tmp_path: Path) -> None:
    """Not to the order, the number of workers, or what else drew random numbers."""
    archive = tiny_data.archive(tmp_path / "a.npz")
    found = data.load(tiny_data.settings(archive, tmp_path)).train
    keys = [(1, 4), (1, 7), (2, 4)]
    first = read(found, keys)
    torch.rand(5)
    before = torch.get_rng_state()
    assert torch.equal(read(found, keys[::-1]).flip(0), first)
    assert torch.equal(read(found, keys, workers=1), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first[0], first[2])
    other = data.load(tiny_data.settings(archive, tmp_path, seed=1)).train
    assert not torch.equal(read(other, keys), first)
    plain = data.load(tiny_data.settings(archive, tmp_path, augment=False)).train
    assert torch.equal(read(plain, keys)[0], read(plain, keys)[2])


def test_a_crop_is_a_part_of_the_padded_image(tmp_path: Path) -> None:
    found = data.load(tiny_data.settings(tiny_data.archive(tmp_path / "a.npz"), tmp_path)).train
    original = torch.from_numpy(tiny_data.pixels("train")[0][6]).permute(2, 0, 1)
    padded = torch.nn.functional.pad(original, [1] * 4)
    crops = [padded[:, y : y + 12, x : x + 12] for y in range(3) for x in range(3)]
    allowed = [*crops, *(crop.flip(2) for crop in crops)]
    seen = {
        next(i for i, crop in enumerate(allowed) if torch.equal(crop, found[epoch, 6][0]))
        for epoch in range(40)
    }
    assert len(seen) > 9


def test_processes_share_each_batch() -> None:
    """Side by side they are the batch of one process; a resumed epoch is its end."""
    whole = list(batches.TrainBatches(40, 12, 3, 1, 0, 0, 1))
    parts = [list(batches.TrainBatches(40, 12, 3, 1, 0, rank, 2)) for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]
    assert len(whole) == 3
    indices = [index for batch in whole for _, index in batch]
    assert len(set(indices)) == 36
    assert indices != sorted(indices)
    resumed = batches.TrainBatches(40, 12, 3, 1, 2, 0, 1)
    assert list(resumed) == whole[2:]
    assert len(resumed) == 1
    assert list(batches.TrainBatches(40, 12, 3, 2, 0, 0, 1)) != whole
    val = [list(batches.ValBatches(7, 2, rank, 2)) for rank in (0, 1)]
    assert sorted(index for part in val for batch in part for _, index in batch) == list(range(7))
    assert len(batches.ValBatches(7, 2, 0, 2)) == len(val[0]) == 2


def test_seeds_of_neighbours_differ() -> None:
    seeds = {
        mixed(seed, epoch, index) for seed in range(9) for epoch in range(9) for index in range(9)
    }
    assert len(seeds) == 9**3
    assert mixed(0, 1) != mixed(1, 0) != mixed(0, 0, 1)


def missing_class(place: Path) -> None:
    shutil.rmtree(place / "val" / "class1")


def empty_class(place: Path) -> None:
    for file in (place / "val" / "class1").iterdir():
        file.unlink()


def other_class(place: Path) -> None:
    (place / "val" / "class1").rename(place / "val" / "class9")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_class, "val has no image of class 'class1'"),
        (empty_class, "val has no image of class 'class1'"),
        (other_class, "class 'class9' of val/ is not in train/"),
        (lambda place: shutil.rmtree(place / "val"), "no folder val/ in it"),
    ],
)
def test_incomplete_folders(spoil, message: str, tmp_path: Path) -> None:
    place = tiny_data.folder(tmp_path / "photos")
    spoil(place)
    with pytest.raises(TrainingError, match=message):
        data.load(tiny_data.settings(place, tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"val_labels": np.zeros(14, int)}, "val has no image of class '1' and of 1 more"),
        ({"val_labels": np.zeros(3, int)}, "14 val images and 3 labels"),
        ({"train_images": np.zeros((40, 3))}, r"train_images: expected uint8 \(N, H, W\)"),
        ({"train_images": np.zeros((40, 9, 9, 4), np.uint8)}, r"uint8 of shape \(40, 9, 9, 4\)"),
        ({"train_images": np.zeros((40, 0, 9, 3), np.uint8)}, r"uint8 of shape \(40, 0, 9, 3\)"),
        ({"train_labels": np.arange(40) % 4 - 1}, "train_labels: expected whole numbers from 0"),
        ({"train_labels": np.full(40, 0.5)}, "train_labels: expected whole numbers from 0"),
        ({"train_labels": np.full(40, np.nan)}, "train_labels: expected whole numbers from 0"),
        ({"train_labels": np.array(["cat"] * 40)}, "train_labels: expected whole numbers from 0"),
        ({"train_labels": np.full(40, 2**31 - 1)}, "54 images and a label of 2147483647"),
        ({"classes": np.array(["a"])}, "1 names of classes and a label of 2"),
    ],
)
def test_wrong_archives(more, message: str, tmp_path: Path) -> None:
    file = tiny_data.archive(tmp_path / "a.npz", **more)
    with pytest.raises(TrainingError, match=message):
        data.load(tiny_data.settings(file, tmp_path))


@pytest.mark.parametrize("count", [0, 2])
def test_jpeg_files_of_several_sizes_or_none(count: int, tmp_path: Path) -> None:
    from PIL import Image

    files = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8 + i, 8)).save(file, "JPEG")
        files.append(file.getvalue())
    np.savez(
        tmp_path / "a.npz",
        train_jpeg=np.frombuffer(b"".join(files), np.uint8),
        train_offsets=np.cumsum([0, *map(len, files)]),
        train_labels=np.zeros(count, int),
    )
    with pytest.raises(TrainingError, match="train_jpeg: expected images of one size"):
        data.load(tiny_data.settings(tmp_path / "a.npz", tmp_path))


def test_data_that_is_not_there(tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name, message in (
        ("none.npz", "there is no such file"),
        ("broken.npz", "damaged, or not an archive"),
        ("other.npz", "no train_labels in it"),
        ("nothing", "expected a folder with train/ and val/"),
    ):
        with pytest.raises(TrainingError, match=message):
            data.load(tiny_data.settings(tmp_path / name, tmp_path))
    missing = tiny_data.settings("cifar10", tmp_path, data_root=str(tmp_path))
    with pytest.raises(TrainingError, match=r"Dataset not found .*--download fetches it"):
        data.load(missing)


def test_torchvisions_data_sets(tmp_path: Path) -> None:
    """FashionMNIST's own files, with four grey images in each part."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.arange(10, dtype=np.uint8)
    for part in ("train", "t10k"):
        pixels = np.full((10, 28, 28), 7, np.uint8)
        header = [b"\0\0\x08\x03", *(n.to_bytes(4, "big") for n in pixels.shape)]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"".join(header) + pixels.tobytes())
        header = [b"\0\0\x08\x01", (10).to_bytes(4, "big")]
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"".join(header) + labels.tobytes())
    found = data.load(tiny_data.settings("fashion_mnist", tmp_path, data_root=str(tmp_path)))
    assert found.classes[0] == "T-shirt/top"
    image, label = found.val[0, 3]
    assert (image.shape, label) == ((3, 28, 28), 3)
    assert (image == 7).all()
