"""The doctor's job on a cluster: every check on the head and on every node. A line of JSON a finding.

It runs where submitted code runs, under the environment that nodes give to it, and so finds what training would meet.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.cluster.checks import Finding, Question, examined

ASKED = "doctor.json"
SECONDS = 120.0
"""How long a node may take; it starts a Python process first."""

Node = dict[str, Any]
"""What Ray tells of a node."""


def main() -> None:
    """Ask what the client has sent, on every node at once."""
    asked = Question(**json.loads(Path(ASKED).read_bytes()))
    for finding in visited(asked):
        print(json.dumps(asdict(finding)), flush=True)


def visited(asked: Question) -> Iterator[Finding]:
    """The findings of every node that is alive, the head's first."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level=logging.CRITICAL)
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: (not _head(node), node["NodeID"]))
    visits = {}
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(_visit).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
        visits[task.remote(place(node), asked, int(node["Resources"].get("GPU", 0)))] = node
    done, _ = ray.wait(list(visits), num_returns=len(visits), timeout=SECONDS)
    for visit, node in visits.items():
        yield _described(node)
        yield from _findings(visit, place(node)) if visit in done else [_silent(place(node))]


def place(node: Node) -> str:
    """A node's name: several may share an address."""
    return "head" if _head(node) else node["NodeID"][:8]


def _head(node: Node) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _visit(place: str, asked: Question, gpus: int) -> list[Finding]:
    return list(examined(place, asked, gpus))


def _described(node: Node) -> Finding:
    has = node["Resources"]
    text = f"{node['NodeManagerAddress']}: for workers CPU {has.get('CPU', 0):.0f}, GPU {has.get('GPU', 0):.0f}"
    return Finding(place=place(node), name="node", text=text)


def _findings(visit: Any, place: str) -> list[Finding]:
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(visit)
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"{lines[-1][:300]}; the packages of the client must be installed there, and its Ray must be well"
        return [Finding(place=place, name="visit", text=text, code=1)]


def _silent(place: str) -> Finding:
    text = f"ran nothing within {SECONDS:.0f} s; look at its load, or take it out of the cluster"
    return Finding(place=place, name="visit", text=text, code=7)


if __name__ == "__main__":
    main()
