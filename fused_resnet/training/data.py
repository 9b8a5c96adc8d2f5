"""Data sets: torchvision's classes, folders of images and files of arrays, all as one kind."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.optional import library
from .errors import TrainingError
from .seeds import drawn_from, mixed
from .settings import Settings

#: torchvision's data sets by the names that ``--data`` takes: class, height and width of an image.
BUILT_IN = {
    "cifar10": ("CIFAR10", 32),
    "cifar100": ("CIFAR100", 32),
    "fashion_mnist": ("FashionMNIST", 28),
}

#: Mean and standard deviation of ImageNet's channels, which torchvision's weights are trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

#: Images from which the channels' mean and standard deviation are taken.
_SAMPLE = 10_000


@dataclass(frozen=True)
class Unreadable:
    """An image that can't be read; a worker process returns it in place of a batch.

    Attributes:
        what: The file, or the image's number, and why.
    """

    what: str


class Images(torch.utils.data.Dataset[Any]):
    """Images and labels; an item's random numbers depend on the seed, its epoch and its index.

    Args:
        read: Returns the image of an index, as a uint8 tensor ``(C, H, W)`` or a PIL image, and its
            label.
        name: Returns what an index is called in a message.
        count: Number of images.
        transform: A v2 transform from an image to a uint8 tensor ``(3, H, W)``.
        seed: Seed of the run.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, int]],
        name: Callable[[int], str],
        count: int,
        transform: Callable[[Any], Tensor],
        seed: int,
    ) -> None:
        self.read, self.name, self.count = read, name, count
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Unreadable:
        epoch, index = key
        try:
            image, label = self.read(index)
        except Exception as error:  # Pillow's decoders raise anything on a damaged file
            why = getattr(error, "strerror", None) or "the file is damaged or no picture"
            return Unreadable(f"{self.name(index)}: {why}")
        with drawn_from(mixed(self.seed, epoch, index)):
            return self.transform(image), int(label)


@dataclass(frozen=True)
class Data:
    """What a run trains on.

    Attributes:
        train: The training images, augmented.
        val: The images that the network is validated on.
        classes: Names of the classes.
        size: Height and width of an image.
        mean: Mean of each channel, of values from 0 to 1.
        std: Standard deviation of each channel, of values from 0 to 1.
        resize: Length that the shorter side of another image is resized to before its centre is
            cropped to ``size``, as the validation images are.
    """

    train: Images
    val: Images
    classes: list[str]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int

    def facts(self) -> dict[str, Any]:
        """What the same data have in common, wherever they are."""
        numbers = [round(value, 5) for value in (*self.mean, *self.std)]
        return {
            "images": [len(self.train), len(self.val)],
            "size": self.size,
            "normalisation": numbers,
        }


def collate(items: Sequence[Any]) -> tuple[Tensor, Tensor] | Unreadable:
    """A batch: uint8 images ``(N, 3, H, W)`` and labels ``(N,)``, or the first unreadable image.

    Args:
        items: Items of :class:`Images`.
    """
    for item in items:
        if isinstance(item, Unreadable):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


def load(settings: Settings) -> Data:
    """Open the data set of a run.

    Args:
        settings: Settings of the run.

    Raises:
        TrainingError: There is no such data set, it is not complete, or a class is missing in
            ``val``.
        MissingPackageError: torchvision is not installed.
    """
    if settings.data in BUILT_IN:
        return _built_in(settings)
    path = Path(settings.data)
    if path.suffix == ".npz":
        return _archive(settings, path)
    if path.is_dir():
        return _folder(settings, path)
    raise TrainingError(
        f"data {settings.data!r}: expected a folder with train/ and val/, an .npz file, or one of "
        f"{', '.join(BUILT_IN)}"
    )


