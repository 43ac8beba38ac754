"""The build: files for one instruction set leak nothing that another CPU could be made to run."""

import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusedrnn.backends import native

ROOT = Path(__file__).parent.parent
SETUP = ROOT / "setup.py"
X86 = platform.machine() in ("x86_64", "AMD64")

pytestmark = pytest.mark.skipif(
    not SETUP.exists() or shutil.which("g++") is None or shutil.which("nm") is None,
    reason="needs the source tree, g++ and nm",
)


def setup_globals(monkeypatch):
    """What setup.py defines, without its setup() doing anything."""
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(SETUP), run_name="setup")


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="the ISA-specific files are for x86-64")
@pytest.mark.parametrize(
    "name",
    ["scan_avx2.cpp", "scan_avx512.cpp", "scan_avx512bf16.cpp", "attend_avx2.cpp", "attend_avx512.cpp"],
)
def test_isa_files_have_no_weak_symbols(name, tmp_path, monkeypatch):
    """The linker keeps one copy of a weak symbol: it may be the one that an old CPU cannot run."""
    found = setup_globals(monkeypatch)
    obj = tmp_path / "isa.o"
    flags = [*found["FLAGS"], *found["ISA_FLAGS"][name]]
    subprocess.run(["g++", "-fPIC", *flags, "-c", f"csrc/cpu/{name}", "-o", obj], check=True)
    listing = subprocess.run(["nm", "-C", obj], check=True, capture_output=True, text=True).stdout
    symbols = listing.splitlines()
    assert [line for line in symbols if line[17:18] in "WVu"] == []
    defined = [line.split(maxsplit=2)[2] for line in symbols if line[17:18] in "TDRB"]
    assert {symbol[: len("fusedrnn::kAvx")] for symbol in defined} == {"fusedrnn::kAvx"}, "tables only"


def test_the_extension_needs_no_torch_library():
    if native.unavailable():
        pytest.skip(native.unavailable())
    needed = subprocess.run(["ldd", native._C.__file__], capture_output=True, text=True).stdout
    assert "torch" not in needed
    assert "c10" not in needed


def run_setup(tmp_path, *args, **env):
    folders = ["--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l")]
    return subprocess.run(
        [sys.executable, str(SETUP), *args, *folders],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_the_build_says_so_and_succeeds(tmp_path):
    pytest.importorskip("pybind11")
    done = run_setup(tmp_path, "build_ext", CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "no working C++17 compiler" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_the_build_variable_is_checked(tmp_path):
    pytest.importorskip("pybind11")
    done = run_setup(tmp_path, "build_ext", FUSEDRNN_CUDA="yes")
    assert done.returncode != 0
    assert "FUSEDRNN_CUDA: expected auto, 0 or 1, got 'yes'" in done.stderr


@pytest.mark.parametrize(
    ("name", "fragment"), [("sse9", "FUSEDRNN_ISA: expected one of portable"), ("portable", "portable")]
)
def test_isa_variable(name, fragment):
    if native.unavailable():
        pytest.skip(native.unavailable())
    code = "import torch, fusedrnn._C as c\ntry: print(c.isa())\nexcept ValueError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSEDRNN_ISA": name, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert fragment in done.stdout
