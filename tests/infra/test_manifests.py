"""What a cluster gets is what the product reads: types, unknown keys, commands, names, versions, rights of pods."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs.train import main, parse
from pipeline.config import TrainConfig, refuse_impossible
from pipeline.toy import write_toy
from tests.infra.manifests import INFRA, KUSTOMIZATIONS, ROOT, Object, at, containers, load, one, pods, rendered

KUBERAY = KUSTOMIZATIONS[:2]
KUBERNETES = ("1.30", kubernetes_validate.latest_version())
OURS = [(place, found) for place in KUSTOMIZATIONS for found in rendered(INFRA / place)]
NAMES = [f"{place}:{found['kind']}/{found['metadata']['name']}" for place, found in OURS]
CUSTOM = [(name, found) for name, (_, found) in zip(NAMES, OURS, strict=True) if found["apiVersion"] == "ray.io/v1"]
STOCK = [(name, found) for name, (_, found) in zip(NAMES, OURS, strict=True) if found["apiVersion"] != "ray.io/v1"]
PODS = [(f"{name}{path}", pod) for name, (_, found) in zip(NAMES, OURS, strict=True) for path, pod in pods(found)]

READERS = {
    # name                            who reads it
    "AWS_ACCESS_KEY_ID":              ("botocore", "credentials.py"),
    "AWS_SECRET_ACCESS_KEY":          ("botocore", "credentials.py"),
    "AWS_ENDPOINT_URL":               ("botocore", "configprovider.py"),
    "AWS_DEFAULT_REGION":             ("botocore", "configprovider.py"),
    "AWS_REQUEST_CHECKSUM_CALCULATION": ("botocore", "configprovider.py"),
    "AWS_RESPONSE_CHECKSUM_VALIDATION": ("botocore", "configprovider.py"),
    "MLFLOW_TRACKING_URI":            ("mlflow", "environment_variables.py"),
    "MLFLOW_TRACKING_USERNAME":       ("mlflow", "environment_variables.py"),
    "MLFLOW_TRACKING_PASSWORD":       ("mlflow", "environment_variables.py"),
    "MLFLOW_AUTH_CONFIG_PATH":        ("mlflow", "server/auth/config.py"),
    "MLFLOW_AUTH_ADMIN_USERNAME":     ("mlflow", "server/auth/config.py"),
    "MLFLOW_AUTH_ADMIN_PASSWORD":     ("mlflow", "server/auth/config.py"),
    "MLFLOW_BACKEND_STORE_URI":       ("mlflow", "cli/__init__.py"),
    "MLFLOW_FLASK_SERVER_SECRET_KEY": ("mlflow", "server/auth/__init__.py"),
    "RAY_API_SERVER_ADDRESS":         ("ray", "_private/ray_constants.py"),
    "RAY_AUTH_MODE":                  ("ray", "exceptions.py"),
    "RAY_AUTH_TOKEN":                 ("ray", "exceptions.py"),
    "RAY_AUTH_TOKEN_PATH":            ("ray", "exceptions.py"),
    "RAY_JOB_STOP_WAIT_TIME_S":       ("ray", "dashboard/modules/job/job_supervisor.py"),
    "RAY_USAGE_STATS_ENABLED":        ("ray", "_common/usage/usage_constants.py"),
}  # fmt: skip
"""Every such name in infra/, and the file of the installed package that reads it."""

PLANTED = (
    # kind         where                                                  key nobody knows
    ("RayCluster", "spec",                                                "authOption"),
    ("RayCluster", "spec/headGroupSpec",                                  "rayStartParam"),
    ("RayCluster", "spec/workerGroupSpecs/0",                             "replica"),
    ("RayCluster", "spec/workerGroupSpecs/0/template/spec/containers/0",  "envfrom"),
    ("RayJob",     "spec",                                                "deletionPolicy"),
    ("RayJob",     "spec/rayClusterSpec/headGroupSpec/template/spec",     "runAsNonRoot"),
    ("Deployment", "spec/template/spec/containers/0",                     "liveness"),
    ("StatefulSet", "spec",                                               "volumeClaimTemplate"),
    ("NetworkPolicy", "spec/ingress/0",                                   "form"),
)  # fmt: skip


@functools.cache
def definitions() -> dict[str, Any]:
    """KubeRay's schemas by kind, from the folder of CRDs that GLOW_CRDS names."""
    folder = os.environ.get("GLOW_CRDS")
    if not folder:
        pytest.skip("GLOW_CRDS names no folder of KubeRay's custom resource definitions (ray.io/v1)")
    schemas = {}
    for kind in ("RayCluster", "RayJob"):
        (definition,) = load(Path(folder) / f"{kind.lower()}s.yaml")
        (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
        schemas[kind] = closed(version["schema"]["openAPIV3Schema"])
    return schemas


def closed(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses keys it does not name; the API server would drop them in silence."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def check(found: Object) -> None:
    """Raise where the API server would refuse the object or drop a part of it."""
    if found["apiVersion"] == "ray.io/v1":
        jsonschema.Draft202012Validator(definitions()[found["kind"]]).validate(found)
        for _, pod in pods(found):
            check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod["spec"]})
        return
    for version in KUBERNETES:
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("found", [found for _, found in STOCK], ids=[name for name, _ in STOCK])
def test_kubernetes_takes_every_object(found: Object) -> None:
    check(found)


