"""The doctor on the real system: each planted fault is named, where it is, with its cure, and what is well is not."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from jobs.cluster.checks import checked
from tests.faulty import cannot_mount, careless_store, claims, ill_node
from tests.running import RunningStack

DEAD = "http://127.0.0.1:9"
HERE = ["versions", "code", "disk", "memory", "gpus", "s3", "s3 create", "mlflow"]
"""What is looked at everywhere."""

Found = dict[str, dict[str, tuple[str, str]]]
"""{place: {check: (ok, BAD or --, what it says)}}."""


def doctor(stack: RunningStack, *words: str, code: int = 0, **change: str) -> Found:
    """What the doctor says, taken apart; every line must have its form."""
    found: Found = {}
    for line in stack.jobs("cluster", "doctor", *words, check=code, **change).stdout.splitlines():
        parts = re.fullmatch(r"(ok|BAD|--) +(\S+) +(s3 create|\S+) +(\S.*)", line)
        assert parts, line
        found.setdefault(parts[2], {})[parts[3]] = (parts[1], parts[4])
    return found


def test_of_four_machines_one_is_ill(stack: RunningStack, tmp_path: Path) -> None:
    """On it each fault is a line with its cure; the client, the head and the other nodes are well."""
    unmountable = cannot_mount(tmp_path / "full")
    faults = {"AWS_ENDPOINT_URL": DEAD, "MLFLOW_TRACKING_PASSWORD": "wrong"}
    other = claims(tmp_path / "claims", torch="1.0.0")
    with ill_node(stack.stack, tmp_path, {**faults, "PYTHONPATH": other}, full_disk=not unmountable):
        found = doctor(stack, code=3)
    assert [*found.pop("client")] == [*HERE, "ray"]
    (ill,) = [place for place, checks in found.items() if any(mark == "BAD" for mark, _ in checks.values())]
    bad = {name: text for name, (mark, text) in found.pop(ill).items() if mark == "BAD"}
    assert len(found) == 3
    assert "head" in found
    assert all([*checks] == ["node", *HERE] for checks in found.values())
    assert "and the client has" in bad["versions"]
    assert "pip install 'torch==" in bad["versions"]
    assert "Ray offers 1 and torch" in bad["gpus"]
    assert "CUDA build of torch" in bad["gpus"]
    assert bad["s3"] == f"{DEAD}: no S3 server answers; start it, or correct AWS_ENDPOINT_URL"
    assert "answers 401; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in bad["mlflow"]
    if unmountable:
        pytest.skip(f"all but the full disk: none can be filled here ({unmountable})")
    assert re.fullmatch(r"\S*/full: 0\.0 GB free; 5 GB are needed: remove files, or .*", bad["disk"])
    assert len(bad) == 5


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (
            {"AWS_ENDPOINT_URL": DEAD, "MLFLOW_TRACKING_PASSWORD": "wrong", "RAY_AUTH_TOKEN_PATH": ""},
            7,
            {
                "s3": ("no S3 server answers", "correct AWS_ENDPOINT_URL"),
                "mlflow": ("answers 401", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
                "ray": ("wants a token and there is none here", "set RAY_AUTH_TOKEN_PATH"),
            },
        ),
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong", "MLFLOW_TRACKING_URI": DEAD, "RAY_AUTH_TOKEN": "0" * 64},
            7,
            {
                "s3": ("access refused", "check the AWS credentials and policy"),
                "mlflow": ("does not answer", "correct MLFLOW_TRACKING_URI"),
                "ray": ("the token is refused", "check RAY_AUTH_TOKEN_PATH"),
            },
        ),
    ],
    ids=["nothing given", "wrong secrets"],
)
def test_what_is_wrong_at_the_client(
    stack: RunningStack, change: dict[str, str], code: int, said: dict[str, tuple[str, str]]
) -> None:
    """A line a fault with its cure; nobody else is asked, and the exit code is that of the first."""
    found = doctor(stack, code=code, **change)
    assert found["nodes"] == {"visit": ("--", "not checked: no way in")}
    bad = {name: text for name, (mark, text) in found["client"].items() if mark == "BAD"}
    assert bad.keys() == said.keys()
    for name, (what, cure) in said.items():
        assert re.search(f"{re.escape(what)}.*; .*{re.escape(cure)}", bad[name]), bad[name]


def test_other_versions_and_a_store_without_conditions(stack: RunningStack, tmp_path: Path) -> None:
    """Ray and MLflow of other versions than here; a real server that overwrites what was to be created."""
    older = claims(tmp_path, ray="2.50.0", mlflow="2.22.0")
    with careless_store(stack.stack.s3, stack.environment) as endpoint:
        found = doctor(stack, code=3, PYTHONPATH=older, AWS_ENDPOINT_URL=endpoint)["client"]
    assert found["s3"][0] == "ok"
    assert found["s3 create"] == (
        "BAD", "s3://glow: the store ignores If-None-Match; use one that honours it (S3, Ceph 16 or newer), "
        "or writers undo one another",
    )  # fmt: skip
    assert re.search(r"the server is MLflow 3\.\S+, this is 2\.22\.0; pip install 'mlflow==3\.", found["mlflow"][1])
    assert re.search(r"runs Ray 2\.\S+, this is 2\.50\.0; pip install 'ray\[default,train\]==", found["ray"][1])


def test_a_check_that_hangs_is_a_finding() -> None:
    found = checked("client", "s3", lambda: time.sleep(60) or "", seconds=0.1)
    assert str(found) == "BAD client    s3        no answer within 0 s; look at the load there, and at the network"
    assert found.code == 7


def test_what_is_not_named_is_not_looked_at(stack: RunningStack) -> None:
    found = doctor(stack, "--here", GLOW_STORAGE="", MLFLOW_TRACKING_URI="")["client"]
    assert [found[name][0] for name in ("s3", "mlflow")] == ["--", "--"]
    refused = stack.jobs("cluster", "doctor", "--uri", "http://admin:hunter2@127.0.0.1:9", check=3).stderr
    assert refused == "error: uri holds a password; leave it to the nodes' environment\n"


def test_a_dead_store_ends_a_submission_in_a_line(stack: RunningStack) -> None:
    words = ["cluster", "submit", "toy32", "--storage", "s3://glow/runs", "--data.prefix", "s3://glow/faces"]
    refused = stack.jobs(*words, "--cluster.workers", "2", check=7, AWS_ENDPOINT_URL=DEAD).stderr
    assert refused == f"error: {DEAD}: no S3 server answers; start it, or correct AWS_ENDPOINT_URL\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MLFLOW_TRACKING_URI": DEAD}, f"{DEAD}: MLflow does not answer; start it, or correct MLFLOW_TRACKING_URI"),
        ({"MLFLOW_TRACKING_PASSWORD": "wrong"}, "MLflow does not let us in; set MLFLOW_TRACKING_USERNAME and MLFLOW_"),
    ],
)
def test_an_mlflow_that_is_down_or_locked_ends_a_promotion_in_a_line(
    stack: RunningStack, change: dict[str, str], said: str
) -> None:
    refused = stack.jobs("models", "promote", "faces", "1", check=7, **change).stderr
    assert said in refused
    assert refused.count("\n") == 1
