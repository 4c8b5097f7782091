"""Builds the extension mmfast._C: decides about CUDA, checks what a build needs, and lets CMake and Ninja do the rest.

All that is not about building stands in pyproject.toml; all sources and flags in CMakeLists.txt. Install with

    pip install --no-build-isolation .        (or -e .)

so that the extension is built against the torch you have and not against another one in a temporary environment.

Environment:
    MMFAST_NO_EXT=1         no extension at all: everything runs on the reference, in plain PyTorch
    MMFAST_CUDA=1|0         with or without CUDA kernels; FORCE_CUDA means the same; by default with CUDA if it can be
    CUDA_HOME, CUDA_PATH    the CUDA toolkit to use; by default that of the nvcc on PATH, or /usr/local/cuda
    MMFAST_ISAS             instruction sets to compile the CPU kernels for beside baseline, for example "avx2 avx512";
                            by default all that the compiler has
    TORCH_CUDA_ARCH_LIST    as in torch, for example "8.0 9.0+PTX"
    CXX                     the C++ compiler
    MAX_JOBS                compilations at the same time
    DEBUG=1                 unoptimised, with debug information
    CMAKE_ARGS              further arguments for CMake
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(message: str):
    raise SystemExit(f"\nmmfast: {message}\n")


def flag(name: str) -> bool | None:
    """An on/off environment variable; None if it is unset or empty."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    return fail(f"{name} must be 1 or 0, got {value!r}") if value else None


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def find_nvcc() -> tuple[str, str] | None:
    """Path and version of nvcc, from CUDA_HOME or CUDA_PATH if set, else from PATH, else from /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in filter(None, candidates):
        if found := re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version")):
            return nvcc, found[1]
    return None


def decide_cuda(torch_version: str, torch_cuda: str | None, nvcc: str | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why. `torch_cuda` and `nvcc` are versions, None where there is none."""
    asked, name = flag("MMFAST_CUDA"), "MMFAST_CUDA"
    if asked is None:
        asked, name = flag("FORCE_CUDA"), "FORCE_CUDA"
    if asked is False:
        return False, f"{name}={os.environ[name]}"
    problem = fix = ""
    if torch_cuda is None:
        problem = f"torch {torch_version} is built without CUDA"
        toolkit = f" (nvcc is {nvcc})" if nvcc else " (and no nvcc was found)"
        fix = f"install a CUDA build of torch{toolkit}"
    elif nvcc is None:
        problem = f"torch {torch_version} is built for CUDA {torch_cuda}, and no nvcc was found"
        fix = f"install the CUDA toolkit {torch_cuda} and set CUDA_HOME to it"
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        problem = f"torch {torch_version} is built for CUDA {torch_cuda}, but nvcc is version {nvcc}"
        fix = f"set CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit, or install a torch built for CUDA {nvcc}"
    if not problem:
        return True, f"torch {torch_version} is built for CUDA {torch_cuda}, and nvcc is version {nvcc}"
    if asked:
        fail(
            f"{name}={os.environ[name]} asks for CUDA kernels, but {problem}.\n"
            f"Fix: {fix}; or set {name}=0 to build without CUDA."
        )
    return False, problem


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    version = output_of(*shlex.split(compiler), "--version") if compiler else ""
    if not version:
        tried = f"CXX={compiler} does not run" if compiler else "there is none of g++, c++, clang++ on PATH"
        fail(
            f"no C++ compiler: {tried}.\n"
            "Fix: install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)\n"
            "or name one in CXX; or install without native kernels, so that all runs on the reference: MMFAST_NO_EXT=1."
        )
    if sys.platform == "linux" and "clang" in version:
        fail(
            f"{compiler} is clang, whose OpenMP is not the one that torch's Linux builds contain.\n"
            "Fix: install g++ and set CXX=g++; or set MMFAST_NO_EXT=1 to install without native kernels."
        )
    return compiler


