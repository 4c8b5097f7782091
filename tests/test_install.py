"""setup.py: the CUDA decision, the errors a user reads, and installs with and without the extension."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup_py(monkeypatch):
    for name in ("MMFAST_CUDA", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "CXX", "MMFAST_NO_EXT"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("mmfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "expected", "reason"),
    [
        ("13.0", "13.2", True, "built for CUDA 13.0, and nvcc is version 13.2"),
        ("13.0", "12.8", False, "built for CUDA 13.0, but nvcc is version 12.8"),
        ("13.0", None, False, "no nvcc was found"),
        (None, "13.0", False, "built without CUDA"),
        (None, None, False, "built without CUDA"),
    ],
)
def test_cuda_by_default_where_it_can_be(setup_py, torch_cuda, nvcc, expected, reason):
    cuda, why = setup_py.decide_cuda("2.13.0", torch_cuda, nvcc)
    assert cuda is expected
    assert reason in why


@pytest.mark.parametrize("variable", ["MMFAST_CUDA", "FORCE_CUDA"])
@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "parts"),
    [
        ("13.0", "12.8", ["CUDA 13.0", "nvcc is version 12.8", "CUDA 13 toolkit", "torch built for CUDA 12.8"]),
        ("13.0", None, ["CUDA 13.0", "no nvcc was found", "install the CUDA toolkit 13.0", "CUDA_HOME"]),
        (None, "13.0", ["torch 2.13.0 is built without CUDA", "install a CUDA build of torch", "nvcc is 13.0"]),
    ],
)
def test_cuda_asked_for_in_vain(setup_py, monkeypatch, variable, torch_cuda, nvcc, parts):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit) as stop:
        setup_py.decide_cuda("2.13.0", torch_cuda, nvcc)
    for part in [*parts, f"{variable}=1", f"{variable}=0"]:
        assert part in str(stop.value)


def test_cuda_refused(setup_py, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("MMFAST_CUDA", "0")
    assert setup_py.decide_cuda("2.13.0", "13.0", "13.0") == (False, "MMFAST_CUDA=0")
    monkeypatch.setenv("MMFAST_CUDA", "perhaps")
    with pytest.raises(SystemExit, match="MMFAST_CUDA must be 1 or 0, got 'perhaps'"):
        setup_py.decide_cuda("2.13.0", "13.0", "13.0")


def fake(path: Path, output: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


def test_nvcc_of_cuda_home_wins_over_path(setup_py, monkeypatch, tmp_path):
    fake(tmp_path / "path" / "nvcc", "Cuda compilation tools, release 12.6, V12.6.1")
    home = fake(tmp_path / "home" / "bin" / "nvcc", "Cuda compilation tools, release 13.1, V13.1.2")
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    assert setup_py.find_nvcc() == (str(tmp_path / "path" / "nvcc"), "12.6")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home"))
    assert setup_py.find_nvcc() == (str(home), "13.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert setup_py.find_nvcc() is None


def test_no_compiler(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"(?s)no C\+\+ compiler.*g\+\+.*MMFAST_NO_EXT=1"):
        setup_py.find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="CXX=no-such-compiler does not run"):
        setup_py.find_compiler()


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is LLVM's elsewhere")
def test_clang_is_refused(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(fake(tmp_path / "cxx", "Debian clang version 19.1.7")))
    with pytest.raises(SystemExit, match=r"is clang[^\n]*\nFix: install g\+\+"):
        setup_py.find_compiler()


def test_old_cmake(setup_py, monkeypatch, tmp_path):
    fake(tmp_path / "cmake", "cmake version 3.18.4")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"older than CMake 3\.22"):
        setup_py.find_cmake()


def test_folder_of_a_moved_tree_is_forgotten(setup_py, tmp_path):
    for home, kept in ((setup_py.ROOT, True), ("elsewhere", False)):
        build = tmp_path / str(kept)
        build.mkdir()
        (build / "CMakeCache.txt").write_text(f"A:B=C\nCMAKE_HOME_DIRECTORY:INTERNAL={home}\nD:E=F\n")
        setup_py.forget_other_tree(build)
        assert build.exists() == kept


def run(*command: str, cwd: Path = ROOT, succeeds: bool = True, **environment: str) -> str:
    """Everything that ``command`` prints."""
    env = os.environ | environment
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


def wheel(source: Path, folder: Path, **environment) -> str:
    """What ``pip wheel`` prints."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
    ]
    return run(*pip, "-w", str(folder), str(source), **environment)