def _built_in(settings: Settings) -> Data:
    name, size = BUILT_IN[settings.data]
    cls = getattr(library("torchvision", "train").datasets, name)
    parts = []
    for train in (True, False):
        try:
            parts.append(cls(settings.data_root, train=train, download=settings.download))
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            hint = "" if settings.download else "; --download fetches it"
            raise TrainingError(
                f"data {settings.data!r} in {settings.data_root!r}: {why}{hint}"
            ) from None
        except OSError as error:
            raise TrainingError(f"data {settings.data!r}: the download failed ({error})") from None
    arrays = [(np.asarray(part.data), np.asarray(part.targets)) for part in parts]
    return _arrays(settings, arrays, list(parts[0].classes), size)


def _archive(settings: Settings, path: Path) -> Data:
    what = f"data {str(path)!r}"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise TrainingError(f"{what}: there is no such file") from None
    except Exception as error:  # a damaged file can raise anything
        raise TrainingError(f"{what}: damaged, or not an archive of arrays") from error
    arrays = []
    for names in (("train",), ("val", "test")):
        part = next((n for n in names if f"{n}_labels" in found), None)
        if part is None:
            raise TrainingError(
                f"{what}: no {names[0]}_labels in it; expected train_images, train_labels, "
                "val_images (or test_images), val_labels, or JPEG files as train_jpeg and "
                "train_offsets"
            )
        labels = _labels(found[f"{part}_labels"].reshape(-1), f"{what}: {part}_labels")
        images = _pixels(found, part, what)
        if len(images) != len(labels):
            raise TrainingError(f"{what}: {len(images)} {part} images and {len(labels)} labels")
        arrays.append((images, labels))
    count = int(max(labels.max(initial=0) for _, labels in arrays)) + 1
    most = sum(len(labels) for _, labels in arrays)
    if count > max(most, 1):  # before so many names are made
        raise TrainingError(f"{what}: {most} images and a label of {count - 1}")
    classes = [str(name) for name in np.atleast_1d(found.get("classes", np.arange(count)))]
    if len(classes) < count:
        raise TrainingError(f"{what}: {len(classes)} names of classes and a label of {count - 1}")
    sizes = [images.shape[1:3] for images, _ in arrays]
    # Others would be served differently: resized by their shorter side, and cropped.
    if any(h != w for h, w in sizes) or (len(set(sizes)) > 1 and settings.size is None):
        (h, w), (val_h, val_w) = sizes
        raise TrainingError(
            f"{what}: expected square images, and of one size without --size, got {h}x{w} to train "
            f"and {val_h}x{val_w} to validate"
        )
    return _arrays(settings, arrays, classes, arrays[0][0].shape[1])


def _labels(given: Any, what: str) -> Any:
    """Labels of an archive as integers; the loss would fail on others, or round them."""
    right = given.dtype.kind in "biuf"
    if not right or not ((given >= 0) & (given < 2**31) & (given == np.floor(given))).all():
        raise TrainingError(f"{what}: expected whole numbers from 0 on, below 2**31")
    return given.astype(np.int64)


def _pixels(found: dict[str, Any], part: str, what: str) -> Any:
    """Images of a part of an archive, ``(N, H, W)`` or ``(N, H, W, 3)``."""
    images = found.get(f"{part}_images")
    if images is None and f"{part}_jpeg" in found and f"{part}_offsets" in found:
        image = library("PIL.Image", "train")
        jpeg, offsets = found[f"{part}_jpeg"], found[f"{part}_offsets"]
        decoded = []
        for i, (start, stop) in enumerate(pairwise(offsets.reshape(-1).tolist())):
            try:
                with image.open(io.BytesIO(jpeg[start:stop].tobytes())) as picture:
                    decoded.append(np.asarray(picture.convert("RGB")))
            except Exception as error:  # Pillow's decoders raise anything on damaged data
                raise TrainingError(f"{what}: {part} image {i} can't be read") from error
        if len({picture.shape for picture in decoded}) != 1:
            raise TrainingError(f"{what}: {part}_jpeg: expected images of one size")
        images = np.stack(decoded)
    if images is None or images.dtype != np.uint8 or not _are_images(images.shape):
        got = "nothing" if images is None else f"{images.dtype} of shape {images.shape}"
        raise TrainingError(
            f"{what}: {part}_images: expected uint8 (N, H, W) or (N, H, W, 3), got {got}"
        )
    return images


