"""The public surface of glow: sorted, complete, documented, and torch alone."""

from __future__ import annotations

import inspect
import subprocess
import sys

import glow


def test_everything_public_is_listed_and_sorted() -> None:
    assert glow.__all__ == sorted(glow.__all__)
    here = {name for name, value in vars(glow).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert set(glow.__all__) == here


def test_everything_public_says_what_it_is() -> None:
    for name in glow.__all__:
        documentation = inspect.getdoc(getattr(glow, name)) or ""
        assert documentation.split("\n")[0].rstrip().endswith((".", ")", "]")), name


def test_glow_needs_torch_and_nothing_else() -> None:
    script = """if True:
        import sys, torch
        before = {name.split(".")[0] for name in sys.modules}
        import glow
        new = {name.split(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
        assert new <= {"glow", "torch"}, new
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
