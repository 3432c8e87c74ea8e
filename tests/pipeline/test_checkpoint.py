"""Promises of checkpoints: the format, exact return, a crash or damage at any place costs at most one step."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint import Loaded, accepting, load_latest
from pipeline.errors import ConfigError, ConflictError, DataError
from pipeline.retention import pin
from pipeline.saver import Saver, save, shares
from pipeline.storage import Folder, Storage, open_storage
from pipeline.world import World
from tests.pipeline.group import run_group
from tests.reliability import measured

PRINT = "f" * 64


def things(step: int) -> dict[str, torch.Tensor]:
    """A small model's worth of tensors, of every kind a run has."""
    flat = torch.arange(40.0) * step
    return {
        "model/a.weight": flat[:12].view(3, 4).t(),
        "model/a.bias": flat[12:15],
        "model/order": torch.arange(5),
        "model/mask": torch.tensor([True, False]),
        "ema/a.weight": flat[:12].view(3, 4),
        "ema/half": torch.ones(3, dtype=torch.bfloat16) * step,
        "optim/a.weight/step": torch.tensor(float(step)),
        "optim/a.weight/exp_avg": flat[20:32].view(4, 3),
    }


def state_of(step: int) -> dict[str, Any]:
    return {"position": step * 16, "guard": {"running": 0.1 * step}}


def put(run: Storage, step: int, world: World | None = None, **options: Any) -> None:
    save(run, world or World(), step, step * 16, PRINT, things(step), state_of(step), **options)


def check(loaded: Loaded | None, step: int) -> None:
    assert loaded is not None
    assert (loaded.step, loaded.images) == (step, step * 16)
    assert loaded.state == state_of(step)
    assert sorted(loaded.tensors) == sorted(things(step))
    for name, tensor in things(step).items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def latest(run: Storage, events: list[str] | None = None) -> Loaded | None:
    return load_latest(run, World(), accepting(PRINT), (events if events is not None else []).append)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def test_what_was_saved_comes_back(run: Storage) -> None:
    assert latest(run) is None
    for step in (1, 2):
        put(run, step)
        check(latest(run), step)


def test_the_format_is_this_one_for_ever(run: Storage) -> None:
    tensors = {"model/w": torch.tensor([1.0, 2.0])}
    save(run, World(), 12, 192, "abc", tensors, {"position": 192}, attempt="0123456789abcdef")
    part, commit = "0123456789abcdef/part-000.safetensors", "commit.json"
    home = run.sub("checkpoints/step-00000012")
    assert home.list() == [part, commit]
    assert home.read(part) == (64).to_bytes(8, "little") + GOLDEN_HEADER + bytes.fromhex("0000803f00000040")
    assert home.read(commit).decode() == GOLDEN_COMMIT


GOLDEN_HEADER = b'{"model/w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}    '
GOLDEN_COMMIT = (
    '{"attempt":"0123456789abcdef","fingerprint":"abc","images":192,'
    '"parts":[{"bytes":80,"file":"0123456789abcdef/part-000.safetensors",'
    '"sha256":"5d9b8d72d4f586dcf14bc0f8f934386b857d6b6a1e94d10981d73e9496aa7021"}],"schema":1,'
    '"sha256":"e7b020960c5ededb7b4e6612e0c080b870136572547cc7fcf1e1aa1587324c2d",'
    '"state":{"position":192},"step":12}\n'
)


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=5), st.integers(0, 50), max_size=20), st.integers(1, 7))
def test_parts_share_tensors_by_size(lengths: dict[str, int], ranks: int) -> None:
    tensors = {name: torch.zeros(length) for name, length in lengths.items()}
    parts = shares(tensors, ranks)
    assert sorted(name for names in parts for name in names) == sorted(tensors)
    assert all(parts)
    assert len(parts) <= ranks
    filled = [sum(tensors[name].nbytes for name in names) for names in parts]
    if len(parts) > 1:
        assert max(filled) - min(filled) <= max(tensor.nbytes for tensor in tensors.values()) + len(tensors)
    assert parts == shares(dict(reversed(tensors.items())), ranks)


def test_retention_keeps_the_last_by_step_number(run: Storage) -> None:
    for step in (5, 7, 10, 100, 20):  # 20 after 100: as after passing over a damaged 100
        put(run, step, keep=2)
    kept = [key.split("/")[1] for key in run.list() if key.endswith("commit.json")]
    assert kept == ["step-00000010", "step-00000020", "step-00000100"]
    check(latest(run), 100)


