"""Laws of storage, the same for a folder and for S3."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, ConflictError, DataError, RemoteError, UsageError
from pipeline.storage import (
    MissingError,
    Storage,
    canonical_json,
    checked_endpoint,
    checked_key,
    open_storage,
    sha256_file,
    sha256_hex,
)
from pipeline.storage.s3 import filesystem

BACKENDS = ("folder", "s3")

names = st.text(
    st.characters(codec="utf-8", categories=("L", "N"), include_characters="-_=+ ,()"), min_size=1, max_size=8
)
keys = st.lists(names.map(str.strip).filter(bool), min_size=1, max_size=3).map("/".join)


@pytest.fixture(params=BACKENDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "store"))
    return open_storage(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")


def test_what_was_written_is_read(storage: Storage) -> None:
    for data in (b"", b"one", b"two, longer"):
        storage.write("a/b/c", data)
        assert (storage.read("a/b/c"), storage.size("a/b/c"), storage.exists("a/b/c")) == (data, len(data), True)


def test_list_is_recursive_relative_and_sorted(storage: Storage) -> None:
    assert storage.list() == storage.list("nothing") == []
    for key in ("b/2", "b/10", "a", "b/c/d", "bb"):
        storage.write(key, b"")
    assert storage.list() == ["a", "b/10", "b/2", "b/c/d", "bb"]
    assert storage.list("b") == ["b/10", "b/2", "b/c/d"]
    assert storage.sub("b").list() == ["10", "2", "c/d"]
    assert storage.sub("b").read("c/d") == b""


def test_missing_objects_are_data_errors_that_name_them(storage: Storage) -> None:
    storage.write("folder/key", b"")
    for key in ("nothing", "folder"):
        assert not storage.exists(key)
        for ask in (storage.read, storage.size, lambda key: storage.download(key, Path(os.devnull))):
            with pytest.raises(MissingError, match=key):
                ask(key)
    assert issubclass(MissingError, DataError)


def test_create_wins_once(storage: Storage) -> None:
    storage.create("one", b"first")
    with pytest.raises(ConflictError, match="one"):
        storage.create("one", b"second")
    assert storage.read("one") == b"first"


def test_of_many_threads_that_create_exactly_one_wins(storage: Storage) -> None:
    def attempt(number: int) -> int | None:
        try:
            storage.create("race", b"%d" % number)
        except ConflictError:
            return None
        return number

    with ThreadPoolExecutor(16) as pool:
        winners = [number for number in pool.map(attempt, range(16)) if number is not None]
    assert len(winners) == 1
    assert storage.read("race") == b"%d" % winners[0]


RACER = """
import sys
from pipeline.errors import ConflictError
from pipeline.storage import open_storage
storage = open_storage(sys.argv[1])
won = 0
for key in range(20):
    try:
        storage.create(f"race-{key}", sys.argv[2].encode())
        won += 1
    except ConflictError:
        continue
