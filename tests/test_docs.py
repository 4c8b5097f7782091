"""Every code block of the README and the documentation runs, and every command in them exists."""

import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# "name = …  # (2, 3)": what the shape of this name is in the end.
SHAPE = re.compile(r"^(\w+)(?:, \w+)* = .*# (\([\d, ]*\))$", re.MULTILINE)


def blocks(language: str) -> list:
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, (found, text) in enumerate(BLOCK.findall(page.read_text()))
        if found == language
    ]


def test_there_are_blocks():
    assert len(blocks("python")) >= 20
    assert len(SHAPE.findall((ROOT / "docs" / "migration" / "torchaudio.md").read_text())) == 5


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks(text):
    torch.manual_seed(0)
    names: dict = {"__name__": "example"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(text, "example", "exec"), names)
    except ModuleNotFoundError as error:
        if error.name.startswith("mmfast"):
            raise
        pytest.skip(f"{error.name} is not installed")
    shapes = SHAPE.findall(text)
    assert shapes or "assert " in text, "a block should say what comes out"
    for name, shape in shapes:
        assert str(tuple(names[name].shape)) == shape, name


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_exist(text):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"^(?:[A-Z_]+=\S+ )*(\S+) (\S+)", text, re.MULTILINE)
    assert commands
    for program, first in commands:
        if program == "make":
            assert first in targets, f"make {first}"
        elif program == "mmfast":
            assert f'"{first}"' in (ROOT / "mmfast" / "cli.py").read_text(), f"mmfast {first}"
        elif program == "python" and first.endswith(".py"):
            assert (ROOT / first).is_file(), first
