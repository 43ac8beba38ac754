"""Builds fusedrnn._C with the C++ compiler, and nvcc where it is: no torch, no network.

FUSEDRNN_CUDA=auto|0|1 is the one build variable: whether CUDA sources are compiled when nvcc is
there, never, or must be.
"""

import glob
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
    "scan_avx512bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "attend_avx2.cpp": AVX2,
    "attend_avx512.cpp": AVX512,
}
SOURCES = [
    *("csrc/bindings.cpp", "csrc/stepper.cpp", "csrc/one_step.cpp", "csrc/cuda.cpp"),
    *("csrc/layer.cpp", "csrc/stack.cpp", "csrc/linear.cpp", "csrc/packs.cpp"),
    *("csrc/attend.cpp", "csrc/attend_step.cpp"),
    *("csrc/cpu/dispatch.cpp", "csrc/cpu/step.cpp", "csrc/cpu/attend.cpp", "csrc/cpu/barrier.cpp"),
    *("csrc/cpu/level.cpp", "csrc/cpu/sharing.cpp", "csrc/cpu/team.cpp"),
    *("csrc/cpu/scan_portable.cpp", "csrc/cpu/attend_portable.cpp"),
]
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES += [f"csrc/cpu/{name}" for name in ISA_FLAGS]

# Each compiles alone. GPUs between two of these run the lower one's code, later ones the PTX of the last.
CUDA_SOURCES = sorted(glob.glob("csrc/cuda/*.cu"))
ARCHITECTURES = ("80", "90a", "100")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Icsrc"]
HOST_FLAGS = "-Xcompiler=-fPIC,-fvisibility=hidden"

# What objects depend on beside their source: the flags are in this file.
HEADERS = ["setup.py", *glob.glob("csrc/**/*.h", recursive=True)]
CUDA_HEADERS = [path for path in HEADERS if not path.startswith("csrc/cpu/")]
CPU_HEADERS = [path for path in HEADERS if not path.startswith("csrc/cuda/")]


def say(message: str) -> None:
    print(f"fusedrnn: {message}", file=sys.stderr, flush=True)


class Nvcc(NamedTuple):
    """A compiler of CUDA sources, and those of ARCHITECTURES that it knows."""

    path: str
    version: str
    architectures: tuple[str, ...]
    libraries: str  # the folder of libcudart_static.a

    def command(self, source: str, to: str, threads: int = 1) -> list[str]:
        last = self.architectures[-1].rstrip("a")  # PTX for one architecture alone would serve no later one
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.architectures]
        targets.append(f"-gencode=arch=compute_{last},code=compute_{last}")
        return [
            *(self.path, *NVCC_FLAGS, *targets, HOST_FLAGS),
            *(f"--threads={threads}", "-c", source, "-o", to),
        ]


def run(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def find_nvcc() -> Nvcc | str:
    """The compiler of CUDA sources, or why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path: str | None = os.path.join(home, "bin", "nvcc")
    if not os.path.exists(path):
        path = shutil.which("nvcc")
    if path is None:
        return "no nvcc in CUDA_HOME, /usr/local/cuda or PATH"
    listed = run(path, "--list-gpu-arch").split()
    known = tuple(arch for arch in ARCHITECTURES if f"compute_{arch.rstrip('a')}" in listed)
    if not known:
        return f"{path} compiles for none of {', '.join(ARCHITECTURES)}"
    with tempfile.TemporaryDirectory() as folder:
        probe, to = os.path.join(folder, "probe.cu"), os.path.join(folder, "probe.o")
        Path(probe).write_text("__global__ void probe() {}\nvoid launch() { probe<<<1, 1>>>(); }\n")
        lines = run(path, "--dryrun", probe).splitlines()  # where it looks, whatever its layout
        folders = [line.partition("=")[2] for line in lines if line.startswith("#$ LIBRARIES=")]
        libraries = [word.removeprefix("-L") for line in folders for word in shlex.split(line)]
        libraries = [each for each in libraries if os.path.exists(os.path.join(each, "libcudart_static.a"))]
        if not libraries:
            return f"{path} has no libcudart_static.a"
        found = Nvcc(path, run(path, "--version"), known, libraries[0])
        message = run(*found.command(probe, to))
        if not os.path.exists(to):  # such as a g++ that is too new for it
            return f"{path} does not compile: {' '.join(message.split())[:200]}"
    return found


def cuda() -> Nvcc | str:
    """What compiles the CUDA sources of this build, or why nothing does."""
    wanted = os.environ.get("FUSEDRNN_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FUSEDRNN_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "FUSEDRNN_CUDA=0"
    found = find_nvcc()
    if wanted == "1" and isinstance(found, str):
        sys.exit(f"FUSEDRNN_CUDA=1, but {found}")
    return found


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
        nvcc = cuda()
        described = self.add_cuda(nvcc)
        compiler = self.compiler
        compiler.src_extensions = [*compiler.src_extensions, ".cu"]
        compile_one = compiler._compile
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

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
                if src.endswith(".cu"):
                    compiler.spawn(nvcc.command(src, obj, jobs))
                    return
                flags = ISA_FLAGS.get(os.path.basename(src), [])
                compile_one(obj, src, ext, args, [*extra, *flags], pp)

            def is_outdated(obj: str) -> bool:
                src = build[obj][0]
                of_cuda = src.startswith("csrc/cuda")
                return newer_group([src, *([*CUDA_HEADERS, described] if of_cuda else CPU_HEADERS)], obj)

            # setuptools would compile all of them again; nvcc takes longest, so it begins
            outdated = [obj for obj in objects if self.force or is_outdated(obj)]
            outdated.sort(key=lambda obj: not build[obj][0].endswith(".cu"))
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(one, outdated))
            return objects

        compiler.compile = compile_all
        super().build_extensions()

    def add_cuda(self, nvcc: Nvcc | str) -> str:
        """Completes the extension; a file that is new whenever CUDA is built in another way."""
        (extension,) = self.extensions
        if isinstance(nvcc, str):
            say(f"built without CUDA kernels ({nvcc})")
            extension.define_macros.append(("FUSEDRNN_NO_CUDA", json.dumps(nvcc)))
        else:
            held = " ".join(nvcc.architectures)
            say(f"CUDA kernels for {held}, by {nvcc.path}")
            extension.sources += CUDA_SOURCES
            extension.define_macros.append(("FUSEDRNN_CUDA_ARCHITECTURES", f'"{held}"'))
            extension.library_dirs.append(nvcc.libraries)
            extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
        described = Path(self.build_temp, "cuda.txt")
        text = "\n".join(map(str, nvcc)) if isinstance(nvcc, Nvcc) else nvcc
        if not described.exists() or described.read_text() != text:
            described.parent.mkdir(parents=True, exist_ok=True)
            described.write_text(text)
        extension.depends.append(str(described))
        return str(described)

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


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "fusedrnn._C",
                SOURCES,
                include_dirs=["csrc", pybind11.get_include()],
                depends=[*HEADERS, *CUDA_SOURCES],
                extra_compile_args=FLAGS,
                extra_link_args=["-fopenmp", "-Wl,--exclude-libs,ALL"],
                language="c++",
            )
        ],
        cmdclass={"build_ext": Build},
    )
