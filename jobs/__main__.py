"""`python -m jobs GROUP ...`: runs the group's module; every refusal becomes one line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from pipeline.errors import PipelineError, UsageError

GROUPS = {
    "demo": "everything at once: data, training, a champion, pictures and a report",
    "data": "prepare pictures as a verified dataset; verify and show it",
    "train": "train a model: in this process, under torchrun or on Ray",
    "evaluate": "bits/dim and what a reviewer needs, as a report",
    "models": "register a run's model and promote it to champion",
    "latents": "sample, and look at what the latents mean",
    "stack": "S3, PostgreSQL, MLflow and a Ray cluster on this machine, by one command",
    "cluster": "submit a run to a Ray cluster; follow, look at and stop it",
    "studies": "what a choice is worth: tables and plots of trainings that differ in it",
    "bench": "step time and memory in one table",
}
"""Command groups in the order one meets them; each is `jobs/NAME.py` with `main(argv) -> int`."""

HELP = ("-h", "--help", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never a traceback for what a person can act on."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in HELP:
        print(overview())
        return 0
    group, rest = arguments[0], arguments[1:]
    if group not in GROUPS:
        raise UsageError(f"no command {group!r}", cure=suggestion(group, GROUPS) or "python -m jobs --help lists them")
    return importlib.import_module(f"jobs.{group}").main(rest)


def overview() -> str:
    """The list of command groups, wrapped to the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    indent = 2 + max(map(len, GROUPS)) + 2
    lines = ["usage: python -m jobs COMMAND ...", ""]
    for name, purpose in GROUPS.items():
        head = f"  {name}".ljust(indent)
        lines += textwrap.wrap(purpose, max(width, indent + 20), initial_indent=head, subsequent_indent=" " * indent)
    return "\n".join([*lines, "", "python -m jobs COMMAND --help says more."])


def suggestion(word: str, known: Sequence[str] | dict[str, str]) -> str:
    """'did you mean X?' for the nearest known word, '' when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
