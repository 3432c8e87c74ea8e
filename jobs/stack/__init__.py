"""The whole system on this machine, without containers: S3, PostgreSQL, MLflow and a Ray cluster.

  python -m jobs stack up
  . stack/env
  python -m jobs stack down

Everything lives in one folder and has secrets of its own; `env` holds what the other commands find it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from pipeline.errors import RemoteError


def main(argv: Sequence[str]) -> int:
    """Run one of up, down, status."""
    return tyro.extras.subcommand_cli_from_dict(
        {"up": up, "down": down, "status": status},
        prog="python -m jobs stack",
        description=__doc__,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def up(
    folder: str = "stack",
    s3: str = "",
    bucket: str = "glow",
    nodes: int = 2,
    fault_proxy: bool = False,
    no_ray: bool = False,
) -> int:
    """Start what does not run yet, and wait until all of it answers. A second time says what is there.

    Args:
        folder: Where state, logs and credentials go; empty or a stack's.
        s3: Endpoint of an S3 server there is, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; empty starts one.
        bucket: Bucket to use; made if it is not there.
        nodes: Ray worker nodes, with a CPU each.
        fault_proxy: Put a proxy in front of S3 that fails to order.
        no_ray: Leave Ray out.
    """
    from jobs.stack.life import lines, raised
    from jobs.stack.state import Options

    options = Options(s3=s3, bucket=bucket, nodes=0 if no_ray else nodes, fault_proxy=fault_proxy, ray=not no_ray)
    stack = raised(Path(folder).absolute(), options, lambda text: print(text, flush=True))
    print("\n".join(lines(stack)))
    print(f"next: . {folder}/env")
    return 0


def down(folder: str = "stack") -> int:
    """End every process of the stack and remove its folder, its data included.

    Args:
        folder: The stack's folder.
    """
    from jobs.stack.life import razed

    print(razed(Path(folder).absolute()))
    return 0


def status(folder: str = "stack") -> int:
    """Say how every service is, one a line; exit 7 where one is not well.

    Args:
        folder: The stack's folder.
    """
    from jobs.stack.life import lines
    from jobs.stack.services import well
    from jobs.stack.state import open_stack

    stack = open_stack(Path(folder).absolute())
    if stack is None:
        raise RemoteError("no stack", where=folder, cure="python -m jobs stack up")
    print("\n".join(lines(stack)))
    ill = [name for name in stack.state.options.services if not well(stack, name)]
    if ill:
        raise RemoteError(f"not well: {', '.join(ill)}", where=folder, cure="python -m jobs stack up")
    return 0