print(won)
"""


def test_of_many_processes_that_create_exactly_one_wins(storage: Storage) -> None:
    command = [sys.executable, "-c", RACER, storage.url]
    racers = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE) for number in range(3)]
    won = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(won) == len(storage.list()) == 20
    held = [storage.read(f"race-{key}") for key in range(20)]
    assert [held.count(b"%d" % number) for number in range(3)] == won


def test_files_go_up_and_come_down(storage: Storage, tmp_path: Path) -> None:
    up, down = tmp_path / "up", tmp_path / "down"
    up.write_bytes(os.urandom(300_000))
    storage.upload(up, "far/away")
    storage.download("far/away", down)
    assert down.read_bytes() == up.read_bytes() == storage.read("far/away")
    assert sha256_file(down) == sha256_hex(up.read_bytes())


def test_removal(storage: Storage) -> None:
    for key in ("tree/a", "tree/b/c", "trees", "other"):
        storage.write(key, b"x")
    storage.remove("other")
    storage.remove("other")
    storage.remove_tree("tree")
    storage.remove_tree("tree")
    assert storage.list() == ["trees"]


def test_a_storage_is_a_value(storage: Storage) -> None:
    storage.write("key", b"x")
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301 - our own bytes
    assert copy == storage == open_storage(storage.url)
    assert copy.read("key") == b"x"
    assert storage.where("key").endswith("/key")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.dictionaries(keys, st.binary(max_size=64), max_size=6), st.data())
def test_a_folder_behaves_like_a_mapping(tmp_path: Path, objects: dict[str, bytes], data: st.DataObject) -> None:
    # A key that is also the folder of another is no file; S3 would allow it, a folder does not.
    objects = {
        key: value for key, value in objects.items() if not any(other.startswith(key + "/") for other in objects)
    }
    folder = open_storage(str(tmp_path / uuid.uuid4().hex))
    for key, value in objects.items():
        folder.write(key, value)
    assert {key: folder.read(key) for key in folder.list()} == objects
    for key in data.draw(st.permutations(sorted(objects))):
        folder.remove(key)
        assert not folder.exists(key)
    assert folder.list() == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/.b", "a\\b", "a\nb", "a\x00"])
def test_keys_that_could_leave_the_prefix_are_refused(key: str, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with pytest.raises(DataError, match="not a storage key"):
        storage.write(key, b"")
    with pytest.raises(DataError, match="not a storage key"):
        storage.sub(key)


def test_addresses(tmp_path: Path) -> None:
    assert open_storage(str(tmp_path)).local == open_storage(f"file://{tmp_path}").local == tmp_path
    assert open_storage("s3://bucket//a/b/").url == "s3://bucket/a/b"
    assert open_storage("s3://bucket").local is None
    for address in ("", "gs://bucket/a", "s3://", "s3:///a", "file://relative", "http://host/a"):
        with pytest.raises(UsageError):
            open_storage(address)


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAEXAMPLE:hunter2@bucket/a",
        "s3://AKIAEXAMPLE:hunter2/bucket",
        "s3://AKIAEXAMPLE:hun/hunter2@bucket/a",
        "s3://bucket?aws_secret_access_key=hunter2",
        "s3://bucket/a?aws_secret_access_key=hunter2",
        "https://bucket.s3.amazonaws.com/a?X-Amz-Credential=AKIAEXAMPLE&X-Amz-Signature=hunter2",
    ],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_storage(address)
    assert str(caught.value).startswith(f"{address.partition(':')[0]}://...: not a storage address; ")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("taken/by", b"a folder")
    with pytest.raises((ConfigError, MissingError)):
        storage.write("taken", b"x")
    with pytest.raises(ConflictError):
        storage.create("taken/by", b"x")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "by"]


def test_temporary_files_are_not_keys(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    (tmp_path / ".1234.tmp").write_bytes(b"half")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "key").write_bytes(b"")
    assert storage.list() == []


def test_virtual_hosts_as_the_aws_configuration_asks(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket becomes part of the host's name; whether that name leads anywhere is the network's business."""
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    server = os.environ["AWS_ENDPOINT_URL"].replace("127.0.0.1", "localhost")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert filesystem().url("tests/x").startswith(f"{server}/tests/x?")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{server}/")
    assert filesystem().url("tests/x").startswith(f"{server.replace('//', '//tests.')}/x?")


@pytest.mark.parametrize("endpoint", ["https://s3.eu-west-1.amazonaws.com", "http://[::1]:9000/", "http://a-b:80/c"])
def test_endpoints(endpoint: str) -> None:
    assert checked_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "AKIA:hunter2@127.0.0.1:9",
        "ftp://127.0.0.1:9",
        "http://AKIA:hunter2@127.0.0.1",
        "http://AKIA:hun/hunter2@127.0.0.1:9",
        "http://127.0.0.1:hunter2",
        "http://127.0.0.1:9/?key=hunter2",
    ],
)
def test_an_endpoint_with_a_secret_is_refused_without_repeating_it(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ConfigError) as caught:
        open_storage("s3://tests/a").read("key")
    told = "".join(traceback.format_exception(caught.value))
    assert "ConfigError: not an S3 endpoint; AWS_ENDPOINT_URL is like https://host:port" in told
    assert "hunter2" not in told


def test_a_missing_bucket_is_named(s3: str) -> None:
    storage = open_storage("s3://no-such-bucket/a")
    for ask in (lambda: storage.list(), lambda: storage.read("key"), lambda: storage.write("key", b"")):
        with pytest.raises(RemoteError, match="no such bucket"):
            ask()


REFUSED = """
from pipeline.storage import open_storage
open_storage("s3://tests/refused").read("key")
"""


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "hunter2", "RemoteError: s3://tests/refused/key: access refused"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "RemoteError: http://127.0.0.1:9: no S3 server answers"),
    ],
)
def test_refusals_never_tell_a_secret(s3: str, variable: str, value: str, message: str) -> None:
    environment = dict(os.environ) | {variable: value}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True, timeout=120)
    assert message in done.stderr.strip().splitlines()[-1]
    assert "hunter2" not in done.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.stderr


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "Ä"}) == '{"a":"Ä","b":[1,2.5,null]}\n'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))
    assert checked_key("a/b") == "a/b"
