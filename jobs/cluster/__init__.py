"""Training on a Ray cluster: submit a run, look at it, stop it after a checkpoint.

  python -m jobs cluster submit toy32 --storage s3://glow/runs --data.prefix s3://glow/faces --cluster.workers 2
  python -m jobs cluster logs toy32 -f
  python -m jobs cluster stop toy32

The cluster is the one RAY_API_SERVER_ADDRESS names; its token is read where RAY_AUTH_TOKEN_PATH says. Submitting again
goes on where the run stopped. A job's exit code is the exit code of following it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import tyro

from jobs.cluster.start import ENVIRONMENT
from jobs.cluster.training import train

__all__ = ["ENVIRONMENT", "main", "train"]

Job = Annotated[str, tyro.conf.arg(metavar="RUN_OR_ID")]
Address = Annotated[str, tyro.conf.arg(metavar="URL")]


def main(argv: Sequence[str]) -> int:
    """Run one of submit, status, logs, stop, doctor."""
    if argv and argv[0] == "submit":
        return submit(list(argv[1:]))
    return tyro.extras.subcommand_cli_from_dict(
        {"submit": _submit, "status": status, "logs": logs, "stop": stop, "doctor": doctor},
        prog="python -m jobs cluster",
        description=__doc__,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def submit(words: list[str]) -> int:
    """Send a run to the cluster; takes what `jobs train` takes, and --follow, --address URL."""
    from jobs.cluster.jobs import connect, followed
    from jobs.cluster.submission import submitted
    from jobs.train import parse, taken

    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m jobs cluster submit PRESET|CONFIG.toml [--follow] [--address URL] [--dry-run] "
              "[--SETTING VALUE ...]\n")  # fmt: skip
        print("python -m jobs train --help lists the presets. Settings, with the values of toy32:")
        parse(["toy32", "--help"])  # prints and exits
    addresses, words = taken(words, "--address", "a URL")
    follow = "--follow" in words
    config, dry_run = parse([word for word in words if word != "--follow"])
    if dry_run:
        from jobs.plan import plan

        print(plan(config))
        return 0
    client = connect(addresses[-1] if addresses else "")
    job = submitted(client, config)
    print(f"{job}: submitted to {client.address}", flush=True)
    if not follow:
        print(f"next: python -m jobs cluster logs {job} -f")
        return 0
    return followed(client, job)


def _submit() -> int:
    """Send a run to the cluster; submit --help says more."""
    return submit([])


def status(job: Annotated[str, tyro.conf.arg(metavar="[RUN_OR_ID]")] = "", /, address: Address = "") -> int:
    """Say how jobs are, one a line, the newest last, with what each said last.

    Args:
        job: A run or a submission; empty tells of all.
        address: The cluster's job server; empty takes RAY_API_SERVER_ADDRESS.
    """
    from jobs.cluster.jobs import connect, lines

    print("\n".join(lines(connect(address), job)) or "no jobs")
    return 0


def logs(job: Job, /, follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False, address: Address = "") -> int:
    """Print what a job says.

    Args:
        job: A submission, or a run: its newest attempt.
        follow: Go on until the job ends, and exit with its code.
        address: The cluster's job server; empty takes RAY_API_SERVER_ADDRESS.
    """
    from jobs.cluster.jobs import connect, followed, resolve

    client = connect(address)
    found = resolve(client, job)
    if follow:
        return followed(client, found)
    print(client.logs(found), end="")
    return 0


def stop(job: Job, /, address: Address = "") -> int:
    """Stop a job after a checkpoint, and wait for it. Submitting it again goes on from there.

    Args:
        job: A submission, or a run: its newest attempt.
        address: The cluster's job server; empty takes RAY_API_SERVER_ADDRESS.
    """
    from jobs.cluster.jobs import connect, resolve, stopped

    client = connect(address)
    print(stopped(client, resolve(client, job)))
    return 0


def doctor(address: Address = "", storage: str = "", uri: str = "", here: bool = False) -> int:
    """Say what is well and what is not, here, on the head and on every node; one line a thing, each with its cure.

    Exits with 0 where all is well, else with the code of the first line that is BAD.

    Args:
        address: The cluster's job server; empty takes RAY_API_SERVER_ADDRESS.
        storage: Prefix to write to and read from; empty takes GLOW_STORAGE.
        uri: MLflow address; empty takes MLFLOW_TRACKING_URI.
        here: Look at this machine alone.
    """
    from jobs.cluster.findings import findings

    storage = storage or os.environ.get("GLOW_STORAGE", "")
    code = 0
    for finding in findings(address, storage, uri or os.environ.get("MLFLOW_TRACKING_URI", ""), here):
        print(finding, flush=True)
        code = code or finding.code
    return code
