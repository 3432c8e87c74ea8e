"""Latents: sample a model, and look at pictures through it: encode, decode, edit, interpolate, sweep, score.

python -m jobs latents sample models:/faces@champion --out samples.png --attributes +Smiling --attributes +Wearing_Hat
python -m jobs latents edit runs/faces/model me.jpg --attributes Smiling --attributes Eyeglasses --out edits.png
python -m jobs latents interpolate runs/faces/model me.jpg you.jpg --out between.gif

A picture is a file, an s3:// address, a folder of either, or seed:7 for what sampling seed 7 draws. The same seed or
picture always gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import tyro


def main(argv: Sequence[str]) -> int:
    """Run one of the workbench's commands."""
    from jobs.latents.draw import edit, interpolate, sample, sweep
    from jobs.latents.files import decode, encode, score

    commands = [sample, encode, decode, edit, interpolate, sweep, score]
    return tyro.extras.subcommand_cli_from_dict(
        {command.__name__: command for command in commands},
        prog="python -m jobs latents",
        description=__doc__,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
