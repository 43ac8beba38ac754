"""Builds fusedrnn._C with the C++ compiler alone: no torch, no network.

FUSEDRNN_CUDA=auto|0|1 is the one build variable: whether CUDA sources are compiled when nvcc is
there, never, or must be. There are none yet.
"""

import glob
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Only these files may use instructions beyond the platform's baseline.
ISA_FLAGS = {
    "scan_avx2.cpp": AVX2,
    "scan_avx512.cpp": AVX512,
    "scan_avx512bf16.cpp": [*AVX512, "-mavx512bf16"],
    "attend_avx2.cpp": AVX2,
    "attend_avx512.cpp": AVX512,
}
SOURCES = [
    *("csrc/bindings.cpp", "csrc/stepper.cpp", "csrc/attend.cpp"),
    *("csrc/cpu/dispatch.cpp", "csrc/cpu/step.cpp", "csrc/cpu/attend.cpp", "csrc/cpu/barrier.cpp"),
    *("csrc/cpu/scan_portable.cpp", "csrc/cpu/attend_portable.cpp"),
]
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES += [f"csrc/cpu/{name}" for name in ISA_FLAGS]


# What every object depends on beside its source: the flags are in this file.
HEADERS = ["setup.py", *glob.glob("csrc/**/*.h", recursive=True)]


def say(message: str) -> None:
    print(f"fusedrnn: {message}", file=sys.stderr, flush=True)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = os.path.join(home, "bin", "nvcc")
    return path if os.path.exists(path) else shutil.which("nvcc")


def check_cuda() -> None:
    wanted = os.environ.get("FUSEDRNN_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FUSEDRNN_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        say("built without CUDA kernels (FUSEDRNN_CUDA=0)")
    elif find_nvcc() is None:
        if wanted == "1":
            sys.exit("FUSEDRNN_CUDA=1, but no nvcc in CUDA_HOME, /usr/local/cuda or PATH")
        say("built without CUDA kernels (no nvcc)")
    else:
        say("built without CUDA kernels (none in this version)")


class Build(build_ext):
    """Adds per-file ISA flags, compiles what is outdated, in parallel, and does without a compiler."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.distribution.get_command_obj("editable_wheel", create=False) is not None:
            # An editable install gives a fresh folder each time: nothing in it could be up to date.
            self.build_temp = os.path.join("build", f"editable-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        if not self.compiles():
            say("no working C++17 compiler with OpenMP: installed without _C, so without fused kernels")
            self.extensions = []
            return
        check_cuda()
        compiler = self.compiler
        compile_one = compiler._compile

        def compile_all(
            sources,
            output_dir=None,
            macros=None,
            include_dirs=None,
            debug=0,
            extra_preargs=None,
            extra_postargs=None,
            depends=None,
        ):
            _, objects, extra, pp, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            args = compiler._get_cc_args(pp, debug, extra_preargs)

            def one(obj: str) -> None:
                src, ext = build[obj]
                flags = ISA_FLAGS.get(os.path.basename(src), [])
                compile_one(obj, src, ext, args, [*extra, *flags], pp)

            # setuptools would compile all of them again
            outdated = [obj for obj in objects if self.force or newer_group([build[obj][0], *HEADERS], obj)]
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                list(pool.map(one, outdated))
            return objects

        compiler.compile = compile_all
        super().build_extensions()

    def compiles(self) -> bool:
        """Whether the compiler makes a shared library of a small C++17 file with OpenMP."""
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            with open(source, "w") as file:
                file.write("#include <omp.h>\n#include <string>\n")
                file.write("int probe() { if constexpr (true) return omp_get_max_threads(); }\n")
            # an older setuptools has one command for C and C++
            compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
            command = [*compiler, "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
            command += [source, "-o", os.path.join(folder, "probe.so")]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False


setup(
    ext_modules=[
        Extension(
            "fusedrnn._C",
            SOURCES,
            include_dirs=["csrc", pybind11.get_include()],
            depends=HEADERS,
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp", "-Wl,--exclude-libs,ALL"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": Build},
)
