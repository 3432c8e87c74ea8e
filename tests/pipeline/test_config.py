"""The configuration tree: TOML in and out, refusals, fingerprints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from glow import RealNVPConfig
from jobs.presets import PRESETS
from pipeline.bounds import BOUNDS, refuse_out_of_bounds
from pipeline.config import TrainConfig, read_config, refuse_impossible, write_config
from pipeline.errors import ConfigError
from pipeline.fingerprint import fingerprint


def changed(path: str, value: Any) -> TrainConfig:
    """The default tree with one value changed."""
    table, _, key = path.rpartition(".")
    config = TrainConfig()
    if not table:
        return replace(config, **{key: value})
    return replace(config, **{table: replace(getattr(config, table), **{key: value})})


def written(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_toml_gives_the_same_tree_back(name: str, tmp_path: Path) -> None:
    config = PRESETS[name].config
    assert read_config(written(tmp_path, write_config(config))) == config


def test_a_file_is_laid_over_a_preset_key_by_key(tmp_path: Path) -> None:
    base = PRESETS["toy32"].config
    found = read_config(written(tmp_path, "seed = 7\n[optim]\nlr = 1\n[memory]\nanchor_every = [4, 0]\n"), base)
    wanted = replace(base, seed=7, optim=replace(base.optim, lr=1.0), memory=replace(base.memory, anchor_every=(4, 0)))
    assert found == wanted


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("sed = 1", "no setting sed; did you mean seed?"),
        ("[optim]\nlrr = 1e-3", "no setting optim.lrr; did you mean optim.lr?"),
        ("[model]\nhidden = 3", "no setting model.hidden; known here: size, channels"),
        ('[optim]\nlr = "fast"', "optim.lr: input should be a valid number"),
        ('[schedule]\nimages = "9"', "schedule.images: input should be a valid integer"),
        ('[model]\ncoupling = "cubic"', "model.coupling: input should be 'affine' or 'additive'"),
        ("optim = 3", "optim: "),
        ("[optim", "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_one_line_with_the_place(text: str, finding: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, text))
    assert finding in str(caught.value)
    assert "own.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("data.bits", 5),
        ("data.train", "other"),
        ("model.steps", 3),
        ("optim.lr", 0.5),
        ("optim.guard_factor", 3.0),
        ("schedule.batch", 64),
        ("schedule.leaf", 4),
        ("schedule.init_images", 64),
    ],
)
def test_what_changes_learning_changes_the_fingerprint(path: str, value: Any) -> None:
    assert fingerprint(changed(path, value), "data") != fingerprint(TrainConfig(), "data")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("storage", "elsewhere"),
        ("data.prefix", "s3://elsewhere"),
        ("data.cache", "/tmp"),
        ("memory.anchor_every", (4,)),
        ("schedule.reduction", "overlap"),
        ("schedule.status_every", 7),
        ("schedule.keep", 9),
        ("schedule.images", 7),
        ("cluster.workers", 3),
        ("cluster.min_workers", 3),
        ("cluster.threads", 3),
        ("evaluate.every", 7),
        ("tracking.uri", "http://elsewhere"),
    ],
)
def test_what_does_not_change_learning_leaves_the_fingerprint(path: str, value: Any) -> None:
    assert fingerprint(changed(path, value), "data") == fingerprint(TrainConfig(), "data")


def test_the_length_counts_where_the_rate_follows_from_it() -> None:
    cosine = changed("optim.decay", "cosine")
    longer = replace(cosine, schedule=replace(cosine.schedule, images=7))
    assert fingerprint(cosine, "data") != fingerprint(longer, "data")
    assert fingerprint(cosine, "data") != fingerprint(cosine, "other data")


def test_the_fingerprint_of_a_tree_is_final() -> None:
    """Golden: runs that exist are found again by it; it changes with ALGORITHM_VERSION, on purpose."""
    golden = "51fa38d737a71f5d36470ce57f4aa749614ebc764f59c7be70b2ccbc6a9462f7"
    assert fingerprint(TrainConfig(), "x") == golden


@pytest.mark.parametrize(
    ("path", "value", "finding"),
    [
        ("data.bits", 9, "data.bits is 9"),
        ("schedule.leaf", 5, "does not divide"),
        ("schedule.leaf", 0, "schedule.leaf is 0; images, 1 or more"),
        ("schedule.images", 0, "schedule.images is 0"),
        ("schedule.checkpoint_every", 0, "never comes round"),
        ("evaluate.every", 0, "never comes round"),
        ("schedule.keep", 0, "schedule.keep is 0"),
        ("optim.lr", 0.0, "optim.lr is 0.0; finite, above 0"),
        ("optim.beta1", 1.0, "optim.beta1 is 1.0; 0 or more, below 1"),
        ("optim.ema_halflife", 0, "ema_halflife is 0"),
        ("cluster.workers", 5, "5 workers for 4 leaves"),
        ("cluster.min_workers", 1, "cluster.min_workers is 1"),
        ("cluster.address", "10.0.0.1:6379", "cluster.workers is 0"),
        ("tracking.uri", "http://user:secret@host", "^tracking.uri holds a password"),
        ("tracking.uri", "postgresql://host/db?password=secret", "^tracking.uri holds a password"),
        ("name", "a/b", "name is 'a/b'"),
        ("name", r"a\b", "a folder name"),
        ("name", "", "name is ''"),
        ("name", "a" * 300, "name is 'a+'...; a folder name of at most 200 bytes"),
        ("name", "ü" * 101, "at most 200 bytes"),
        ("name", "two\nlines", r"name is 'two\\nlines'"),
        ("memory.anchor_every", (), "memory.anchor_every is empty"),
        ("memory.anchor_every", (4, -1), "memory.anchor_every is -1"),
        ("evaluate.temperatures", (0.7, math.nan), "evaluate.temperatures is nan"),
        ("seed", 2**64, "seed is 18446744073709551616; a whole number of 64 bits"),
    ],
)
def test_impossible_values_are_refused(path: str, value: Any, finding: str) -> None:
    with pytest.raises(ConfigError, match=finding):
        refuse_impossible(changed(path, value))


def numeric(config: Any, path: str = "") -> dict[str, type]:
    """Name with dots -> int or float, of every setting whose declared type takes a number."""
    found: dict[str, type] = {}
    for name, kind in get_type_hints(type(config)).items():
        if dataclasses.is_dataclass(value := getattr(config, name)):
            found |= numeric(value, f"{path}{name}.")
        found |= [(path + name, number) for number in (int, float) if number in within(kind)]
    return found


def within(kind: Any) -> list[Any]:
    """A type, and those that it is made of."""
    return [kind, *(part for some in get_args(kind) for part in within(some))]


NUMBERS = numeric(TrainConfig()) | numeric(TrainConfig(model=RealNVPConfig()))


def test_every_number_has_a_row_of_bounds_and_every_row_a_number() -> None:
    assert BOUNDS.keys() == NUMBERS.keys()


@pytest.mark.parametrize("path", NUMBERS)
def test_no_number_out_of_its_bounds_reaches_a_run(path: str) -> None:
    least, most, words = BOUNDS[path]
    table, key = path.split(".") if "." in path else ("", path)
    base = TrainConfig(model=RealNVPConfig()) if key in ("residuals", "constraint") else TrainConfig()
    default = getattr(getattr(base, table) if table else base, key)

    def having(value: float) -> TrainConfig:
        changes = {key: (value,) if isinstance(default, tuple) else value}
        return replace(base, **({table: replace(getattr(base, table), **changes)} if table else changes))

    for value in (least, most):
        refuse_out_of_bounds(having(value))
    whole = NUMBERS[path] is int
    for value in (least - 1, most + 1 if whole else math.inf, -math.inf, math.nan):
        with pytest.raises(ConfigError) as caught:
            refuse_impossible(having(value))
        assert str(caught.value) == f"{path} is {value}; {words}"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_possible(name: str) -> None:
    config = PRESETS[name].config
    refuse_impossible(config)
    assert config.name == name
    assert dataclasses.asdict(config)["model"]["levels"] > 1