def test_the_first_at_each_so_many_images_and_pinned_steps_stay(run: Storage) -> None:
    """Also for a writer that begins anew before every one, over gaps, and past one whose commit is unreadable."""
    pin(run, 3)
    for step in (3, 4, 5, 7, 8, 9, 11, 13, 14, 15):  # 48 to 240 images
        put(run, step, keep=1, keep_every=64)
        if step == 8:
            run.sub("checkpoints").write("step-00000008/commit.json", b"cut")
    assert sorted(kept_steps(run)) == [3, 4, 9, 13, 15]
    saver = Saver(run, World(), PRINT, keep=1, keep_every=64)
    for step in (16, 17, 18):
        saver.begin(step, step * 16, things(step), state_of(step))
        saver.finish()
    saver.close()
    assert sorted(kept_steps(run)) == [3, 4, 9, 13, 16, 18]
    check(latest(run), 18)


def kept_steps(run: Storage) -> set[int]:
    return {int(key.split("/")[0].removeprefix("step-")) for key in run.sub("checkpoints").list()}


def test_order_is_by_number_never_by_clock(run: Storage) -> None:
    for step in (3, 2):
        put(run, step)
    assert run.local is not None
    for path in run.local.rglob("step-00000002/**/*"):
        os.utime(path, (4e9, 4e9))
    check(latest(run), 3)
    put(run, 100_000_000)
    check(latest(run), 100_000_000)


def test_attempts_without_commit_are_cleaned_by_the_next_save(run: Storage) -> None:
    put(run, 1)
    for left in ("step-00000001/dead", "step-00000002/dead", "step-00000003/dead"):
        run.write(f"checkpoints/{left}/part-000.safetensors", b"left over")
    check(latest(run), 1)
    put(run, 2)
    assert [key for key in run.list() if "dead" in key] == ["checkpoints/step-00000003/dead/part-000.safetensors"]
    put(run, 3)
    assert not [key for key in run.list() if "dead" in key]


def test_another_fingerprint_is_refused(run: Storage) -> None:
    put(run, 1)
    with pytest.raises(ConflictError, match="another name"):
        load_latest(run, World(), accepting("e" * 64))


def test_the_same_step_again(run: Storage) -> None:
    put(run, 1)
    before = run.list()
    put(run, 1)  # the same content: nothing to do, and the second attempt is not left behind
    run_of_two_parts(run, 1)  # as after passing over it with another number of ranks
    assert run.list() == before
    with pytest.raises(ConflictError, match="another writer"):
        save(run, World(), 1, 16, PRINT, {**things(1), "model/a.bias": torch.zeros(3)}, state_of(1))
    assert run.list() == before
    for damaged in (0, 1):
        run.write(run.list()[damaged], b"damaged")
        put(run, 1)
        check(latest(run), 1)
        assert len(run.list()) == 2


