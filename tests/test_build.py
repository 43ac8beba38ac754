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
    """What setup.py defines."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(SETUP))


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


def test_the_extension_needs_no_library_of_torch_or_cuda():
    if native.unavailable():
        pytest.skip(native.unavailable())
    needed = subprocess.run(["ldd", native._C.__file__], capture_output=True, text=True).stdout
    assert not any(name in needed for name in ("torch", "c10", "libcuda")), needed


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


# ---- CUDA ----------------------------------------------------------------------------------------

# Writes what it is told to, or complains as nvcc does of a g++ that is too new.
NVCC = """#!/bin/sh
case "$1" in
--list-gpu-arch) printf '%s' "compute_75 compute_80 compute_90" ;;
--dryrun) echo '#$ LIBRARIES=  "-L/nowhere" "-L{folder}"' ;;
--version) echo "release 12.4" ;;
*) test -n "$REFUSES" && {{ echo "error: unsupported GNU version!"; exit 1; }}
   while [ $# -gt 0 ]; do test "$1" = -o && touch "$2"; shift; done ;;
esac
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """The folder of an nvcc that knows no architecture after 90."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(NVCC.format(folder=tmp_path))
    path.chmod(0o755)
    (tmp_path / "libcudart_static.a").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("FUSEDRNN_CUDA", raising=False)
    return tmp_path


def test_nvcc_compiles_for_what_it_knows(nvcc, monkeypatch):
    found = setup_globals(monkeypatch)["cuda"]()
    assert found.architectures == ("80", "90a")
    assert found.libraries == str(nvcc)
    command = found.command("x.cu", "x.o", threads=3)
    assert [word for word in command if "gencode" in word] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert "--threads=3" in command


def test_without_cuda_the_reason_is_said(nvcc, monkeypatch):
    cuda = setup_globals(monkeypatch)["cuda"]
    monkeypatch.setenv("REFUSES", "1")
    refused = f"{nvcc}/bin/nvcc does not compile: error: unsupported GNU version!"
    assert cuda() == refused
    monkeypatch.setenv("FUSEDRNN_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FUSEDRNN_CUDA=1, but .* unsupported GNU version"):
        cuda()
    monkeypatch.setenv("FUSEDRNN_CUDA", "0")
    assert cuda() == "FUSEDRNN_CUDA=0"
    monkeypatch.setenv("FUSEDRNN_CUDA", "auto")
    (nvcc / "libcudart_static.a").unlink()
    assert cuda() == f"{nvcc}/bin/nvcc has no libcudart_static.a"
    (nvcc / "bin" / "nvcc").unlink()
    monkeypatch.setenv("PATH", str(nvcc))
    assert cuda() == "no nvcc in CUDA_HOME, /usr/local/cuda or PATH"


@pytest.mark.slow
def test_cuda_objects_load_without_a_driver(tmp_path, monkeypatch):
    found = setup_globals(monkeypatch)
    nvcc = found["find_nvcc"]()
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    obj, library = tmp_path / "sync.o", tmp_path / "sync.so"
    subprocess.run(nvcc.command("csrc/cuda/sync_latency.cu", str(obj), threads=2), check=True)
    static = (f"-L{nvcc.libraries}", "-lcudart_static", "-lrt", "-ldl", "-lpthread")
    subprocess.run(["g++", "-shared", obj, "-o", library, *static], check=True)
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"], check=True)


def test_the_extension_says_which_cuda_it_holds():
    if native.unavailable():
        pytest.skip(native.unavailable())
    held, missing = native._C.cuda.architectures, native._C.cuda.missing
    assert (held == []) == (missing is not None)
    assert hasattr(native._C.cuda, "sync_rounds") == (missing is None)


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
