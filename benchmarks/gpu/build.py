"""Builds fusedrnn._C beside its sources with what is installed: `python -m benchmarks.gpu.build`.

setup.py runs in a folder without pyproject.toml: the extension needs nothing of it, and a setuptools older
than the one that it asks for refuses its licence line.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .driver import ROOT

NEEDED = ("setup.py", "csrc", "fusedrnn")
_CHECK = "from fusedrnn.backends import native; why = native.unavailable(); print(why or ''); exit(bool(why))"


def missing(modules: Sequence[str] = ("setuptools", "setuptools.modified", "pybind11")) -> str | None:
    """The first module that a build needs and that is not installed; None if all are."""
    for name in modules:
        parent = name.partition(".")[0]
        if find_spec(parent) is None:
            return f"{name} is not installed: pip install {name}"
        if find_spec(name) is None:
            return f"{parent} is too old, it lacks {name}: pip install -U {parent}"
    return None


def build(temporary: Path) -> int:
    """setup.py build_ext --inplace, with objects in ``temporary``; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED:
            (Path(folder) / name).symlink_to(ROOT / name)
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", str(temporary)]
        return subprocess.run(command, cwd=folder).returncode


def main() -> int:
    if why_not := missing():
        print(why_not)
        return 1
    if status := build(ROOT / "build" / f"gpu-{sys.implementation.cache_tag}"):
        return status
    # in a process of its own: this one may have looked for the extension before it was there
    done = subprocess.run([sys.executable, "-c", _CHECK], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout.strip() or done.stderr.strip() or "fusedrnn._C is built and loads")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
