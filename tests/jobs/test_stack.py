"""The stack, real and whole: one for the session, torn down at its end as if everything had been killed before."""

from __future__ import annotations

import base64
import json
import signal
import stat
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from jobs.stack.processes import belonging, end
from jobs.stack.services import ray_folder
from tests.running import RunningStack, jobs, refuse_traces, running_stack


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def order(stack: RunningStack, *rules: dict[str, object]) -> dict[str, object]:
    """Replace the fault proxy's rules; what the old ones did."""
    request = urllib.request.Request(stack.stack.url("faults") + "/__faults", json.dumps({"rules": rules}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_a_second_up_says_what_is_there(stack: RunningStack) -> None:
    before = stack.stack.state.processes
    said = jobs("stack", "up", "--folder", str(stack.folder), "--fault-proxy")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("everything is there already")
    assert {process.pid for process in before.values()} <= {each.pid for each in psutil.process_iter()}


def test_status_is_a_line_a_service(stack: RunningStack) -> None:
    said = jobs("stack", "status", "--folder", str(stack.folder))
    lines = said.stdout.splitlines()
    assert said.returncode == 0, said.stderr
    assert [line.split()[0] for line in lines] == list(stack.stack.state.options.services)
    assert all(line.split()[1] == "up" for line in lines)


def test_other_options_are_refused_with_the_cure(stack: RunningStack) -> None:
    said = jobs("stack", "up", "--folder", str(stack.folder), "--no-ray")
    assert said.returncode == 6
    assert "stack down" in said.stderr
    assert said.stderr.count("\n") == 1


def test_every_ray_node_has_a_folder_of_its_own(stack: RunningStack) -> None:
    """Two that shared one chose the same socket when they started at once: `bind: Address already in use`."""
    for name in ("ray-head", "ray-node-1", "ray-node-2"):
        sockets = {path.name for path in ray_folder(stack.stack, name).glob("session_2*/sockets/*") if path.is_socket()}
        assert {"plasma_store", "raylet"} <= sockets
        assert not {"plasma_store.1", "raylet.1"} & sockets


def test_secrets_are_their_owners_alone(stack: RunningStack) -> None:
    for name in ("env", "credentials.json", "token", "mlflow-auth.ini", "stack.json"):
        assert stat.S_IMODE((stack.folder / name).stat().st_mode) == 0o600, name
    secrets = [value for name, value in stack.stack.credentials.items() if name != "s3_access_key"]
    seen = [(stack.folder / "stack.json").read_text()]
    seen += [log.read_text(errors="replace") for log in stack.stack.logs.iterdir()]
    ours = belonging(stack.stack.state.processes.values(), stack.stack.state.mark)
    seen += [" ".join(psutil.Process(process.pid).cmdline()) for process in ours if process.alive]
    assert not [secret for secret in secrets if any(secret in text for text in seen)]


def test_s3_through_the_fault_proxy_survives_what_was_ordered(stack: RunningStack) -> None:
    order(stack)
    put = "from pipeline.storage import open_storage as o; s = o('s3://glow/faults'); s.write('a', b'x' * 100_000)"
    get = "assert s.read('a') == b'x' * 100_000; print('whole')"
    order(stack, {"match": "GET .*faults/a", "kind": "status", "status": 503, "times": 2},
          {"match": "GET .*faults/a", "kind": "reset", "after": 1000})  # fmt: skip
    done = stack.python(f"{put}; {get}")
    assert done.stdout == "whole\n", done.stderr
    told = order(stack)
    assert told["hits"] == [2, 1]


def test_a_wrong_s3_secret_is_one_line_and_exit_7(stack: RunningStack) -> None:
    said = stack.jobs("data", "show", "s3://glow/none", check=7, AWS_SECRET_ACCESS_KEY="wrong")
    assert said.stderr.count("\n") == 1
    assert "wrong" not in said.stderr


def test_mlflow_lets_in_who_has_the_password(stack: RunningStack) -> None:
    url = stack.stack.url("mlflow") + "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    known = base64.b64encode(f"admin:{stack.stack.credentials['mlflow_password']}".encode()).decode()
    assert status(url) == 401
    assert status(url, Authorization="Basic " + base64.b64encode(b"admin:password1234").decode()) in (401, 403)
    assert status(url, Authorization=f"Basic {known}") == 200
    assert status(url, Authorization=f"Basic {known}", Host="elsewhere.example") == 403


def test_ray_lets_in_who_has_the_token(stack: RunningStack) -> None:
    url = stack.stack.url("dashboard") + "/api/jobs/"
    assert status(url) == 401
    assert status(url, Authorization="Bearer wrong") in (401, 403)
    assert status(url, Authorization=f"Bearer {stack.stack.credentials['ray_token']}") == 200


def test_what_can_be_started_again_is(tmp_path: Path, stack: RunningStack) -> None:
    """A stack of its own on an S3 server there is, the first one's: its database and its MLflow are killed."""
    options = ["--s3", stack.stack.s3, "--bucket", "more", "--no-ray"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.s3_environment.items():
            patch.setenv(name, value)
        with running_stack(
            tmp_path / "more", s3=stack.stack.s3, bucket="more", ray=False, nodes=0, fault_proxy=False
        ) as more:
            folder, state = ["--folder", str(more.folder)], more.stack.state
            assert list(state.processes) == ["postgres", "mlflow"]
            more.python("from pipeline.storage import open_storage as o; o('s3://more').write('key', b'kept')")
            end([state.processes[name] for name in ("mlflow", "postgres")], signal.SIGKILL, 10)
            assert jobs("stack", "status", *folder).returncode == 7
            again = jobs("stack", "up", *folder, *options)
            assert again.returncode == 0, again.stderr
            assert jobs("stack", "status", *folder).returncode == 0
            assert jobs("stack", "down", *folder).returncode == 0
            refuse_traces(more.stack)
            assert jobs("stack", "down", *folder).returncode == 0
    kept = stack.python("from pipeline.storage import open_storage as o; print(o('s3://more').read('key'))")
    assert kept.stdout == "b'kept'\n", "what lies in somebody's S3 is not the stack's to remove"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 7, "access refused"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, 3, "export AWS_ACCESS_KEY_ID"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 7, "nobody answers; check the endpoint"),
        ({"AWS_ENDPOINT_URL": "http://me:hunter2@127.0.0.1:9"}, 3, "error: not an S3 endpoint; --s3 is like"),
    ],
)
def test_an_s3_that_lets_nobody_in_is_one_line(
    tmp_path: Path, stack: RunningStack, change: dict[str, str], code: int, words: str
) -> None:
    known = stack.s3_environment | change
    folder = ["--folder", str(tmp_path / "stack")]
    said = jobs("stack", "up", *folder, "--s3", known["AWS_ENDPOINT_URL"], "--no-ray", environment=known)
    assert said.returncode == code
    assert words in said.stderr
    assert said.stderr.count("\n") == 1
    assert jobs("stack", "down", *folder).returncode == 0
    assert not (tmp_path / "stack").exists()


def test_a_missing_package_is_one_line_with_its_cure(tmp_path: Path) -> None:
    said = jobs("stack", "up", "--folder", str(tmp_path / "stack"), environment={"PATH": "/nowhere"})
    assert said.returncode == 3
    assert "apt-get install" in said.stderr
    assert said.stderr.count("\n") == 1
    assert jobs("stack", "down", "--folder", str(tmp_path / "stack")).returncode == 0
    assert not (tmp_path / "stack").exists()


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for verb in ("up", "down"):
        said = jobs("stack", verb, "--folder", str(tmp_path))
        assert said.returncode == 3
        assert "thesis.txt" in said.stderr
    assert (tmp_path / "thesis.txt").exists()
