"""The demo at a size a test can afford: `python -m tests.jobs.tiny_demo FOLDER`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from glow import GlowConfig
from jobs.demo import Demo, Pictures, run
from jobs.presets import preset
from pipeline.config import EvaluateConfig, ScheduleConfig


def tiny(folder: Path) -> Demo:
    """Two levels, 240 images of 16 px, 480 of them seen."""
    config = replace(
        preset("toy32").config,
        name="tiny",
        model=GlowConfig(levels=2, steps=2, width=16, coupling="additive", condition_splits=True, condition_steps=True),
        schedule=ScheduleConfig(images=480, batch=16, leaf=8, init_images=64, status_every=80, checkpoint_every=80),
        evaluate=EvaluateConfig(every=240, images=16, rows=1, temperatures=(0.6,)),
    )
    return Demo(config, Pictures("faces", 16, 240), folder, workers=0)


if __name__ == "__main__":
    run(tiny(Path(sys.argv[1])))
