"""The one exception tree: every refusal says what, where and what to do, and carries its exit code."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence


def redact(text: str) -> str:
    """Text without what may be secret in its addresses: user and password, and all that follows a question mark."""
    text = re.sub(r"(\w://)(?:[^/\s]*|[^/\s:]*:(?!\d+/)\S*)@", r"\1", text)  # a password may hold a slash, a port not
    return re.sub(r"(\w://[^\s?]*)\?\S+", r"\1", text)


class PipelineError(Exception):
    """A refusal a person can act on.

    `what` is the finding, `where` the file, key or host it was found in, `cure` what to do about it.
    `str(error)` is one line; `exit_code` is the documented exit code of the command that meets it. Addresses are told
    as `redact` leaves them.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", cure: str = "") -> None:
        self.what, self.where, self.cure = redact(what), redact(where), redact(cure)
        super().__init__(self.what, self.where, self.cure)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"; {self.cure}" if self.cure else ""
        return " ".join(f"{place}{self.what}{advice}".split())

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.cure)


def _rebuild(kind: type[PipelineError], what: str, where: str, cure: str) -> PipelineError:
    return kind(what, where=where, cure=cure)


class UsageError(PipelineError):
    """The command line makes no sense."""

    exit_code = 2


class ConfigError(PipelineError):
    """The configuration, or what preflight found, cannot work."""

    exit_code = 3


class DataError(PipelineError):
    """Bytes are not what their manifest, digest or format says."""

    exit_code = 4


class GateError(PipelineError):
    """A model did not pass a promotion gate."""

    exit_code = 5


class ConflictError(PipelineError):
    """Somebody else got there first: a conditional write lost, or the run belongs to another fingerprint."""

    exit_code = 6


class RemoteError(PipelineError):
    """A remote service did not answer within its bounded retries."""

    exit_code = 7


class PeerLostError(RemoteError):
    """Another worker of the group is gone, and with it what was done together; it knows why."""


class DivergedError(PipelineError):
    """Training produced non-finite or exploding gradients past its bound."""

    exit_code = 8


class Interrupted(PipelineError):
    """Stopped after a committed checkpoint: by SIGTERM, or as somebody asked through the cluster."""

    exit_code = 143


class CtrlC(Interrupted):
    """Stopped by SIGINT, after a committed checkpoint."""

    exit_code = 130


def interruption(signals: Sequence[int]) -> type[Interrupted]:
    """What stopping for these signals, the first of them counts, is called."""
    return CtrlC if list(signals[:1]) == [signal.SIGINT] else Interrupted
