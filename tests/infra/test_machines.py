"""The image and the `ray up` file: pinned, without root, and taken by Ray's own checks; no request leaves here."""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.cluster import ENVIRONMENT
from jobs.cluster.jobs import STOP_SECONDS as ASKER_WAITS
from jobs.cluster.training import STOP_SECONDS as DRIVER_WAITS
from tests.infra.manifests import INFRA, ROOT, load, rendered

DOCKERFILE = INFRA / "Dockerfile"
RAY_UP = INFRA / "aws" / "ray-cluster.yaml"


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continuations joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def ray_up() -> dict[str, Any]:
    (config,) = load(RAY_UP)
    return config


def test_the_image_stands_on_pinned_bases() -> None:
    arguments = dict(rest.split("=") for name, rest in instructions() if name == "ARG")
    stages: set[str] = set()
    for base, stage in (rest.split(" AS ") for name, rest in instructions() if name == "FROM"):
        variants = {base.replace("${VARIANT}", variant) for variant in ("cpu", "cuda")}
        assert variants <= stages or re.fullmatch(r"python:\$\{PYTHON_VERSION\}-slim-bookworm", base), base
        stages.add(stage)
    assert re.fullmatch(r"\d+\.\d+\.\d+", arguments["PYTHON_VERSION"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    minor = arguments["PYTHON_VERSION"].rpartition(".")[0]
    assert any(classifier.endswith(f":: {minor}") for classifier in project["classifiers"])
    (labels,) = [rest for name, rest in instructions() if name == "LABEL"]
    assert f"org.opencontainers.image.version={project['version']} " in labels


def test_the_image_runs_without_root() -> None:
    found = instructions()
    last = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    users = [rest for name, rest in found[last:] if name == "USER"]
    assert users == ["1000:1000"]
    after = found[max(index for index, (name, _) in enumerate(found) if name == "USER") :]
    assert {name for name, _ in after} <= {"USER", "WORKDIR", "CMD"}


def test_the_image_installs_only_pinned_packages() -> None:
    pinned = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for _, rest in (each for each in instructions() if each[0] == "RUN" and "pip install" in each[1]):
        words = shlex.split(rest)
        assert words[:4] == ["pip", "install", "--constraint", "constraints.txt"]
        named = [word for word in words[4:] if not word.startswith(("-", "https:", "."))]
        assert {re.sub(r"\[.*", "", word).lower() for word in named} <= pinned
    for _, rest in (each for each in instructions() if each[0] == "COPY"):
        assert all((ROOT / word).exists() or word.startswith(("/", ".", "--from")) for word in rest.split()), rest


def test_the_image_installs_what_the_project_says_it_needs() -> None:
    (own,) = [shlex.split(rest)[4:] for name, rest in instructions() if name == "RUN" and "'." in rest]
    assert own == [".[serve,stack]"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"boto3", "mlflow[auth]", "psycopg2-binary"} <= {re.split("[~>=<]", each)[0] for each in extras["stack"]}


def test_the_image_knows_its_commit() -> None:
    found = instructions()
    last = found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]
    (known,) = [index for index, (name, rest) in enumerate(last) if name == "ENV"]
    assert "GLOW_REVISION=${REVISION}" in last[known][1].split()
    assert last.index(("ARG", "REVISION=")) < known
    for command in re.findall(r"docker build[^`]*?\.\n", (INFRA / "README.md").read_text()):
        assert "--build-arg REVISION=$(git rev-parse HEAD)" in command


def test_a_stopped_job_has_as_long_as_on_one_machine() -> None:
    patience = ENVIRONMENT["RAY_JOB_STOP_WAIT_TIME_S"]
    assert DRIVER_WAITS < int(patience) < ASKER_WAITS
    assert f"--env RAY_JOB_STOP_WAIT_TIME_S={patience}" in ray_up()["docker"]["run_options"]
    (names,) = [found["data"] for found in rendered(INFRA / "kuberay/base") if found["kind"] == "ConfigMap"]
    assert names["RAY_JOB_STOP_WAIT_TIME_S"] == patience
    (cluster,) = [found for found in rendered(INFRA / "kuberay/base") if found["kind"] == "RayCluster"]
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] == int(patience)


def test_nothing_but_the_source_reaches_the_image() -> None:
    lines = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    copied = {word for words in sources for word in words}
    assert kept == copied


def test_ray_takes_its_cluster_file() -> None:
    validate_config(prepare_config(ray_up()))


@pytest.mark.parametrize(
    ("where", "key"), [((), "max_worker"), (("docker",), "images"), (("provider", "security_group"), "IpPermission")]
)
def test_ray_refuses_a_planted_key(where: tuple[str, ...], key: str) -> None:
    config = ray_up()
    place = config
    for part in where:
        place = place.setdefault(part, {})
    place[key] = {}
    with pytest.raises(jsonschema.ValidationError, match=key):
        validate_config(prepare_config(config))


def test_no_port_of_ray_is_open() -> None:
    config = ray_up()
    for node in config["available_node_types"].values():
        # With groups of its own Ray opens nothing; without, SSH to the world.
        assert all(group.startswith("sg-") for group in node["node_config"]["SecurityGroupIds"])
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert node["node_config"]["IamInstanceProfile"]
    assert "security_group" not in config["provider"]
    assert not any(re.search(r"(--publish|-p[ =]|--privileged)", option) for option in config["docker"]["run_options"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_head_and_workers_are_kinds_of_machine() -> None:
    config = ray_up()
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}, "training never runs beside the head"
    assert "GPU" not in types["cpu"]["resources"]
    assert types["gpu"]["resources"]["GPU"] > 0
    assert types["gpu"]["docker"]["worker_image"].endswith("-cuda")
    assert types["head"]["node_config"]["IamInstanceProfile"] != types["cpu"]["node_config"]["IamInstanceProfile"]
    token = next(option for option in config["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in option)
    assert token.partition("PATH=")[2] in config["file_mounts"]


@pytest.mark.parametrize("place", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_is_started_with_options_it_has(place: str) -> None:
    from ray.scripts.scripts import start

    stop, command = ray_up()[place]
    assert stop == "ray stop"
    source, words = command.rsplit(";", 1)[0], shlex.split(command.rsplit(";", 1)[1])
    assert source == "set -a; . ~/cluster.env; set +a"
    assert words[:2] == ["ray", "start"]
    options = start.make_context("start", words[2:]).params
    assert options["dashboard_host"] in (None, "127.0.0.1", "localhost")
