"""Each role may do what its part of the product does in S3, and nothing else."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Storage, open_storage
from pipeline.storage.s3 import filesystem
from tests.infra.manifests import INFRA

BUCKET = "arn:aws:s3:::glow"
PART = 101 << 20
"""Bytes from which the client uploads in parts."""

ACTIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}
"""The right each request of S3 asks for."""

ASKED = {
    "read":     {"HeadObject", "GetObject"},
    "size":     {"HeadObject"},
    "missing":  {"HeadObject", "ListObjectsV2"},
    "list":     {"ListObjectsV2"},
    "write":    {"PutObject"},
    "create":   {"PutObject if absent"},
    "download": {"HeadObject", "GetObject"},
    "upload":   {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"},
    "remove":   {"DeleteObject"},
}  # fmt: skip
"""What each method of Storage asks of S3 (`missing`: size of what is not there)."""

READS = {"read", "size", "missing", "list", "download"}
ALL = set(ASKED) | {"failed upload"}
ROLES = (
    # policy         prefix      what its users do there
    ("policy.json",  "datasets", READS),
    ("policy.json",  "runs",     ALL),
    ("policy.json",  "registry", READS | {"create"}),
    ("policy.json",  "mlflow",   set()),
    ("prepare.json", "datasets", ALL),
    ("prepare.json", "runs",     set()),
    ("mlflow.json",  "mlflow",   ALL),
    ("mlflow.json",  "runs",     set()),
)  # fmt: skip
POLICIES = ("policy.json", "prepare.json", "mlflow.json")
Policy = dict[str, Any]


def policy(name: str) -> Policy:
    return json.loads((INFRA / "iam" / name).read_text())


def allowed(rules: Policy, action: str, resource: str, context: Mapping[str, str] | None = None) -> bool:
    """IAM's decision: any matching Deny wins, then any matching Allow."""
    context = {"aws:SecureTransport": "true"} | dict(context or {})
    effects = {each["Effect"] for each in rules["Statement"] if matches(each, action, resource, context)}
    return effects == {"Allow"}


def matches(statement: Policy, action: str, resource: str, context: dict[str, str]) -> bool:
    return (
        any(fnmatch.fnmatchcase(action, each) for each in listed(statement["Action"]))
        and any(fnmatch.fnmatchcase(resource, each) for each in listed(statement["Resource"]))
        and all(
            holds(operator, context.get(key), listed(values))
            for operator, pairs in statement.get("Condition", {}).items()
            for key, values in pairs.items()
        )
    )


def holds(operator: str, value: str | None, values: list[str]) -> bool:
    """One condition; an operator this function does not know is an error."""
    if operator == "Null":
        return (value is None) == (values == ["true"])
    if operator.endswith("IfExists"):
        return value is None or holds(operator.removesuffix("IfExists"), value, values)
    if operator == "StringLike":
        return value is not None and any(fnmatch.fnmatchcase(value, each) for each in values)
    assert operator == "Bool", operator
    return value in values


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def may(rules: Policy, method: str, prefix: str) -> bool:
    """Whether the rules let a method of Storage do its work below a prefix."""
    requests = {"AbortMultipartUpload"} if method == "failed upload" else ASKED[method]
    return all(may_ask(rules, request, prefix) for request in requests)


def may_ask(rules: Policy, request: str, prefix: str) -> bool:
    name, conditional = request.removesuffix(" if absent"), request.endswith(" if absent")
    action = ACTIONS[name]
    if name == "ListObjectsV2":
        return allowed(rules, action, BUCKET, {"s3:prefix": f"{prefix}/one/"})
    context = {"s3:if-none-match": "*"} if conditional else {}
    # S3 tells of absence (404) only who may list, and asks that without a prefix; to others it says 403.
    told = name != "HeadObject" or allowed(rules, "s3:ListBucket", BUCKET)
    return told and allowed(rules, action, f"{BUCKET}/{prefix}/one/two.json", context)


@pytest.mark.parametrize(("name", "prefix", "done"), ROLES)
def test_a_role_may_do_its_work_and_nothing_else(name: str, prefix: str, done: set[str]) -> None:
    assert {method for method in ALL if may(policy(name), method, prefix)} == done


@pytest.mark.parametrize("name", POLICIES)
def test_every_grant_is_used(name: str) -> None:
    whole = policy(name)
    for index, statement in enumerate(whole["Statement"]):
        for action in listed(statement["Action"]) if statement["Effect"] == "Allow" else ():
            less = json.loads(json.dumps(whole))
            less["Statement"][index]["Action"] = [each for each in listed(statement["Action"]) if each != action]
            work = [(place, do) for policy_name, place, done in ROLES if policy_name == name for do in done]
            assert not all(may(less, do, place) for place, do in work), (statement["Sid"], action)


@pytest.mark.parametrize("name", POLICIES)
def test_other_places_and_clear_text_are_refused(name: str) -> None:
    rules = policy(name)
    for action in set(ACTIONS.values()) - {"s3:ListBucket"}:
        assert not allowed(rules, action, "arn:aws:s3:::another/runs/one")
        assert not allowed(rules, action, f"{BUCKET}/elsewhere/one")
        assert not allowed(rules, action, f"{BUCKET}/runs/one", {"aws:SecureTransport": "false"})
    assert not allowed(rules, "s3:ListBucket", BUCKET, {"s3:prefix": "elsewhere/"})
    assert not allowed(rules, "s3:ListBucket", BUCKET, {"s3:prefix": ""})
    for action in ("s3:PutBucketPolicy", "s3:DeleteBucket", "s3:PutObjectAcl", "s3:DeleteObjectVersion"):
        assert not allowed(rules, action, BUCKET)
        assert not allowed(rules, action, f"{BUCKET}/runs/one")


def test_the_autoscaler_ends_only_its_own_machines() -> None:
    statements = policy("ray-head.json")["Statement"]
    wide = {action for each in statements if "*" in listed(each["Resource"]) for action in listed(each["Action"])}
    assert all(action.startswith("ec2:Describe") for action in wide)
    for each in statements:
        if {"ec2:TerminateInstances", "iam:PassRole"} & set(listed(each["Action"])):
            assert each["Condition"]


@pytest.mark.parametrize("method", ASKED)
def test_storage_asks_for_what_the_table_says(s3: str, method: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3}/iam")
    storage.write("here", b"bytes")
    with recorded() as asked:
        use(storage, method, tmp_path)
    assert asked == ASKED[method]
    storage.remove_tree(method)


def use(storage: Storage, method: str, folder: Path) -> None:
    match method:
        case "missing":
            assert not storage.exists("not/here")
        case "write":
            storage.write("write/one", b"bytes")
        case "create":
            storage.create("create/one", b"bytes")
        case "download":
            storage.download("here", folder / "copy")
        case "upload":
            (folder / "large").write_bytes(bytes(PART))
            storage.upload(folder / "large", "upload/large")
        case "list":
            assert storage.list() == ["here"]
        case _:
            getattr(storage, method)("here")


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The S3 requests this process makes, by the client's own hook."""
    asked: set[str] = set()

    def note(params: dict[str, Any], model: Any, **rest: Any) -> None:
        asked.add(model.name + (" if absent" if params.get("IfNoneMatch") == "*" else ""))

    client = filesystem()
    client.connect()
    events = client.s3.meta.events
    events.register("provide-client-params.s3", note)
    try:
        yield asked
    finally:
        events.unregister("provide-client-params.s3", note)