# Damage


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    changed = {
        "flip": data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        "truncate": data[: len(data) // 2],
        "empty": b"",
        "longer": data + b"\0",
    }
    path.unlink() if kind == "remove" else path.write_bytes(changed[kind])


@pytest.mark.parametrize("kind", ["flip", "truncate", "empty", "longer", "remove"])
def test_damage_costs_one_step_loudly(run: Storage, kind: str) -> None:
    for step in (1, 2):
        run_of_two_parts(run, step)
    assert run.local is not None
    for path in sorted(run.local.glob("checkpoints/step-00000002/**/*.*")):
        whole = path.read_bytes()
        damage(path, kind)
        events: list[str] = []
        check(latest(run, events), 1)
        gone = kind == "remove" and path.name == "commit.json"  # then it was never a checkpoint
        assert len(events) == (0 if gone else 1)
        assert gone or "step 2 is damaged" in events[0]
        path.write_bytes(whole)
    check(latest(run), 2)


def run_of_two_parts(run: Storage, step: int) -> None:
    """Write as two ranks would: a tensor a part."""
    run_group(2, put_as, run.url, step)


def put_as(world: World, url: str, step: int) -> None:
    put(open_storage(url), step, world)


def load_as(world: World, url: str) -> tuple[int, dict[str, Any], list[str]]:
    events: list[str] = []
    loaded = load_latest(open_storage(url), world, accepting(PRINT), events.append)
    assert loaded is not None
    return loaded.step, {name: tensor.tolist() for name, tensor in loaded.tensors.items()}, events


def test_every_flipped_byte_of_a_commit_is_seen(run: Storage) -> None:
    for step in (1, 2):
        put(run, step)
    assert run.local is not None
    path = run.local / "checkpoints/step-00000002/commit.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        events: list[str] = []
        loaded = latest(run, events)
        assert loaded is not None
        assert (loaded.step, len(events)) == (1, 1)
    measured("R9", "a commit with one byte flipped: refused, one step back, said", len(whole), f"of {len(whole)} bytes")


def test_swapped_files_are_seen(run: Storage) -> None:
    for step in (1, 2):
        run_of_two_parts(run, step)
    assert run.local is not None
    first, second = sorted(run.local.glob("checkpoints/step-00000002/*/*"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    events: list[str] = []
    check(latest(run, events), 1)
    shutil.copytree(run.local / "checkpoints/step-00000001", run.local / "checkpoints/step-00000003")
    check(latest(run, events), 1)
    assert len(events) == 3


def test_no_silent_fresh_start(run: Storage) -> None:
    put(run, 1)
    run.write("checkpoints/step-00000001/commit.json", b"{}")
    with pytest.raises(DataError, match="none of 1"):
        latest(run)


# Ranks


def test_two_ranks_share_the_parts_and_load_the_same(run: Storage) -> None:
    put(run, 1)
    run_of_two_parts(run, 2)
    names = {key.rsplit("/", 1)[1]: key for key in run.list("checkpoints/step-00000002")}
    assert sorted(names) == ["commit.json", "part-000.safetensors", "part-001.safetensors"]
    check(latest(run), 2)
    loaded = run_group(2, load_as, run.url)
    assert loaded[0][:2] == loaded[1][:2]
    assert loaded[0][0] == 2
    run.write(names["part-001.safetensors"], b"damaged")
    assert [(step, len(events)) for step, _, events in run_group(2, load_as, run.url)] == [(1, 1), (1, 0)]


class Full(Folder):
    """A storage whose disk is full on one rank's part."""

    def write(self, key: str, data: bytes) -> None:
        if key.endswith("part-001.safetensors"):
            raise ConfigError("No space left on device", where=self.where(key), cure="make room")
        super().write(key, data)


def put_on_full_disk(world: World, url: str) -> str:
    try:
        put(Full(url), 2, world)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_full_disk_fails_cleanly_on_every_rank(run: Storage) -> None:
    put(run, 1)
    before = run.list()
    messages = run_group(2, put_on_full_disk, run.url)
    assert all("No space left" in message for message in messages)
    assert run.list() == before
    check(latest(run), 1)
    left = len(set(run.list()) - set(before))
    measured("R13", "a checkpoint of two ranks on a full disk: both end in a line, and of it is left", left, "files")


# Crashes: a real process dies just before the k-th thing it does to the run's folder.

CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


def save_and_die(folder: str, step: int, deadly: int) -> None:
    """Save `step`, dying at change number `deadly` below `folder`."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or folder not in str(args[0]) or (event == "open" and not (args[2] & os.O_ACCMODE)):
            return
        seen += 1
        if seen == deadly:
            os._exit(9)

    put(open_storage(folder), 1)
    put(open_storage(folder), 2, keep=2)
    sys.addaudithook(hook)
    put(open_storage(folder), step, keep=2)


def test_a_crash_anywhere_loses_at_most_the_step_being_saved(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.world", "pipeline.saver"])
    ends: list[int] = []
    while not ends or ends[-1] != 0:
        folder = tmp_path / str(len(ends) + 1)
        process = context.Process(target=save_and_die, args=(str(folder), 3, len(ends) + 1))
        process.start()
        process.join(60)
        ends.append(process.exitcode if process.exitcode is not None else -1)
        survives(open_storage(str(folder)))
    assert set(ends[:-1]) == {9}
    assert len(ends) > 12
    measured("R8", "boundaries of a save in a folder, a death at each: the last one loads", len(ends) - 1, "deaths")


def survives(run: Storage) -> None:
    """The last commit loads in silence, training goes on from it, and soon nothing is left of the crash."""
    events: list[str] = []
    loaded = latest(run, events)
    assert loaded is not None
    assert not events
    check(loaded, loaded.step)
    assert loaded.step in (2, 3)
    for step in range(loaded.step + 1, 5):
        put(run, step, keep=2)
    check(latest(run), 4)
    assert run.local is not None
    left = sorted(path for path in run.local.rglob("*") if path.is_file())
    assert [path.parent.name for path in left if path.name == "commit.json"] == ["step-00000003", "step-00000004"]
    assert len([path for path in left if not path.name.startswith(".")]) == 4
