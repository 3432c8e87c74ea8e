"""Promotion: gates before the ledger, the ledger before the alias, one winner, and nothing lost by a kill."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pipeline.comparison import compare
from pipeline.errors import ConfigError, ConflictError, DataError, GateError, UsageError
from pipeline.gates import Evidence, Limits, judge, read_limits
from pipeline.model import LoadedModel
from pipeline.promotion import Request, rollback, verify_ledger
from pipeline.registry import ModelRegistry, load_model
from tests.mlflow_db import MLFLOW_NOISE, fresh_database
from tests.pipeline.models import write_tiny
from tests.pipeline.races import kill_at_boundaries, race_of
from tests.pipeline.versions import LIMITS, by_digest, evaluation, promoted, register, saying

pytestmark = MLFLOW_NOISE


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(fresh_database(tmp_path))


def test_promotion_writes_the_ledger_then_the_alias(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    promotion = promoted(registry, 1, saying(2.0, 2.1), reason="the first")
    (stored,) = (tmp_path / "registry" / "faces").iterdir()
    entry = json.loads(stored.read_bytes())
    assert promotion.entry is not None
    assert (entry["version"], entry["reason"], entry["forced"], entry["replaces"]) == (1, "the first", [], 0)
    assert entry["digest"] == load_model(str(tmp_path / "m")).digest
    assert [gate["passed"] for gate in entry["gates"]] == [True] * 7
    assert registry.resolve("faces", "champion") == 1
    again = promoted(registry, 1, saying(9.0, 9.0))
    assert again.entry == promotion.entry
    assert len(registry.ledger("faces").entries()) == 1


def test_a_worse_version_is_refused_and_nothing_changes(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "a")
    register(registry, tmp_path / "b", seed=1)
    promoted(registry, 1, saying(2.0, 2.1))
    digests = {load_model(str(tmp_path / name)).digest: name for name in "ab"}
    values = {digest: [2.0, 2.1] if name == "a" else [2.3, 2.4] for digest, name in digests.items()}
    shown: list[str] = []
    with pytest.raises(GateError, match="bits_per_dim") as caught:
        promoted(registry, 2, by_digest(values), announce=lambda r: shown.extend(map(str, r)))
    assert caught.value.exit_code == 5
    assert len(shown) == 7
    assert shown[0].startswith("FAILED")
    assert registry.resolve("faces", "champion") == 1
    assert len(registry.ledger("faces").entries()) == 1

    with pytest.raises(UsageError, match="say why"):
        promoted(registry, 2, by_digest(values), forced=("bits_per_dim",))
    forced = promoted(registry, 2, by_digest(values), forced=("bits_per_dim", "worst_class"), reason="better looking")
    assert forced.entry is not None
    assert (forced.entry.forced, forced.entry.reason) == (("bits_per_dim", "worst_class"), "better looking")
    assert registry.resolve("faces", "champion") == 2


def test_a_dry_run_changes_nothing(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    assert promoted(registry, 1, saying(2.0, 2.1), dry_run=True).entry is None
    with pytest.raises(UsageError):
        registry.resolve("faces", "champion")


def test_a_promotion_cut_off_after_the_ledger_is_finished_by_the_next(registry: ModelRegistry, tmp_path: Path) -> None:
    for seed in (0, 1):
        register(registry, tmp_path / f"m{seed}", seed)
    promoted(registry, 1, saying(2.0, 2.1))
    promoted(registry, 2, saying(2.0, 2.1))
    registry.client.set_registered_model_alias("faces", "champion", "1")  # as a crash, or a slower promoter, leaves it
    promoted(registry, 2, saying(2.0, 2.1))
    assert registry.resolve("faces", "champion") == 2


def test_a_version_deleted_in_mlflow_does_not_hold_up_the_other_aliases(
    registry: ModelRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(3):
        register(registry, tmp_path / f"m{seed}", seed)
    promoted(registry, 1, saying(2.0, 2.1), alias="staging")
    promoted(registry, 2, saying(2.0, 2.1))
    registry.client.delete_registered_model_alias("faces", "staging")
    registry.client.delete_model_version("faces", "1")
    promoted(registry, 3, saying(2.0, 2.1))
    assert registry.resolve("faces", "champion") == 3
    assert "models:/faces@staging: version 1 is gone from MLflow" in caplog.text
    assert verify_ledger(registry, "faces", {}) == 3
    registry.client.delete_registered_model_alias("faces", "champion")
    with pytest.raises(DataError, match="champion is no version, the ledger says 3; the next promotion"):
        verify_ledger(registry, "faces", {})
    assert rollback(registry, Request(name="faces", version=0)).entry is not None
    assert registry.resolve("faces", "champion") == 2
    assert verify_ledger(registry, "faces", {}) == 4


def test_a_promotion_overtaken_during_its_gates_loses(registry: ModelRegistry, tmp_path: Path) -> None:
    for seed in (0, 1):
        register(registry, tmp_path / f"m{seed}", seed)

    def slow(loaded: LoadedModel, split: str) -> Evidence:
        promoted(ModelRegistry(registry.uri), 2, saying(2.0, 2.1))
        return saying(2.0, 2.1)(loaded, split)

    with pytest.raises(ConflictError, match="version 2 to champion by"):
        promoted(registry, 1, slow)
    assert registry.resolve("faces", "champion") == 2


@pytest.mark.parametrize("alias", ["Champion", "best one", "", "latest", "v1", "a" * 101])
def test_aliases_are_lower_case_words_that_mlflow_takes(registry: ModelRegistry, alias: str) -> None:
    """One that is written into the ledger and that MLflow then refuses would stop every promotion that follows."""
    with pytest.raises(UsageError, match="alias"):
        promoted(registry, 1, saying(2.0), alias=alias)


def test_what_is_not_about_the_same_data_is_not_compared() -> None:
    mine = evaluation([1.0, 3.0, 1.5, 3.5])
    for other, told in (
        (dataclasses.replace(mine, bits=8), "5-bit images against 8-bit"),
        (evaluation([1.0, 3.0]), "4 images against 2"),
        (dataclasses.replace(mine, labels=(1, 0, 0, 1)), "or of other classes"),
    ):
        with pytest.raises(ConfigError, match=told):
            compare(mine, other)


def test_both_are_judged_on_the_split_of_the_challenger(registry: ModelRegistry, tmp_path: Path) -> None:
    asked: list[str] = []

    def evidence(loaded: LoadedModel, split: str) -> Evidence:
        asked.append(split)
        return saying(2.0, 2.1)(loaded, split)

    for seed, split in ((0, "val"), (1, "test")):
        register(registry, tmp_path / f"m{seed}", seed, validation=split)
    promoted(registry, 1, evidence)
    promoted(registry, 2, evidence)
    assert asked == ["val", "test", "test"]


def test_gates_compare_pair_by_pair_beyond_chance(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))

    def passed(new: list[float], old: list[float], **rest: float) -> dict[str, bool]:
        results = judge(Evidence(loaded, evaluation(new, **rest)), Evidence(loaded, evaluation(old)), LIMITS)
        return {result.gate: result.passed for result in results}

    old = [1.0, 3.0, 1.5, 3.5]
    assert all(passed(old, old).values())
    assert all(passed([v + 0.004 for v in old], old).values())  # within the limit
    worse = passed([v + 0.006 for v in old], old)  # small, but the same for every image: no chance
    assert not worse["bits_per_dim"]
    assert worse["worst_class"]
    assert passed([1.3, 2.8, 1.6, 3.3], old)["bits_per_dim"]  # better or worse by chance
    assert not passed([v + 0.05 * (index % 2) for index, v in enumerate(old)], old)["worst_class"]
    # one class is surely worse, by 0.03, and the other by chance, by 0.1 on the mean
    assert not passed([1.0 + 0.3, 3.0 + 0.03, 1.5 - 0.1, 3.5 + 0.03], old)["worst_class"]
    assert not passed([v + 0.007 + d for v, d in zip(old, (-0.003, 0.003, -0.003, 0.003), strict=True)], old)[
        "bits_per_dim"
    ]  # 0.0070 ± 0.0017: more than the limit, and more than two standard errors
    assert not passed([float("nan"), 1.0], [1.0, 1.0])["bits_per_dim"]
    tight = dataclasses.replace(LIMITS, saturated=0.0)
    bright = dataclasses.replace(evaluation(old), ends=1.0)  # data that is black and white itself
    for each, fine in ((evaluation(old), False), (bright, True)):
        results = judge(Evidence(loaded, each), None, tight)
        assert {result.gate: result.passed for result in results}["saturated"] is fine
    assert not passed(old, old, round_trip=2e-3)["round_trip"]
    assert not passed(old, old, round_trip=float("nan"))["round_trip"]
    assert not passed(old, old, round_trip=-1.0)["round_trip"]
    with torch.no_grad():
        next(p for name, p in loaded.model.named_parameters() if name.startswith("levels.0")).fill_(float("inf"))
    broken = passed(old, old)
    assert not broken["finite_samples"]
    assert not broken["golden"]


def test_limits_are_a_table(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("bits_per_dim = 0.01\nfinite_temperatures = [0.5]\n")
    assert read_limits(tmp_path / "limits.toml") == dataclasses.replace(
        Limits(), bits_per_dim=0.01, finite_temperatures=(0.5,)
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"bits = 1", "limits.toml: bits: .*limits are bits_per_dim"),
        (b"bits_per_dim = inf", "bits_per_dim: .*finite"),
        (b"bits_per_dim = -0.01", "bits_per_dim: .*greater than or equal to 0"),
        (b"bits_per_dim = 2020-01-01", "bits_per_dim: .*number"),
        (b"worst_class = nan", "worst_class: .*finite"),
        (b"worst_class = true", "worst_class: .*number"),
        (b"round_trip = -inf", "round_trip: .*"),
        (b"round_trip = [1e-3]", "round_trip: .*number"),
        (b"saturated = 1.5", "saturated: .*less than or equal to 1"),
        (b"saturated = nan", "saturated: .*"),
        (b"finite_seeds = 0", "finite_seeds: .*greater than or equal to 1"),
        (b"finite_seeds = 256.0", "finite_seeds: .*integer"),
        (b"finite_seeds = 100000000000000000000", "finite_seeds: .*less than or equal to"),
        (b"finite_temperatures = []", "finite_temperatures: .*at least 1"),
        (b"finite_temperatures = 0.7", "finite_temperatures: .*"),
        (b"finite_temperatures = [0.7, -1.0]", "finite_temperatures: .*greater than or equal to 0"),
        (b"finite_temperatures = [nan]", "finite_temperatures: .*finite"),
        (b"bits_per_dim.mean = 1", "bits_per_dim: .*number"),
        pytest.param(b"saturated = " + b"9" * 5000, "limits.toml: cannot be read", id="long number"),
        pytest.param(b"saturated = " + b"[" * 5000, "limits.toml: cannot be read", id="deep nest"),
        (b"bits_per_dim 1", "limits.toml: cannot be read: Expected '='"),
        (b"# \xff", "limits.toml: cannot be read: 'utf-8' codec"),
        (None, "limits.toml: cannot be read: .*No such file"),
    ],
)
def test_limits_that_limit_nothing_are_refused_when_read(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "limits.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=says) as refusal:
        read_limits(tmp_path / "limits.toml")
    assert len(str(refusal.value)) < 400


def test_rollback_is_a_promotion_to_what_was_champion_before(registry: ModelRegistry, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        register(registry, tmp_path / f"m{seed}", seed)
    for version in (1, 2):
        promoted(registry, version, saying(2.0, 2.1))
    back = rollback(registry, Request(name="faces", version=0))
    assert back.entry is not None
    assert (back.entry.sequence, back.entry.version, back.entry.replaces) == (3, 1, 2)
    assert (back.entry.reason, [gate["gate"] for gate in back.entry.gates]) == ("back from 2", ["golden"])
    assert registry.resolve("faces", "champion") == 1
    assert rollback(registry, Request(name="faces", version=1)).entry == back.entry
    assert rollback(registry, Request(name="faces", version=2, dry_run=True)).entry is None
    with pytest.raises(UsageError, match="was never version 3"):
        rollback(registry, Request(name="faces", version=3))
    with pytest.raises(UsageError, match="replaced nothing"):
        rollback(registry, Request(name="faces", version=0, alias="challenger"))
    assert len(registry.ledger("faces").entries()) == 3


def test_rollback_refuses_a_version_that_is_not_what_it_was(registry: ModelRegistry, tmp_path: Path) -> None:
    for seed in (0, 1):
        register(registry, tmp_path / f"m{seed}", seed)
        promoted(registry, seed + 1, saying(2.0, 2.1))
    first = next(root for root in (tmp_path / "artifacts").rglob("model.json") if is_version(registry, root, 1))
    write_tiny(first.parent, seed=7)
    registry.client.set_model_version_tag("faces", "1", "glow.digest", load_model(str(first.parent)).digest)
    with pytest.raises(DataError, match=r"model\.json: sha256: expected"):
        rollback(registry, Request(name="faces", version=1))
    assert registry.resolve("faces", "champion") == 2


def is_version(registry: ModelRegistry, root: Path, version: int) -> bool:
    return load_model(str(root.parent)).digest == registry.tags("faces", version)["glow.digest"]


class Forgetful(http.server.BaseHTTPRequestHandler):
    """An S3 of one bucket, in memory, that answers a conditional write like any other."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        data = self.objects.get(self.path)
        listing = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
        found = listing if "?" in self.path else data
        self._answer(404 if found is None else 200, found or b"")

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_store_without_conditional_writes_is_refused(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forgetful)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    try:
        register(ModelRegistry(registry.uri, "s3://forgetful/registry"), tmp_path / "m")
        with pytest.raises(ConfigError, match="knows no conditional writes"):
            promoted(registry, 1, saying(2.0, 2.1))
    finally:
        server.shutdown()
        server.server_close()
    assert "champion" not in registry.client.get_registered_model("faces").aliases


def test_of_racing_promoters_one_wins_a_round(registry: ModelRegistry, tmp_path: Path) -> None:
    race_of(registry, tmp_path, racers=4, rounds=3)


@pytest.mark.nightly
def test_of_sixteen_racing_promoters_one_wins_each_of_twenty_rounds(registry: ModelRegistry, tmp_path: Path) -> None:
    race_of(registry, tmp_path, racers=16, rounds=20)


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_kill_at_a_boundary_is_put_right_by_the_next_promotion(
    registry: ModelRegistry, tmp_path: Path, stride: int
) -> None:
    kill_at_boundaries(registry, tmp_path, stride)
