"""The model folder: its bytes, what its digest covers, and that nothing is parsed before it is checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glow import Glow
from pipeline.errors import DataError, UsageError
from pipeline.golden import verify_model
from pipeline.model import COVERED, LoadedModel, read_model
from pipeline.pyfunc import Sampler
from pipeline.storage import canonical_json, open_storage, sha256_hex
from tests.pipeline.models import tiny_config, tiny_model, write_tiny

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, digest: str = "") -> LoadedModel:
    return read_model(open_storage(str(folder)), digest)


def test_config_json_has_these_bytes(folder: Path) -> None:
    assert (folder / "config.json").read_bytes() == (
        b'{"attributes":["Smiling","Eyeglasses","Wearing_Hat","Bald"],"bits":5,"data":{"digest":"' + b"ab" * 32 + b'",'
        b'"license":"CC0-1.0","validation":"val"},"editable":["Smiling","Eyeglasses","Wearing_Hat"],"family":"glow",'
        b'"labels":["left","right"],"model":{"attributes":3,"channels":3,"classes":2,"condition_splits":true,"condition_steps":false,'
        b'"coupling":"affine","levels":2,"mixing":"lu","size":8,"steps":2,"width":8},"schema":1}\n'
    )


def test_model_json_has_these_bytes_and_its_sha256_is_the_digest(folder: Path) -> None:
    entry = '{{"bytes":{},"sha256":"{}"}}'
    parts = []
    for name in COVERED:
        data = (folder / name).read_bytes()
        parts.append(f'"{name}":' + entry.format(len(data), sha256_hex(data)))
    expected = ('{"files":{' + ",".join(parts) + '},"schema":1}\n').encode()
    assert (folder / "model.json").read_bytes() == expected
    assert load(folder).digest == sha256_hex(expected)


def test_safetensors_files_have_these_tensors(folder: Path) -> None:
    header = (folder / "golden.safetensors").read_bytes()
    tree = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    found = {name: (entry["dtype"], entry["shape"]) for name, entry in tree.items()}
    assert found == {
        "seeds": ("I64", [8]),
        "labels": ("I64", [10]),
        "attributes": ("I8", [10, 3]),
        "latents.0": ("F32", [8, 6, 4, 4]),
        "latents.1": ("F32", [8, 24, 2, 2]),
        "pixels": ("U8", [8, 3, 8, 8]),
    }
    assert [tuple(part.shape) for part in load(folder).directions] == [(3, 6, 4, 4), (3, 24, 2, 2)]


def test_the_digest_depends_on_the_model_and_not_on_who_made_it(tmp_path: Path) -> None:
    first = write_tiny(tmp_path / "a", run="run-1")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    second = write_tiny(tmp_path / "b", run="another run, on another day")
    torch.set_num_threads(threads)
    other = write_tiny(tmp_path / "c", seed=1)
    assert first == second
    assert first != other
    assert (tmp_path / "a" / "lineage.json").read_bytes() != (tmp_path / "b" / "lineage.json").read_bytes()


def test_what_is_loaded_is_what_was_written(folder: Path) -> None:
    loaded, config = load(folder), tiny_config()
    model = tiny_model(config)
    assert loaded.config == config
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in model.state_dict().items())
    assert verify_model(loaded).levels == 0


def test_a_model_on_s3_is_the_same_model(folder: Path, s3: str) -> None:
    storage = open_storage(f"{s3}/model")
    for file in folder.iterdir():
        storage.upload(file, file.name)
    assert read_model(storage).digest == load(folder).digest
    assert torch.equal(read_model(storage).sample([3]), load(folder).sample([3]))


@pytest.mark.parametrize("name", [*COVERED, "model.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_harmed_file_is_named_with_what_was_expected_and_found(folder: Path, name: str, harm: str) -> None:
    digest = load(folder).digest
    data = bytearray((folder / name).read_bytes())
    if harm == "remove":
        (folder / name).unlink()
    else:
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data if harm == "flip" else data[:-1])
    with pytest.raises(DataError) as caught:
        load(folder, digest)
    assert name in caught.value.where
    assert harm == "remove" or re.search("expected .* found ", caught.value.what)


def test_nothing_is_parsed_before_every_file_is_checked(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"{ this would not parse")
    (folder / "weights.safetensors").write_bytes(b"nor would this")
    with pytest.raises(DataError, match="expected"):
        load(folder)


@pytest.mark.parametrize(
    "root",
    [b"[]", b"null", b"{", b'{"schema":2,"files":{}}', b'{"schema":1,"files":{"../x":{"bytes":1,"sha256":"a"}}}',
     b'{"schema":1,"files":[1]}', b'{"schema":1,"files":{"config.json":{"bytes":"1","sha256":"a"}}}'],
)  # fmt: skip
def test_another_model_json_is_refused(folder: Path, root: bytes) -> None:
    (folder / "model.json").write_bytes(root)
    with pytest.raises(DataError, match=r"model\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content"), [("weights.safetensors", b"\x08" + bytes(7) + b'{"a":{} '), ("config.json", b'{"bits":5}')]
)
def test_whole_files_with_meaningless_content_are_refused(folder: Path, name: str, content: bytes) -> None:
    listing = json.loads((folder / "model.json").read_bytes())
    listing["files"][name] = {"bytes": len(content), "sha256": sha256_hex(content)}
    (folder / name).write_bytes(content)
    (folder / "model.json").write_bytes(canonical_json(listing))
    with pytest.raises(DataError, match="cannot be read"):
        load(folder)


def test_a_seed_gives_the_same_pixels_in_whatever_company(folder: Path) -> None:
    loaded = load(folder)
    together = loaded.sample(range(12), 0.9, "+Smiling")
    for seed in (0, 5, 11):
        assert torch.equal(loaded.sample([seed], 0.9, "+Smiling")[0], together[seed])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.equal(loaded.sample(range(12), 0.9, "+Smiling"), together)
    torch.set_num_threads(threads)
    assert not torch.equal(loaded.sample(range(12), 0.9, "-Smiling"), together)
    assert together.shape == (12, 3, 8, 8)
    assert int(together.max()) % 8 == 0


def test_conditions_change_what_is_asked_and_keep_what_is_real(folder: Path) -> None:
    loaded = load(folder)
    label, signs = loaded.condition([0, 1, 10], "+Smiling, -Eyeglasses", 1)
    assert label is not None
    assert signs is not None
    assert label.tolist() == [1, 1, 1]
    assert signs.tolist() == [[1, -1, -1], [1, -1, -1], [1, -1, -1]]
    label, signs = loaded.condition([1, 2, 11])  # as images 1, 2 and, there being ten, 1
    assert label is not None
    assert signs is not None
    assert label.tolist() == [1, 0, 1]
    assert signs.tolist() == [[1, -1, -1], [-1, 1, -1], [1, -1, -1]]
    for spelled in ("Smiling,-Wearing_Hat", '["+Smiling", "-Wearing_Hat"]', ["Smiling", "-Wearing_Hat"]):
        assert loaded.condition([2], spelled)[1].tolist() == [[1, 1, -1]]  # type: ignore[union-attr]


def test_unknown_attributes_and_classes_are_refused_with_a_suggestion(folder: Path) -> None:
    loaded = load(folder)
    with pytest.raises(UsageError, match="did you mean Smiling"):
        loaded.condition([0], "+Smilling")
    with pytest.raises(UsageError, match="attributes here: Smiling, Eyeglasses, Wearing_Hat"):
        loaded.condition([0], "+Bald")
    with pytest.raises(UsageError, match="classes here: 0 to 1"):
        loaded.condition([0], "", 2)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"seed": 10**20}, "seed 100000000000000000000; 0 to"),
        ({"seed": -1}, "seed -1; 0 to"),
        ({"seed": 2**63 - 1, "count": 2}, "seed 9223372036854775808; 0 to"),
        ({"count": 0}, "count 0; 1 to"),
        ({"count": 10**12}, "count 1000000000000; 1 to"),
        ({"temperature": float("nan")}, "temperature nan; 0 or more"),
        ({"temperature": -0.5}, "temperature -0.5; 0 or more"),
        ({"label": 10**20}, "no class"),
        ({"attributes": "+Smilin"}, "did you mean Smiling"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_what_mlflow_serves(
    folder: Path, params: dict[str, float | str], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        Sampler(load(folder)).predict(None, params)


def test_changed_weights_are_noticed_by_the_golden_pixels(folder: Path) -> None:
    loaded = load(folder)
    with torch.no_grad():
        next(p for p in loaded.model.parameters() if p.abs().max() > 0).add_(0.1)
    assert isinstance(loaded.model, Glow)
    assert not verify_model(loaded).passed


LOADER = """
import hashlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = {"ray", "mlflow", "s3fs", "fsspec", "boto3", "botocore", "webdataset", "tyro", "rich", "pandas", "yaml",
           "psutil", "scipy", "skimage", "pyarrow", "torchvision"}
sys.meta_path.insert(0, Absent())
from pipeline.golden import verify_model
from pipeline.registry import load_model
loaded = load_model(sys.argv[1])
check = verify_model(loaded)
assert check.levels == 0, check
pixels = loaded.sample(range(3), 0.7, "+Smiling")
print(loaded.digest, hashlib.sha256(pixels.numpy().tobytes()).hexdigest())
assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
"""


def test_a_model_loads_by_path_where_neither_ray_nor_mlflow_is_installed(folder: Path) -> None:
    command = [sys.executable, "-c", LOADER, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == seen(load(folder))


def seen(loaded: LoadedModel) -> list[str]:
    """What LOADER says of a model: its digest, and that of the pixels of three seeds."""
    pixels = loaded.sample(range(3), 0.7, "+Smiling")
    return [loaded.digest, hashlib.sha256(pixels.numpy().tobytes()).hexdigest()]