def installed(folder: Path) -> Path:
    """Where the wheel in ``folder`` gets installed."""
    (file,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    run(*pip, "--target", str(folder / "site"), str(file))
    return folder / "site"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, unpacked: what a build has to do with."""
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    # From a copy of what is tracked, so that nothing else of the working tree gets in and no egg-info is left in it.
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not tracked:
        pytest.skip("needs a git checkout")
    tree = folder / "tree"
    for name in tracked.strip("\0").split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-c", code, str(folder), cwd=tree)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "out")
    return next((folder / "out").iterdir())


@pytest.mark.native
@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ("avx2 sse9", ["MMFAST_ISAS", "'sse9'", "baseline"]),
        pytest.param(
            "baseline, amx",
            ["MMFAST_ISAS", "amx", "leaves the others to avx512", "baseline, amx"],
            marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="no AMX there"),
        ),
    ],
)
def test_instruction_sets_that_cannot_be_built(setup_py, tmp_path, asked, parts):
    command = [setup_py.find_cmake(), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DMMFAST_ISAS={asked}"]
    ninja = f"-DCMAKE_MAKE_PROGRAM={setup_py.find_tool('ninja', 'BIN_DIR')}"
    log = run(*command, ninja, "-DMMFAST_NATIVE_TESTS=ON", "-DMMFAST_EMULATE_AMX=ON", succeeds=False)
    log = " ".join(log.split())  # CMake breaks lines
    for part in parts:
        assert part in log


def test_sdist_has_every_source(sdist):
    for folder in ("csrc", "cmake", "mmfast"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".h", ".cpp", ".cu", ".cmake"):
                assert (sdist / file.relative_to(ROOT)).is_file(), file
    assert (sdist / "CMakeLists.txt").is_file()


def test_pure_python_install(sdist, tmp_path):
    """Without a compiler: the wheel is for any machine, installs, and computes with the reference."""
    log = wheel(sdist, tmp_path, MMFAST_NO_EXT="1", CXX="no-such-compiler")
    assert "mmfast: installing without native kernels (MMFAST_NO_EXT=1)" in log
    (file,) = tmp_path.glob("*.whl")
    assert file.name.endswith("-py3-none-any.whl")
    assert all(name.startswith("mmfast") for name in zipfile.ZipFile(file).namelist())
    code = """
import torch, mmfast
from mmfast.mel import MelConfig, extract
print(mmfast.__file__, mmfast._backend._C, *extract(torch.randn(2, 16000), MelConfig(n_mels=40)).shape)
"""
    site = installed(tmp_path)
    # -S: no .pth files, hence no editable install in the way; torch then has to be found by hand.
    paths = os.pathsep.join([str(site), sysconfig.get_path("platlib"), *filter(None, sys.path)])
    output = run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=paths, MMFAST_BACKEND="")
    assert output.strip().endswith(f"{site}/mmfast/__init__.py None 2 40 81")


@pytest.mark.native
@pytest.mark.skipif(os.environ.get("MMFAST_SLOW_TESTS") != "1", reason="compiles the extension again; .ci/run does")
def test_wheel_from_sdist(sdist, tmp_path):
    """The extension builds from what the source distribution holds, loads from where pip puts it, and computes."""
    # One instruction set: the others are the same files. Nothing optimised: make native-test checks what is.
    arguments = " ".join([os.environ.get("CMAKE_ARGS", ""), "-DCMAKE_CXX_FLAGS_RELEASE=-O0", "-DMMFAST_TILE_LEVEL=-O0"])
    log = wheel(sdist, tmp_path, MMFAST_NO_EXT="", MMFAST_ISAS="baseline", CMAKE_ARGS=arguments)
    assert "mmfast: building with" in log
    site = installed(tmp_path)
    code = """
import torch
from mmfast import _backend as b
from mmfast.mel import MelConfig, extract
x, config = torch.randn(2, 16000, dtype=torch.float64), MelConfig(n_mels=40)
torch.testing.assert_close(extract(x, config, backend="cpu"), extract(x, config, backend="reference"))
print(b._C.__file__, *b._C.build_info()["isa_built"], b._C.build_info()["isa_used"])
"""
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site), MMFAST_CPU_ISA="").strip()
    assert output.startswith(f"{site}/mmfast/_C")
    assert output.endswith(" baseline baseline")


def test_error_reaches_the_user(sdist, tmp_path):
    """pip shows the message, not a traceback of the build."""
    log = wheel(sdist, tmp_path, succeeds=False, CXX="no-such-compiler", MMFAST_NO_EXT="")
    assert "mmfast: no C++ compiler: CXX=no-such-compiler does not run" in log
    assert "Traceback" not in log
