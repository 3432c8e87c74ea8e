"""The command line: quick help, exit codes, one line for every refusal."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.__main__ import GROUPS, main, overview
from jobs.presets import PRESETS, table
from jobs.train import parse
from pipeline.errors import UsageError


def test_the_overview_is_quick_and_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'numpy', 'tyro', 'rich'}"
    code = f"import sys; from jobs.__main__ import main; main(['--help']); sys.exit(bool({heavy} & set(sys.modules)))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert time.perf_counter() - start < 5 * 0.3  # the bench says how quick; this says that nothing heavy crept in
    assert all(f"  {name}" in done.stdout for name in GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_no_command_has_the_name_of_a_module_beside_it(group: str) -> None:
    """Importing such a module would put it in the command's place."""
    package = importlib.import_module(f"jobs.{group}")
    modules = {module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))}
    assert not modules & {name for name, value in vars(package).items() if inspect.isfunction(value)}


def test_no_command_is_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == f"{overview()}\n"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_overview_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, overview().splitlines())) <= columns


def test_an_unknown_command_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: no command 'trian'; did you mean train?\n"


@pytest.mark.parametrize("group", GROUPS)
def test_every_command_has_help(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([group, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code in (0, None)
    assert f"python -m jobs {group}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("train", 2, "which preset?"),
        ("train toy3", 2, "did you mean toy32?"),
        ("train toy32 --config", 2, "--config wants a file"),
        ("train toy32", 3, "no dataset given; --data.prefix"),
        ("train toy32 --config none.toml", 3, "none.toml: cannot be read"),
        ("train toy32 --data.prefix nowhere --schedule.leaf 5", 3, "does not divide"),
        ("train toy32 --data.prefix nowhere", 4, "nowhere: no dataset here: no manifest.json"),
        ("train toy32 --data.prefix nowhere --dry-run", 4, "no manifest.json"),
        ("train toy32 --data.prefix s3://b?key=hunter2 --dry-run", 2, "s3://...: not a storage address"),
        ("train toy32 --data.prefix b --tracking.uri http://me:hunter2@host", 3, "tracking.uri holds a password"),
        ("train toy32 --data.prefix b --tracking.uri http://me:hunter2@host --dry-run", 3, "holds a password"),
        ("cluster status --address http://me:hunter2@host", 2, "http://host: not the address of a job server"),
        ("cluster doctor --here --uri http://me:hunter2@host", 3, "uri holds a password"),
        ("data prepare a s3://b/c?key=hunter2 --address http://127.0.0.1:9", 3, "the command holds a password"),
        ("data prepare https://host/faces", 2, "no DEST"),
        ("data prepare https://host/faces faces", 2, "https://host/faces: not a "),
        ("data prepare a b --address", 2, "--address wants an address"),
        ("train toy32 --data.prefix b --tracking.uri mlruns", 2, "mlruns: not an MLflow address"),
        ("evaluate nowhere", 2, "nowhere: not a run: no config.toml"),
        ("evaluate nowhere --max-images -1", 2, "max-images -1; 1 or more"),
        ("evaluate nowhere --temperature -1", 2, "temperature -1.0; 0 or more"),
        ("evaluate nowhere --temperature nan", 2, "temperature nan; 0 or more"),
        ("evaluate nowhere --temperature inf", 2, "temperature inf; 0 or more"),
        ("evaluate nowhere --workers -1", 2, "workers -1; 1 or more"),
        ("evaluate nowhere --report .", 2, ".: no name for a page; --report report.html"),
        ("evaluate nowhere --report a/", 2, "a/: no name for a page; --report report.html"),
        ("evaluate nowhere --report a.json", 2, "a.json: no name for a page; --report report.html"),
        ("evaluate nowhere --report s3://a.html", 2, "s3://: not a storage address"),
        ("evaluate nowhere --report /proc/a.html", 2, "/proc: no folder; --report FOLDER/report.html"),
        ("evaluate nowhere --report /proc/cpuinfo/a.html", 2, "/proc/cpuinfo: no folder"),
        ("evaluate models:/faces@champion --uri nonsense://x", 2, "nonsense://x: not an MLflow address"),
        ("models register nowhere", 2, "nowhere: not a run: no config.toml"),
        ("models history faces --uri mlruns", 2, "mlruns: not an MLflow address"),
        ("models promote faces 1 --alias latest", 2, "alias 'latest'; lower case"),
        ("models promote faces 1 --limits none.toml", 3, "none.toml: cannot be read"),
        ("models verify nowhere", 4, "model.json: missing from the model folder"),
        ("evaluate s3://AKIAEXAMPLE:hunter2/faces", 2, "s3://...: not a storage address"),
    ],
)
def test_refusals_are_one_line_with_an_exit_code(
    command: str, code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert "hunter2" not in line


def test_a_flag_that_is_not_there_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "toy32", "--optim.lrr", "3"])
    assert stop.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err


def test_flags_win_over_files_and_files_over_presets(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("name = 'file'\n[optim]\nlr = 0.5\nbeta1 = 0.5\n[schedule]\nimages = 99\n")
    words = ["toy32", "--optim.lr", "0.25", "--config", str(file), "--memory.anchor-every", "4", "0", "--dry-run"]
    config, dry_run = parse(words)
    assert dry_run
    assert (config.name, config.optim.lr, config.optim.beta1, config.schedule.images) == ("file", 0.25, 0.5, 99)
    assert config.memory.anchor_every == (4, 0)
    assert config.model == PRESETS["toy32"].config.model


def test_the_table_of_presets_is_aligned() -> None:
    lines = table().splitlines()
    assert len(lines) == len(PRESETS) + 1
    column = lines[0].index("published")
    published = [line[column:].split()[0] for line in lines[1:]]
    assert published == [f"{entry.published:.2f}" if entry.published else "-" for entry in PRESETS.values()]


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean celebahq256"):
        parse(["celebahq265"])
