"""The manifests as a cluster would get them: the few things of kustomize that infra/ uses, without kustomize."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUSTOMIZATIONS = ("kuberay/base", "kuberay/overlays/gpu", "mlflow")
KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches", "replacements"}
Object = dict[str, Any]


def load(path: Path) -> list[Any]:
    """Every document of a YAML file."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return list(yaml.load_all(path.read_text(), Loader=loader))


def rendered(folder: Path) -> list[Object]:
    """What `kubectl kustomize FOLDER` prints; a key this function does not know is an error."""
    (settings,) = load(folder / "kustomization.yaml")
    assert settings.keys() <= KNOWN, settings.keys() - KNOWN
    objects: list[Object] = []
    for name in settings["resources"]:
        place = (folder / name).resolve()
        objects += rendered(place) if place.is_dir() else load(place)
    for found in objects:
        if "namespace" in settings and found["kind"] != "Namespace":
            found["metadata"]["namespace"] = settings["namespace"]
    for patch in settings.get("patches", ()):
        (changes,) = load(folder / patch["path"])
        for found in objects:
            if found["kind"] == patch["target"]["kind"]:
                for change in changes:
                    _change(found, change)
    for image in settings.get("images", ()):
        for container in containers(objects):
            _retag(container, image)
    for replacement in settings.get("replacements", ()):
        _replace(objects, replacement)
    return objects


def containers(tree: Any) -> Iterator[Object]:
    """Every container at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from containers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from containers(value)


def pods(tree: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """(where, pod template) for every one at any depth."""
    if isinstance(tree, dict) and "containers" in tree.get("spec", {}):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from pods(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from pods(value, f"{path}[{index}]")


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """The object of that kind (and name)."""
    (found,) = [each for each in objects if each["kind"] == kind and name in ("", each["metadata"]["name"])]
    return found


def at(tree: Any, pointer: str) -> Any:
    """The part of a tree that a JSON pointer names."""
    for part in pointer.strip("/").split("/") if pointer.strip("/") else []:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def _change(tree: Object, change: Object) -> None:
    parent, _, key = change["path"].rpartition("/")
    assert change["op"] in ("add", "replace"), change
    place = at(tree, parent)
    assert isinstance(place, dict), change
    assert (key in place) == (change["op"] == "replace"), change
    place[key] = change["value"]


def _retag(container: Object, image: Object) -> None:
    name, _, tag = re.fullmatch(r"(.*?)((?::)([^/:]+))?", container["image"]).groups()  # type: ignore[union-attr]
    if name == image["name"]:
        container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"


def _replace(objects: list[Object], replacement: Object) -> None:
    source = replacement["source"]
    value = at(one(objects, source["kind"], source["name"]), source["fieldPath"].replace(".", "/"))
    for target in replacement["targets"]:
        (path,) = target["fieldPaths"]
        parent, _, key = path.rpartition(".")
        at(one(objects, target["select"]["kind"]), parent.replace(".", "/"))[key] = copy.deepcopy(value)
