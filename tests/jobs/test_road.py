"""The whole system by the commands of the README, from a fresh clone on; and what must not go that road."""

from __future__ import annotations

import http.server
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from socket import AF_INET

import psutil
import pytest

from jobs.stack.ceph import refuse_missing
from jobs.stack.processes import inherited
from jobs.stack.state import open_stack
from pipeline.errors import ConfigError
from tests.canaries import CANARY, planted, refuse_secrets
from tests.running import ROOT, RunningStack, jobs, refuse_traces

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"<!-- stack -->\n```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
]
"""What the README says of the whole system, in its order: executed as it stands."""

SUBMIT = [
    "cluster", "submit", "toy32", "--name", "road", "--storage", "s3://glow/runs", "--data.prefix", "s3://glow/faces",
    "--cluster.workers", "2",
]  # fmt: skip


ATTEMPTS = """from pipeline.export import read_run
from pipeline.storage import open_storage
print(*(attempt["job"] for attempt in read_run(open_storage("s3://glow/runs/faces")).attempts))"""


@dataclass
class Walker:
    """Somebody who types commands, with a home and a temporary folder of their own."""

    place: Path
    environment: dict[str, str]
    sourced: list[str] = field(default_factory=list)
    """Lines that changed the shell's environment, before all that come after."""

    def type(self, line: str, enough: Callable[[str], bool] = lambda said: False) -> tuple[int, str]:
        """Type a line and read until it ends, or until it has said enough: then Ctrl-C; (exit code, output)."""
        if line.startswith("source "):
            self.sourced.append(line)
        said: list[str] = []
        with subprocess.Popen(
            ["bash", "-ec", "\n".join([*self.sourced, line])], cwd=self.place, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ) as shell:  # fmt: skip
            assert shell.stdout is not None
            for text in shell.stdout:
                said.append(text)
                if enough(text):
                    os.killpg(shell.pid, signal.SIGINT)
        return shell.returncode, "".join(said)


@pytest.fixture
def walker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walker]:
    """A fresh clone; of this user's home only what pip needs, so that nothing is fetched twice."""
    try:
        refuse_missing()
    except ConfigError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("walk")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    pip.setdefault("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))
    settings = Path.home() / ".config" / "pip" / "pip.conf"
    if settings.exists():
        pip.setdefault("PIP_CONFIG_FILE", str(settings))
    own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}
    walker = Walker(folder / "clone", {**inherited(), **pip, **own, **planted(folder / "home")})
    # What is started in the background ignores Ctrl-C, and so would all it starts; a terminal's shell does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield walker
    signal.signal(signal.SIGINT, before)
    if (walker.place / "stack").exists():
        walker.type(".venv/bin/python -m jobs stack down")


@pytest.mark.road
@pytest.mark.timeout(1800)
def test_the_whole_system_as_the_readme_says(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command in its order; what is watched is left by Ctrl-C once it trains."""
    said: dict[str, str] = {}
    for line in COMMANDS:
        watched = line.endswith(" -f")
        if line.endswith("stack down"):
            stack = open_stack(walker.place / "stack")
            assert stack
            refuse_secrets(RunningStack(stack=stack), "faces")
            assert walker.type(f"python -c '{ATTEMPTS}'") == (0, "faces-1 faces-2\n"), "checkpoints know their jobs"
        start = time.monotonic()
        code, text = walker.type(line, lambda text, watched=watched: watched and text.startswith("images "))
        with capsys.disabled():
            print(f"\n{time.monotonic() - start:5.0f} s  {line}", end="", flush=True)
        assert code == (130 if watched else 0), f"{line}\n{text}"
        said[line] = text
    refuse_road_not_walked(walker.place, said)
    refuse_traces(stack)
    refuse_followers(walker)


def refuse_road_not_walked(clone: Path, said: dict[str, str]) -> None:
    """AssertionError unless the run was stopped and went on, and its champion was drawn."""
    stopped = re.search(r"stopped after a checkpoint at (\d+) images", "".join(said.values()))
    assert stopped
    (again,) = [text for line, text in said.items() if line.endswith(" --follow")]
    assert "faces-2: submitted" in again
    seen = [int(images) for images in re.findall(r"^images (\d+)/", again, re.MULTILINE)]
    assert min(seen) > int(stopped[1]), "it goes on from the checkpoint"
    assert "images 6000/6000" in again
    assert (clone / "faces.png").stat().st_size > 0


def refuse_followers(walker: Walker) -> None:
    """AssertionError if a process of that home, or a file in its temporary folder or its clone, is left."""
    home = f"HOME={walker.environment['HOME']}".encode()
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if home in read(path)]
    assert not [read(path.with_name("cmdline")) for path in left]
    # torch makes this one when it is imported, for its compiler, and finds it again.
    assert not [path for path in Path(walker.environment["TMPDIR"]).iterdir() if "torchinductor" not in path.name]
    status = subprocess.run(["git", "status", "--porcelain"], cwd=walker.place, capture_output=True, check=True)
    assert not status.stdout


def read(path: Path) -> bytes:
    """A file of /proc; empty for a process that is gone or somebody else's."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def road(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> RunningStack:
    """The stack with a dataset in its S3."""
    faces = str(tmp_path_factory.mktemp("road") / "faces")
    stack.jobs("data", "toy", faces, "--images", "120", "--size", "16", "--workers", "1")
    stack.jobs("data", "prepare", faces, "s3://glow/faces", "--samples-per-shard", "32", "--workers", "1")
    return stack


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"RAY_AUTH_TOKEN_PATH": ""}, 3, "wants a token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, 7, "token is refused"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, 7, "nobody answers"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 7, "access refused"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, 7, "MLflow does not answer"),
        ({"MLFLOW_TRACKING_URI": f"http://admin:{CANARY}@127.0.0.1:9"}, 3, "tracking.uri holds a password"),
    ],
)
def test_what_cannot_work_is_one_line_and_its_exit_code(
    road: RunningStack, change: dict[str, str], code: int, words: str
) -> None:
    start = time.monotonic()
    refused = road.jobs(*SUBMIT, check=code, **change)
    assert time.monotonic() < start + 50  # 10 s on a machine that does nothing else
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert CANARY not in refused.stderr


def test_an_open_ray_elsewhere_is_refused(tmp_path: Path) -> None:
    """A job server without a token, at an address that is not this machine's loopback."""
    every = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    known = [entry.address for entry in every if entry.family == AF_INET]
    here = next((address for address in known if not address.startswith("127.")), "")
    if not here:
        pytest.skip("this machine has no address but the loopback")
    server = http.server.HTTPServer((here, 0), http.server.SimpleHTTPRequestHandler)
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "version").write_text("{}")
    server.RequestHandlerClass = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=str(tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        refused = jobs("cluster", "status", "--address", f"http://{here}:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert refused.returncode == 3
    assert "takes jobs from anybody" in refused.stderr