def _are_images(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 3 and shape[3:] in ((), (3,)) and 0 not in shape[1:]


def _arrays(settings: Settings, arrays: list[Any], classes: list[str], size: int) -> Data:
    """Data in memory; its normalisation is that of its training images."""
    tensors = []
    for images, labels in arrays:
        if images.ndim == 3:
            images = np.repeat(images[..., None], 3, axis=3)
        channels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        tensors.append((channels, torch.from_numpy(np.asarray(labels, dtype=np.int64))))
    _require_all_classes(
        [{int(label) for label in labels.tolist()} for _, labels in tensors], classes, settings
    )
    sample = tensors[0][0][:_SAMPLE].double() / 255
    mean, std = sample.mean((0, 2, 3)).tolist(), sample.std((0, 2, 3)).tolist()
    std = [value or 1.0 for value in std]
    v2 = library("torchvision.transforms.v2", "train")
    resize = [] if settings.size in (None, size) else [v2.Resize([settings.size] * 2)]
    size = settings.size or size
    augment = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    parts = []
    for (images, labels), word, more in zip(
        tensors, ("training", "validation"), (augment if settings.augment else [], []), strict=True
    ):
        steps = [*resize, *more] or [v2.Identity()]
        parts.append(
            Images(
                _ArrayReader(images, labels),
                f"{word} image {{}}".format,
                len(labels),
                v2.Compose(steps),
                settings.seed,
            )
        )
    return Data(parts[0], parts[1], classes, size, tuple(mean), tuple(std), size)


@dataclass
class _ArrayReader:
    images: Tensor
    labels: Tensor

    def __call__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def _folder(settings: Settings, path: Path) -> Data:
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise TrainingError(f"data {settings.data!r}: no folder {part}/ in it")
    torchvision = library("torchvision", "train")
    v2 = library("torchvision.transforms.v2", "train")
    size = settings.size or 224
    resize = size * 256 // 224
    plain = [v2.Resize(resize, antialias=True), v2.CenterCrop(size)]
    random = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    parts, classes = [], []
    for part, steps in (("train", random if settings.augment else plain), ("val", plain)):
        try:
            files = torchvision.datasets.ImageFolder(str(path / part), allow_empty=True)
        except OSError as error:
            why = error.strerror or str(error).splitlines()[0]
            raise TrainingError(f"data {settings.data!r}: {part}/: {why}") from None
        classes.append(files.classes)
        parts.append((files, v2.Compose([*steps, v2.PILToTensor()])))
    names = classes[0]
    extra = [name for name in classes[1] if name not in names]
    if extra:
        raise TrainingError(f"data {settings.data!r}: class {extra[0]!r} of val/ is not in train/")
    labels = []
    for files, _ in parts:  # val/ may lack folders, so its labels are train/'s numbers
        files.samples = [(f, names.index(files.classes[label])) for f, label in files.samples]
        labels.append({label for _, label in files.samples})
    _require_all_classes(labels, names, settings)
    train, val = (
        Images(_FileReader(files), _FileName(files), len(files), transform, settings.seed)
        for files, transform in parts
    )
    return Data(train, val, names, size, *IMAGENET, resize)


@dataclass
class _FileReader:
    files: Any

    def __call__(self, index: int) -> tuple[Any, int]:
        path, label = self.files.samples[index]
        return self.files.loader(path), label


@dataclass
class _FileName:
    files: Any

    def __call__(self, index: int) -> str:
        return f"image {self.files.samples[index][0]!r}"


def _require_all_classes(
    labels: Sequence[set[int]], classes: Sequence[str], settings: Settings
) -> None:
    for part, found in zip(("train", "val"), labels, strict=True):
        missing = [name for i, name in enumerate(classes) if i not in found]
        if missing:
            raise TrainingError(
                f"data {settings.data!r}: {part} has no image of class {missing[0]!r}"
                + (f" and of {len(missing) - 1} more" if len(missing) > 1 else "")
            )
