"""The doctor on the real system: nothing is wrong; then each thing that is gets named with its cure."""

from __future__ import annotations

import pytest

from tests.running import RunningStack


def test_nothing_is_wrong(stack: RunningStack) -> None:
    said = stack.jobs("cluster", "doctor").stdout.splitlines()
    assert [line.split()[0] for line in said] == ["ok"] * 8


@pytest.mark.parametrize(
    ("change", "code", "what", "cure"),
    [
        ({"RAY_AUTH_TOKEN_PATH": ""}, 3, "wants a token", "RAY_AUTH_TOKEN_PATH"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 7, "no success in", "check the endpoint"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 7, "access refused", "credentials"),
        ({"MLFLOW_TRACKING_PASSWORD": "wrong"}, 7, "answers 401", "MLFLOW_TRACKING_PASSWORD"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, 7, "does not answer", "MLFLOW_TRACKING_URI"),
    ],
)
def test_what_is_wrong_is_named_with_its_cure(
    stack: RunningStack, change: dict[str, str], code: int, what: str, cure: str
) -> None:
    said = stack.jobs("cluster", "doctor", check=code, **change).stdout.splitlines()
    bad = [line for line in said if line.startswith("BAD")]
    assert bad
    assert all(what in line and cure in line for line in bad)
