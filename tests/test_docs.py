"""The README's road is walked on a toy scale, and what documents say of commands, codes and files is true."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from jobs.__main__ import GROUPS, main
from jobs.presets import PRESETS
from pipeline import errors
from tests.jobs.runs import TINY, followed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("infra/**/*.md")])
ROAD = [
    line for block in re.findall(r"<!-- road -->\n```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
]
"""The commands that are executed, in order."""

COMMAND = re.compile(r"(?:python -m jobs|-m jobs|glow-jobs) ([a-z]+(?:[ ][^`\n|]*)?)")


def commands(text: str) -> list[list[str]]:
    """The words after `python -m jobs` of every command in a document, with lines that end in \\ joined."""
    found = COMMAND.findall(text.replace("\\\n", " "))
    # A command inside quotes brings the closing one along.
    bare = [command[:-1] if command.endswith("'") and command.count("'") % 2 else command for command in found]
    split = [shlex.split(command, comments=True) for command in bare]
    return [words for words in split if words[0] in GROUPS]


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = main([*words, "--help"])
    except SystemExit as stop:
        code = stop.code or 0
    assert code == 0
    return capsys.readouterr().out


def subcommands(group: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    found = re.search(r"(?:\[-h\] )\{?([a-z-]+(?:[,|][a-z-]+)*)\}?(?: \.\.\.)?\n", help_of([group], capsys))
    return re.split("[,|]", found[1]) if found else []


@pytest.mark.road
def test_the_road_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the README's road, in its order, with fewer images."""
    assert len(ROAD) > 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY.format(images=480))
    for line in ROAD:
        words = shlex.split(line.replace("--images 4000", "--images 160"))
        if words[3] == "train":
            words[5:5] = ["--config", "tiny.toml"]
        if words[3] == "bench":
            words += ["--rounds", "2"]
        code, output = followed([sys.executable, *words[1:]])
        assert code == 0, f"{line}\n{output}"
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code, output = followed([sys.executable, "-W", "ignore", "-c", f"{script}\nprint(images.shape, images.dtype)"])
    assert code == 0, output
    assert "(4, 32, 32, 3) uint8" in output
    made = {"datasets/faces/manifest.json", "datasets/faces.png", "runs/faces/eval/val.html", "faces.html", "faces.png",
            "temperatures.png", "runs/faces/model/model.json", "mlflow.db"}  # fmt: skip
    assert {name for name in made if not (tmp_path / name).is_file()} == set()


@pytest.mark.parametrize("group", GROUPS)
def test_every_command_is_in_the_readme_and_has_help(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = {tuple(words[:2]) for words in commands(README)}
    known = subcommands(group, capsys)
    if not known:
        assert group in {words[0] for words in named} or f"make {group}" in README
    for name in known:
        assert len(help_of([group, name], capsys)) > 100
        if (group, name) != ("bench", "memory"):
            assert (group, name) in named, f"python -m jobs {group} {name} is not in the README"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist_with_their_flags(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        group, *rest = words
        target = [group]
        if group == "train":
            target = [group, rest[0] if rest and rest[0] in PRESETS else "toy32"]
        elif rest and not rest[0].startswith("-") and rest[0] in subcommands(group, capsys):
            target = [group, rest[0]]
        known = help_of(target, capsys) + " --help --dry-run --config"
        for flag in (word.split("=")[0] for word in rest if word.startswith("--")):
            assert flag in known, f"{path.name}: python -m jobs {' '.join(words)}: no {flag}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_table_of_exit_codes_is_the_exception_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.PipelineError)}
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert documented == codes | {0, 130}


def test_what_make_is_asked_for_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "".join(path.read_text(encoding="utf-8") for path in [*DOCUMENTS, ROOT / ".ci" / "run"])
    asked = re.findall(r"(?:^|`|timed )make ([a-z]+)\b", text, re.MULTILINE)
    assert len(asked) > 5
    assert set(asked) <= targets
