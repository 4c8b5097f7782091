"""The house itself: what is built, what happens without it, and whether every slice has all its rooms."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmfast
from mmfast import _backend

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


# An editable install adds a finder that would fetch the extension of this tree into a copy of the package without one.
ONLY_FROM_PATH = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"


def python(code: str, path: Path = ROOT, **environment: str) -> str:
    """Output of ``code`` in a new interpreter that finds mmfast in ``path``, with no other MMFAST_* variable."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MMFAST_")}
    env |= {"PYTHONPATH": str(path), **environment}
    command = [sys.executable, "-c", ONLY_FROM_PATH + code]
    done = subprocess.run(command, env=env, cwd=path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def pure(tmp_path: Path) -> Path:
    """A folder that holds the package without its extension."""
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "mmfast", tmp_path / "pure" / "mmfast", ignore=ignore)
    return tmp_path / "pure"


# ---- What is built


@pytest.mark.native
def test_openmp_is_on():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        info = _backend._C.build_info()
    finally:
        torch.set_num_threads(threads)
    assert info["openmp"] >= 201511  # 4.5
    # A parallel region that the compiler ignored, or one that asks another runtime than torch's, has one thread or all.
    assert info["openmp_threads"] == info["openmp_team"] == 2


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    loaded = python(
        "import re, torch, mmfast._C as c; c.build_info();"
        "maps = open('/proc/self/maps').read();"
        r"print(*sorted(set(re.findall(r'(/\S*/lib(?:gomp|omp|iomp)\S*)', maps))))"
    ).split()
    assert len(loaded) == 1, loaded
    assert "torch" in loaded[0]


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_links_no_runtime_of_its_own():
    dynamic = subprocess.run(["readelf", "-d", _backend._C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(\S+?)\.so", dynamic)
    assert "libtorch_cpu" in needed
    assert not [name for name in needed if "omp" in name]
    assert "$ORIGIN/../torch/lib" in dynamic


@pytest.mark.native
def test_instruction_sets():
    built = _backend._C.build_info()["isa_built"]
    if os.uname().machine == "x86_64":
        assert built[:3] == ["baseline", "avx2", "avx512"]
        assert built[3:] in ([], ["avx512_bf16"], ["avx512_bf16", "amx"])  # as the compiler can
    else:
        assert built == ["baseline"]


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
@pytest.mark.parametrize("limit", ["baseline", "avx2", "avx512", "avx512_bf16", "amx", ""])
def test_best_instruction_set_up_to_the_limit(limit):
    """It is chosen, and it computes what the reference does."""
    flags = set(re.search(r"flags\s*:(.*)", Path("/proc/cpuinfo").read_text() + "flags:")[1].split())
    best = 0
    if {"avx2", "fma", "f16c"} <= flags:
        best = 2 if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= flags else 1
    built = _backend._C.build_info()["isa_built"]
    if best == 2 and "avx512_bf16" in flags and "avx512_bf16" in built:
        best = 4 if {"amx_tile", "amx_bf16"} <= flags and "amx" in built else 3
    names = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    code = """
import torch
from mmfast import _backend
from mmfast.mel import MelConfig, extract
x, config = torch.randn(3, 5000, dtype=torch.float64), MelConfig(n_mels=40, log="ln", log_offset=1e-6, n_mfcc=13)
expected = extract(x, config, backend="reference")
for dtype in (torch.float32, torch.float64):
    torch.testing.assert_close(extract(x.to(dtype), config, backend="cpu").double(), expected, rtol=1e-4, atol=1e-4)
print(_backend._C.build_info()["isa_used"])
"""
    assert python(code, MMFAST_CPU_ISA=limit) == names[min(best, names.index(limit) if limit else 4)]


@pytest.mark.native
@pytest.mark.skipif(os.uname().machine != "x86_64" or not shutil.which("objdump"), reason="reads x86-64 code")
def test_kernels_use_the_wide_registers():
    """Vector code that the compiler left scalar would still compute the right numbers."""
    objdump = ["objdump", "-d", "--no-show-raw-insn", _backend._C.__file__]
    code = subprocess.run(objdump, capture_output=True, text=True, check=True, timeout=300).stdout
    multiply_adds = {
        width: len(re.findall(rf"vfn?m(?:add|sub)\w+ps .*%{width}mm\d+$", code, re.MULTILINE)) for width in "yz"
    }
    assert min(multiply_adds.values()) > 100, multiply_adds


@pytest.mark.native
def test_unknown_instruction_set():
    code = """
from mmfast import _backend as b
try:
    b._C.build_info()
except ValueError as error:
    print(error)
    print(str(error) in b.format_info(b.info()))
"""
    message, shown = python(code, MMFAST_CPU_ISA="sse9").splitlines()
    assert message == "MMFAST_CPU_ISA must be 'baseline', 'avx2', 'avx512', 'avx512_bf16' or 'amx', got 'sse9'"
    assert shown == "True"


@pytest.mark.native
def test_simd_objects_keep_to_themselves(tmp_path):
    """The build's own check, on one file that is right and on three that are not."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which("cmake") is None or shutil.which("nm") is None:
        pytest.skip("needs a compiler, nm and cmake")
    good = (
        "namespace mmfast::mel::avx2 { namespace { inline int f(int x) { return x; } } int g(int x) { return f(x); } }"
    )
    inline = "template <class T> __attribute__((noinline)) T f(T x) { return x * x; }"
    for name, source, complaint in [
        ("good", good, ""),
        ("shared", inline + good.replace("return f(x)", "return ::f(x)"), "shared with other files"),
        ("data", good + "namespace mmfast { int counter; }", "shared with other files"),
        ("loader", good + "extern int h(); namespace { const int x = h(); }", "runs at load time"),
    ]:
        (tmp_path / f"{name}.cpp").write_text(source)
        compile_ = [compiler, "-std=c++20", "-O2", "-c", f"{name}.cpp", "-o", f"{name}.o"]
        subprocess.run(compile_, cwd=tmp_path, check=True, timeout=60)
        check = ["cmake", "-DNM=nm", "-DISA=avx2", f"-DOBJECTS={name}.o", "-P", ROOT / "cmake" / "check_isa.cmake"]
        done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode != 0) == bool(complaint), done.stderr
        assert complaint in done.stderr


# ---- What happens without it


def test_without_extension_the_reference_runs(pure):
    code = """
import torch
from mmfast import _backend
assert _backend._C is None
print(*_backend.choose("mel", torch.device("cpu")), sep="|")
try:
    _backend.choose("mel", torch.device("cpu"), "cpu")
except ImportError as error:
    print(error)
"""
    choice, refusal = python(code, pure).splitlines()
    assert choice.startswith("reference|no native extension: mmfast is installed without native kernels")
    assert "backend 'cpu' needs the native extension" in refusal
    assert "pip install --no-build-isolation" in refusal


def load_error(folder: Path) -> str:
    return python("from mmfast import _backend as b; assert b._C is None; print(b.LOAD_ERROR)", folder)


def test_extension_of_another_torch(pure):
    # One that cannot be loaded at all, as when symbols are missing, and one that loads.
    file = pure / "mmfast" / f"_C{SUFFIX}"
    file.write_bytes(b"\x7fELF\0mmfast._C built for torch 1.2.3;\0")
    assert f"built for torch 1.2.3, and this is torch {torch.__version__}" in load_error(pure)
    file.unlink()
    (pure / "mmfast" / "_C.py").write_text("torch_version = '1.2.3'\n")
    assert f"built for torch 1.2.3, and this is torch {torch.__version__}" in load_error(pure)


def test_extension_of_another_python(pure):
    (pure / "mmfast" / "_C.cpython-27-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")
    message = load_error(pure)
    assert "_C.cpython-27-x86_64-linux-gnu.so was built for another Python" in message
    assert SUFFIX in message


def test_broken_extension_tells_the_cause(pure):
    (pure / "mmfast" / f"_C{SUFFIX}").write_bytes(b"nothing")
    message = load_error(pure)
    assert f"_C{SUFFIX} did not load" in message
    assert "file too short" in message or "invalid ELF header" in message


@pytest.mark.native
def test_built_for_is_in_the_file():
    """What the error message for another torch is made of."""
    assert f"mmfast._C built for torch {_backend._C.torch_version};".encode() in Path(_backend._C.__file__).read_bytes()


# ---- Choice of a backend


@pytest.mark.parametrize("name", ["gpu", "REFERENCE"])
def test_unknown_backend(name, monkeypatch):
    with pytest.raises(ValueError, match=f"backend must be one of 'reference', .* got '{name}' from backend="):
        _backend.choose("mel", torch.device("cpu"), name)
    monkeypatch.setenv("MMFAST_BACKEND", name)
    with pytest.raises(ValueError, match=f"got '{name}' from MMFAST_BACKEND"):
        _backend.choose("mel", torch.device("cpu"))


def test_backend_of_another_device():
    with pytest.raises(ValueError, match=r"backend 'cuda' \(from backend=\) has no mel kernels for tensors on cpu"):
        _backend.choose("mel", torch.device("cpu"), "cuda")
    assert _backend.choose("mel", torch.device("meta")) == ("reference", "no native mel kernels for meta tensors")


def test_argument_wins_over_environment(monkeypatch):
    monkeypatch.setenv("MMFAST_BACKEND", "cuda")
    assert _backend.choose("mel", torch.device("cpu"), "reference") == ("reference", "asked for by backend=")
    monkeypatch.setenv("MMFAST_BACKEND", "reference")
    assert _backend.choose("mel", torch.device("cpu")) == ("reference", "asked for by MMFAST_BACKEND")


@pytest.mark.native
def test_native_is_the_default(monkeypatch):
    monkeypatch.delenv("MMFAST_BACKEND", raising=False)
    assert _backend.choose("mel", torch.device("cpu")) == ("cpu", "native kernels for cpu tensors")


@pytest.mark.parametrize("installed", [False, True])
def test_best_of_several_backends(installed, monkeypatch):
    monkeypatch.delenv("MMFAST_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "OPS", {"mel": {"cuda": ("triton",), "xpu": ("triton", "cpu")}})
    monkeypatch.setattr(_backend, "_C", object())
    monkeypatch.setattr(_backend, "_TRITON", installed)
    best, second = (("triton", "Triton kernels for xpu tensors"), ("cpu", "native kernels for xpu tensors"))
    assert _backend.choose("mel", torch.device("xpu")) == (best if installed else second)
    if installed:
        assert _backend.choose("mel", torch.device("cuda")) == ("triton", "Triton kernels for cuda tensors")
    else:
        assert _backend.choose("mel", torch.device("cuda")) == ("reference", "triton is not installed")
        with pytest.raises(ImportError, match="pip install triton"):
            _backend.choose("mel", torch.device("cuda"), "triton")
    # On the CPU there is only its interpreter, and only for who asks.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backend.choose("mel", torch.device("cpu"))[0] == "reference"
    if installed:
        assert _backend.choose("mel", torch.device("cpu"), "triton") == ("triton", "asked for by backend=")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="has no mel kernels for tensors on cpu"):
        _backend.choose("mel", torch.device("cpu"), "triton")


# ---- info


@pytest.mark.native
def test_info_text():
    info = _backend.info()
    text = _backend.format_info(info)
    build = info["build"]
    assert build["mmfast"] == mmfast.__version__
    assert build["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert build["cxx"] >= 202002
    for part in (mmfast.__version__, torch.__version__, _backend._C.__file__, build["compiler"], build["isa_used"]):
        assert part in text
    for op in _backend.OPS:
        assert re.search(rf"^  {op} +cpu +{info['ops'][op]['cpu']['backend']}: \S", text, re.MULTILINE)


def test_info_without_extension(pure):
    text = python("from mmfast import _backend as b; print(b.format_info(b.info()))", pure, MMFAST_BACKEND="cpu")
    assert "nothing that can be used: mmfast is installed without native kernels" in text
    assert re.search(r"mel +cpu +error: backend 'cpu' needs the native extension", text)
    assert "MMFAST_BACKEND=cpu" in text


# ---- Every slice has all its rooms


REFERENCES = {
    "mel": ("mel_reference",),
    "mmd": ("quadratic", "matmul", "sums", "pair", "permutations", "select"),
    "fusion": ("attention", "merge"),
}


def test_conformance():
    for op in _backend.OPS:
        package = ROOT / "mmfast" / op
        for file in ("__init__.py", "reference.py", *(["op.py"] if _backend.OPS[op] else [])):
            assert (package / file).is_file(), f"{op} has no {file}"
        assert op in mmfast.__all__, f"mmfast does not export {op}"
        module = getattr(mmfast, op)
        assert all(hasattr(module, name) for name in module.__all__)
        assert all(callable(getattr(module.reference, name)) for name in REFERENCES[op])
        if "cpu" in _backend.OPS[op]:
            for suffix in ("core.h", "cpu.cpp", "bind.cpp"):
                assert (ROOT / "csrc" / op / f"{op}_{suffix}").is_file(), f"{op} has no csrc/{op}/{op}_{suffix}"
    assert all(hasattr(mmfast, name) for name in mmfast.__all__)


def test_sources_are_listed():
    """CMakeLists.txt names every source there is."""
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]
    assert sources
    for source in sources:
        assert re.search(rf"^    {re.escape(str(source.relative_to(ROOT)))}$", listed, re.MULTILINE), source
    for test in (ROOT / "tests" / "native").glob("*.cpp"):
        # In the list of those for each instruction set, or with a target of its own.
        own = rf"add_executable\(\w+ tests/native/{test.name}\b"
        assert re.search(rf"^    {test.stem}$|{own}", listed, re.MULTILINE), test


@pytest.mark.parametrize("slice_name", [op for op, devices in _backend.OPS.items() if devices])
def test_cores_include_neither_torch_nor_cuda(slice_name):
    for path in (ROOT / "csrc" / slice_name).iterdir():
        forbidden = {"core.h": r"torch|ATen|c10|cuda", "tile.cpp": r"torch|ATen|c10|cuda", "cuda.cu": r"torch|ATen|c10"}
        pattern = forbidden.get(path.name.rsplit("_", 1)[-1])
        if pattern:
            assert not re.search(rf"#include\s*[<\"]({pattern})", path.read_text()), path


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: torch.nested.nested_tensor(list(t))])
def test_only_dense_tensors(make):
    """Sparse and nested ones are refused by name, but for attention's of the jagged layout."""
    x, heads = make(torch.randn(4, 600)), make(torch.randn(1, 2, 4, 8))
    dense = torch.randn(1, 2, 4, 8)
    with pytest.raises(TypeError, match="waveform must be a dense tensor"):
        mmfast.mel.extract(x, mmfast.mel.MelConfig())
    with pytest.raises(TypeError, match="x must be a dense tensor"):
        mmfast.mmd2(x, torch.randn(4, 600))
    with pytest.raises((TypeError, ValueError), match=r"key of|nested in the jagged layout"):
        mmfast.cross_attention(dense, [(heads, dense)])
