"""The run's anchors: planned within a budget, tightened where inversion drifts, and kept over a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glow import Glow, GlowConfig, RealNVPConfig
from glow.budget import level_costs, plans
from jobs.data import prepare
from pipeline.anchors import Anchors, free_bytes, planned
from pipeline.config import DataConfig, EvaluateConfig, MemoryConfig, ScheduleConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.toy import write_toy
from pipeline.train import run
from pipeline.world import World

CONFIG = TrainConfig(
    data=DataConfig(bits=8),
    model=GlowConfig(
        size=8, channels=3, levels=2, steps=4, width=8, mixing="dense", coupling="additive", classes=-1, attributes=-1
    ),
    memory=MemoryConfig(anchor_every=(4, 0)),
)


def learned(anchors: Anchors, model: Glow) -> dict[str, float]:
    """The figures after one backward."""
    model.log_prob(torch.rand(4, 3, 8, 8) - 0.5).mean().backward()
    return anchors.figures()


def ill_conditioned(model: Glow) -> Glow:
    """The second mixing of the first level stretches one direction a million times as much as another."""
    mixing = [module for name, module in model.named_modules() if name.endswith("mixing")][1]
    with torch.no_grad():
        mixing.weight.copy_(torch.linalg.qr(torch.randn(12, 12))[0] @ torch.diag(torch.logspace(-4, 4, 12)))
    return model


def test_a_healthy_model_keeps_its_setting() -> None:
    model = Glow(CONFIG.model)
    anchors = Anchors(CONFIG, model, World())
    figures = learned(anchors, model)
    assert 0 < figures["train/inversion_error"] < 1e-5
    assert anchors.anchor_every == (4, 0)
    assert anchors.news == []
    assert anchors.figures() == {}


def test_a_planted_ill_conditioned_mixing_fires_the_alarm_until_every_step_is_an_anchor() -> None:
    torch.manual_seed(0)
    model = ill_conditioned(Glow(CONFIG.model))
    anchors = Anchors(CONFIG, model, World())
    figures = learned(anchors, model)
    assert figures["train/inversion_error"] > 2**-8 / 8
    assert figures["memory/tightened"] == 1
    assert anchors.anchor_every == (2, 0)
    assert [level.steps.anchor_every for level in model] == [2, 0]
    assert "anchor_every [4, 0] -> [2, 0]" in anchors.news[0]
    learned(anchors, model)
    assert anchors.anchor_every == (1, 0)
    if "memory/tightened" in learned(anchors, model):
        assert anchors.anchor_every == (1, 0)


def test_an_error_that_is_not_a_number_fires_too() -> None:
    model = Glow(CONFIG.model)
    anchors = Anchors(CONFIG, model, World())
    next(iter(model)).steps.inversion_error = torch.tensor(torch.nan)
    anchors.figures()
    assert anchors.anchor_every == (2, 0)


def test_what_was_tightened_stays_so_over_a_resume_unless_something_else_is_asked() -> None:
    model = ill_conditioned(Glow(CONFIG.model))
    anchors = Anchors(CONFIG, model, World())
    learned(anchors, model)
    state = json.loads(json.dumps(anchors.state()))
    resumed = Anchors(CONFIG, other := Glow(CONFIG.model), World())
    resumed.restore(state)
    assert resumed.anchor_every == (2, 0)
    assert [level.steps.anchor_every for level in other] == [2, 0]
    asked = Anchors(replace(CONFIG, memory=MemoryConfig(anchor_every=(3,))), other, World())
    asked.restore(state)
    assert asked.anchor_every == (3,)


def test_a_plan_is_what_fits_and_stays_over_a_resume() -> None:
    wide = replace(CONFIG, memory=MemoryConfig(anchor_every="plan", budget_gb=1.0))
    first = Anchors(wide, Glow(CONFIG.model), World())
    assert first.anchor_every == (0, 0)
    narrow = replace(wide, memory=MemoryConfig(anchor_every="plan", budget_gb=150e-6))
    second = Anchors(narrow, Glow(CONFIG.model), World())
    assert max(second.anchor_every) > 0
    second.restore(first.state())
    assert second.anchor_every == (0, 0)


def test_a_plan_that_cannot_be_is_refused_with_its_cure() -> None:
    with pytest.raises(ConfigError, match=r"pure inversion works on .* a smaller schedule.leaf"):
        planned(CONFIG, 1000)


def test_a_plan_for_a_realnvp_is_refused_with_its_cure() -> None:
    realnvp = replace(CONFIG, model=RealNVPConfig(size=16, channels=3), memory=MemoryConfig(anchor_every="plan"))
    with pytest.raises(ConfigError, match=r'memory.anchor_every is "plan".*numbers: only a Glow') as caught:
        planned(realnvp, 2**30)
    assert "\n" not in str(caught.value)


def test_this_machine_has_some_memory_free() -> None:
    assert 2**24 < free_bytes(torch.device("cpu")) < 2**50


def test_a_run_plans_says_so_and_trains_in_bfloat16(tmp_path: Path) -> None:
    write_toy(tmp_path / "source", images=48, size=16, seed=0)
    prepare(str(tmp_path / "source"), str(tmp_path / "data"), split="random:0:0.2", samples_per_shard=8, workers=1)
    model = GlowConfig(size=16, channels=3, levels=2, steps=2, width=8, classes=-1, attributes=-1)
    smallest = plans(level_costs(model, 4, torch.bfloat16))[-1].bytes
    config = TrainConfig(
        name="planned",
        storage=str(tmp_path),
        data=DataConfig(prefix=str(tmp_path / "data"), bits=5, cache=str(tmp_path / "cache"), cache_gb=0.1),
        model=model,
        memory=MemoryConfig(anchor_every="plan", budget_gb=smallest / 1e9, nets="bfloat16"),
        schedule=ScheduleConfig(images=32, batch=16, leaf=4, init_images=32, status_every=16),
        evaluate=EvaluateConfig(every=32, images=8, temperatures=(0.7,), rows=1),
    )
    figures = run(config)
    assert figures["train/bits_per_dim"] < 10
    events = [json.loads(line) for line in (tmp_path / "planned" / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["kind"] == "anchors"]
    assert told[0]["text"].startswith("anchor_every planned")
    assert told[0]["anchor_every"] == [2, 2]
    assert "train/inversion_error" in figures