def find_tool(name: str, package_dir: str) -> str:
    """cmake or ninja: from PATH, or from the Python package of that name."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")]))
    if found is None:
        try:
            module = __import__(name)
            found = shutil.which(name, path=getattr(module, package_dir))
        except ImportError:
            fail(f"{name} was not found.\nFix: pip install {name}; or install without native kernels: MMFAST_NO_EXT=1.")
    return found


def find_cmake() -> str:
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    version = re.search(r"version (\d+)\.(\d+)", output_of(cmake, "--version"))
    if version is None or (int(version[1]), int(version[2])) < (3, 22):
        fail(f"{cmake} is older than CMake 3.22.\nFix: pip install 'cmake>=3.22'.")
    return cmake


def import_torch():
    try:
        import torch
    except ImportError as error:
        fail(
            f"torch cannot be imported by {sys.executable}: {error}.\n"
            "The extension is built against the torch that is installed.\n"
            "Fix: install torch 2.11 or later first, then\n    pip install --no-build-isolation ."
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        fail(f"torch {torch.__version__} is too old.\nFix: pip install 'torch>=2.11'.")
    return torch


class CMakeBuild(build_ext):
    """Lets CMake build what setuptools believes to be one extension."""

    def build_extension(self, ext):
        compiler, cmake, ninja = find_compiler(), find_cmake(), find_tool("ninja", "BIN_DIR")
        torch = import_torch()
        nvcc = find_nvcc()
        cuda, reason = decide_cuda(torch.__version__, torch.version.cuda, nvcc[1] if nvcc else None)
        print(f"mmfast: building {'with' if cuda else 'without'} CUDA: {reason}", flush=True)
        build = build_folder()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        arguments = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if flag('DEBUG') else 'Release'}",
            f"-DCMAKE_CXX_COMPILER={shlex.split(compiler)[-1]}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DMMFAST_PYTHON={sys.executable}",
            f"-DMMFAST_VERSION={self.distribution.get_version()}",
            f"-DMMFAST_ISAS={os.environ.get('MMFAST_ISAS', '')}",
            f"-DMMFAST_CUDA={'ON' if cuda else 'OFF'}",
            f"-DMMFAST_CUDA_REASON={reason}",
        ]
        if len(shlex.split(compiler)) > 1:  # CXX="ccache g++"
            arguments.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={';'.join(shlex.split(compiler)[:-1])}")
        if cuda:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc[0]}")
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        forget_other_tree(build)
        self.call([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *arguments])
        self.call([cmake, "--build", str(build), "--parallel", jobs])
        target.mkdir(parents=True, exist_ok=True)
        self.call([cmake, "--install", str(build), "--prefix", str(target)])

    def call(self, command: list[str]):
        if subprocess.run(command, check=False).returncode:
            fail(f"the build failed (see above) in\n    {shlex.join(command)}")


def build_folder() -> Path:
    """In the tree, where pip's own temporary folder would be gone before the next build."""
    return ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


def forget_other_tree(build: Path):
    """CMake refuses a build folder that was made for a source tree of another name: one that has been moved."""
    cache = build / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(build)


def main():
    if int(setuptools.__version__.split(".")[0]) < 77:  # it would stop at the licence in pyproject.toml, with a riddle
        fail(f"setuptools {setuptools.__version__} is too old.\nFix: pip install 'setuptools>=77'.")
    extensions = [Extension("mmfast._C", [])]  # no sources: it only makes setuptools call CMakeBuild, once
    if flag("MMFAST_NO_EXT"):
        extensions = []
        print(
            "mmfast: installing without native kernels (MMFAST_NO_EXT=1): everything runs on the reference", flush=True
        )
        for stale in (ROOT / "mmfast").glob("_C.*.so"):
            print(f"mmfast: {stale} is left from an earlier build; an editable install still loads it", flush=True)
    setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})


if __name__ == "__main__":
    if sys.argv[1:] == ["--print-nvcc"]:  # for the Makefile
        print(*(find_nvcc() or ())[:1])
    elif sys.argv[1:] == ["--print-build-folder"]:
        print(build_folder())
    else:
        main()
