"""Settings, recipes, and how the command's options are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_resnet import training
from fused_resnet.cli import _common, _settings, train
from fused_resnet.training import Settings, recipe

GIVEN = {"model": "resnet18", "data": "photos", "out": "run"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"epochs": 1.5}, "epochs: expected a whole number, got 1.5"),
        ({"batch": True}, "batch: expected a whole number, got True"),
        ({"lr": 0}, "lr: expected above 0, got 0.0"),
        ({"lr": float("nan")}, "lr: expected a finite number, got nan"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"ema": 1}, "ema: expected below 1, got 1.0"),
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adamw, rmsprop, got 'lion'"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, float64"),
        ({"unfused": 1}, "unfused: expected true or false, got 1"),
        ({"drops": (0.75, 0.5)}, r"drops: expected ascending fractions, got \(0.75, 0.5\)"),
        ({"drops": (0.5, 1)}, "drops: expected below 1, got 1.0"),
        ({"nesterov": True, "momentum": 0}, "nesterov: needs the optimizer sgd"),
        ({"data": ""}, "data: expected one, got nothing"),
        ({"speed": 1}, "unknown setting 'speed'; expected one of model, data"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training.from_mapping({**GIVEN, **wrong})


def test_values_become_their_types() -> None:
    found = training.from_mapping({**GIVEN, "weight-decay": "1e-4", "lr": 1, "drops": [0.3, 0.6]})
    assert (found.weight_decay, found.lr, found.drops) == (1e-4, 1.0, (0.3, 0.6))


def test_recipes_are_read_and_written(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text("lr: 1e-2\nlabel-smoothing: 0.1\ndrops: [0.5]\n")
    (tmp_path / "a.toml").write_text("lr = 0.01\nlabel-smoothing = 0.1\ndrops = [0.5]\n")
    one, other = (
        training.from_mapping({**GIVEN, **training.read_recipe(str(tmp_path / f"a.{suffix}"))})
        for suffix in ("yaml", "toml")
    )
    assert one == other == Settings(**GIVEN, lr=0.01, label_smoothing=0.1, drops=(0.5,))
    recipe.write(tmp_path / "recipe.yaml", one, {"processes": 1})
    assert training.from_mapping(training.read_recipe(str(tmp_path / "recipe.yaml"))) == one


def test_shipped_recipes() -> None:
    """With the numbers of their sources."""
    pytest.importorskip("yaml")
    assert training.SHIPPED == ("cifar10-paper", "fine-tune", "imagenet-v1")
    found = {
        name: training.from_mapping({**GIVEN, **training.read_recipe(name)})
        for name in training.SHIPPED
    }
    paper, imagenet = found["cifar10-paper"], found["imagenet-v1"]
    steps = paper.epochs * (50_000 // paper.batch)
    assert steps == pytest.approx(64_000, rel=0.01)
    assert [round(f * steps, -3) for f in paper.drops] == [32_000, 48_000]
    assert [f * imagenet.epochs for f in imagenet.drops] == pytest.approx([30, 60], abs=1e-4)
    assert found["fine-tune"].ema > 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.yaml", None, "recipe '.*none.yaml': No such file"),
        ("list.yaml", "- 1\n", "expected a table of settings"),
        ("broken.yaml", "a: [1\n", "recipe '.*broken.yaml': while parsing"),
        ("broken.toml", "a = \n", "recipe '.*broken.toml': Invalid value"),
        ("recipe.json", "{}", "expected a .yaml or .toml file, or one of cifar10-paper"),
    ],
)
def test_wrong_recipes_are_named(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        training.read_recipe(str(tmp_path / name))


def test_options_count_more_than_the_recipe() -> None:
    pytest.importorskip("yaml")
    parser = _common.Parser()
    train.add(parser.add_subparsers())
    typed = "train resnet50 --data photos --out run --recipe fine-tune --lr 0.5 --contiguous"
    arguments = parser.parse_args([*typed.split(), "--drops", "0.25,0.5", "--no-augment"])
    found = train._read(arguments)
    assert (found.model, found.lr, found.epochs, found.ema) == ("resnet50", 0.5, 5, 0.99)
    assert found.drops == (0.25, 0.5)
    assert not found.channels_last
    assert not found.augment
    assert found.deterministic


def test_every_setting_is_an_option() -> None:
    parser = _common.Parser()
    _settings.add(parser, train.OPTIONS)
    names = {action.dest for action in parser._actions} - {"help"}
    assert names | {"model", "data", "out"} == set(Settings.__dataclass_fields__)