@pytest.mark.parametrize("found", [found for _, found in CUSTOM], ids=[name for name, _ in CUSTOM])
def test_kuberay_takes_every_object(found: Object) -> None:
    check(found)


@pytest.mark.parametrize(("kind", "where", "key"), PLANTED)
def test_a_planted_key_is_refused(kind: str, where: str, key: str) -> None:
    found = copy.deepcopy(next(found for _, found in OURS if found["kind"] == kind))
    check(found)
    at(found, where)[key] = {}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=key):
        check(found)


@pytest.mark.parametrize("place", KUSTOMIZATIONS)
def test_kustomize_renders_the_same(place: str) -> None:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("no kubectl here to compare with")
    done = subprocess.run([program, "kustomize", str(INFRA / place)], capture_output=True, check=True, timeout=60)
    assert order(yaml.safe_load_all(done.stdout)) == order(rendered(INFRA / place))


def order(objects: Any) -> list[Object]:
    return sorted(objects, key=lambda found: (found["kind"], found["metadata"]["name"]))


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])
def test_pods_have_no_rights_they_do_not_need(pod: Object) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert all("hostPath" not in volume for volume in spec.get("volumes", ()))
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][kind].keys()


def test_no_secret_and_no_open_port_in_a_manifest() -> None:
    for _, found in OURS:
        assert found["kind"] != "Secret"
        assert found["kind"] != "Ingress"
        if found["kind"] == "Service":
            assert found["spec"].get("type", "ClusterIP") == "ClusterIP"
        for container in containers(found):
            for variable in container.get("env", ()):
                secret = re.search("PASSWORD|SECRET|TOKEN|_KEY", variable["name"])
                assert not (secret and "value" in variable), variable


@pytest.mark.parametrize("place", KUBERAY)
def test_liveness_is_left_to_kuberay_and_tokens_are_asked_for(place: str) -> None:
    cluster = one(rendered(INFRA / place), "RayCluster")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    for container in containers(cluster):
        assert not {"livenessProbe", "readinessProbe"} & container.keys()
        assert [next(iter(source)) for source in container["envFrom"]] == ["configMapRef", "secretRef", "secretRef"]


@pytest.mark.parametrize("place", KUBERAY)
def test_a_job_has_the_cluster_it_asks_for(place: str) -> None:
    objects = rendered(INFRA / place)
    job, cluster = one(objects, "RayJob"), one(objects, "RayCluster")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    config = submitted(job)
    (group,) = cluster["spec"]["workerGroupSpecs"]
    (worker,) = containers(group)
    assert group["replicas"] == group["minReplicas"] == config.cluster.workers == 2
    assert config.cluster.gpu == ("nvidia.com/gpu" in worker["resources"]["limits"])
    assert config.tracking.uri == one(objects, "ConfigMap")["data"]["MLFLOW_TRACKING_URI"]
    assert config.data.cache == worker["volumeMounts"][0]["mountPath"]
    (volume,) = group["template"]["spec"]["volumes"]
    assert config.data.cache_gb < int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))


@pytest.mark.parametrize("place", KUBERAY)
def test_a_cluster_built_anew_resumes_the_run(place: str) -> None:
    job = one(rendered(INFRA / place), "RayJob")
    assert job["spec"]["backoffLimit"] > 0
    assert "--name" in job["spec"]["entrypoint"].split()
    assert submitted(job) == submitted(job)
    assert submitted(job).storage.startswith("s3://")


