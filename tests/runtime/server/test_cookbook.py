"""The Python examples of SGLang's cookbook page (cookbook.md, Apache-2.0, its commit 652c0c5) run as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("cookbook.md").read_text(encoding="utf-8")
EXAMPLES = [code for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
            if "client.chat.completions.create" in code]


def test_all_examples_were_found():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("place", range(5))
def test_example(real, place, capsys):
    """Only base_url and the model's name change; the last example goes on from the one before."""
    code = EXAMPLES[place] if "OpenAI(" in EXAMPLES[place] else (
        EXAMPLES[place - 1].partition("# Define")[0] + EXAMPLES[place])
    assert "http://localhost:8000/v1" in code
    code = re.sub(r'model="[^"]*"', 'model="tiny"', code.replace("http://localhost:8000/v1", real.url + "/v1"))
    exec(compile(code, f"example {place}", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()