def submitted(job: Object) -> TrainConfig:
    """The configuration the RayJob's command means to the real command line."""
    entrypoint = job["spec"]["entrypoint"]
    assert re.fullmatch(r"[\w ./:-]+", entrypoint), "KubeRay puts it into a shell command as it is"
    python, flag, package, group, *arguments = shlex.split(entrypoint)
    assert [python, flag, package, group] == ["python", "-m", "jobs", "train"]
    config, dry_run = parse(arguments)
    assert not dry_run
    refuse_impossible(config)
    return config


def test_the_job_of_the_base_has_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.data import main as data

    write_toy(tmp_path / "faces", images=40, size=64, seed=0)
    assert data(["prepare", str(tmp_path / "faces"), str(tmp_path / "set"), "--workers", "1"]) == 0
    words = shlex.split(one(rendered(INFRA / "kuberay/base"), "RayJob")["spec"]["entrypoint"])[4:]
    local = {"--data.prefix": tmp_path / "set", "--storage": tmp_path / "runs"}
    for flag, folder in local.items():
        words[words.index(flag) + 1] = str(folder)
    assert main([*words, "--dry-run"]) == 0
    assert "2 Ray workers" in capsys.readouterr().out


def test_the_train_command_of_the_runbook_is_one() -> None:
    text = (INFRA / "README.md").read_text().replace("\\\n", " ")
    (words,) = re.findall(r"python -m jobs train (toy64[^']*)'", text)
    config, _ = parse(shlex.split(words))
    refuse_impossible(config)
    assert (config.cluster.address, config.cluster.workers) == ("auto", 2)


@pytest.mark.filterwarnings("ignore")  # MLflow warns of its own code while it is imported
def test_mlflow_is_started_with_options_it_has() -> None:
    from mlflow.cli import server

    objects = rendered(INFRA / "mlflow")
    (container,) = containers(one(objects, "Deployment"))
    assert container["command"] == ["mlflow", "server"]
    options = server.make_context("server", list(container["args"])).params
    assert options["app_name"] == "basic-auth"
    assert options["serve_artifacts"]
    assert options["artifacts_destination"] == "s3://glow/mlflow"
    (port,) = one(objects, "Service", "mlflow")["spec"]["ports"]
    assert port["port"] == options["port"] == container["ports"][0]["containerPort"]
    address = one(rendered(INFRA / "kuberay/base"), "ConfigMap")["data"]["MLFLOW_TRACKING_URI"]
    assert address == f"http://mlflow:{port['port']}"
    assert address.removeprefix("http://") in options["allowed_hosts"].split(",")


def test_every_name_is_read_by_somebody() -> None:
    texts = [path.read_text() for path in INFRA.rglob("*") if path.is_file()]
    used = {name for text in texts for name in re.findall(r"\b(?:AWS|MLFLOW|RAY)_[A-Z_]+\b", text)}
    assert used - {"RAY_HEAD_IP"} == READERS.keys()
    for name, (package, file) in READERS.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        text = (Path(spec.origin).parent / file).read_text()
        assert name in text or name.removeprefix("AWS_").lower() in text, (name, file)


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    clusters = [found for _, found in OURS if found["kind"] == "RayCluster"]
    assert {cluster["spec"]["rayVersion"] for cluster in clusters} == {pinned["ray"]}
    tags = {container["image"] for _, found in OURS for container in containers(found)}
    ours = {f"registry.example.com/glow-pipeline:{project['version']}-{variant}" for variant in ("cpu", "cuda")}
    assert {tag for tag in tags if "glow-pipeline" in tag} == ours
    assert all(re.search(r":[\w.-]*\d[\w.-]*$", tag) for tag in tags), "every image has a version"
    assert set(re.findall(r"glow-pipeline:([\w.-]+)", (INFRA / "aws/ray-cluster.yaml").read_text())) == {
        f"{project['version']}-cpu", f"{project['version']}-cuda",
    }  # fmt: skip


def test_what_the_project_asks_for_is_what_is_pinned() -> None:
    """constraints.txt, by which the image and `make` install, holds every requirement within its bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
        if version
    }
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    asked = [Requirement(each) for each in (*project["dependencies"], *extras) if "glow-pipeline" not in each]
    assert len(asked) > 20
    wrong = [str(each) for each in asked if not each.specifier.contains(pinned.get(canonicalize_name(each.name), "0"))]
    assert not wrong


def test_the_runbook_names_the_versions_in_use() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in (INFRA / "README.md", INFRA / "Dockerfile"):
        assert set(re.findall(r"glow-pipeline:([\d.]+)-", path.read_text())) == {project["version"]}
