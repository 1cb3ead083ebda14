"""Batches: every line answered once, resumed after an end of any kind, wrong files refused before loading."""

from __future__ import annotations

import json

import pytest

from qcn_compile.runtime.cli import main


def row(name, url="/v1/completions", **body):
    return {"custom_id": name, "method": "POST", "url": url,
            "body": {"model": "any", "max_tokens": 5, "temperature": 0, **body}}


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ROWS = [row("a", prompt="def f"), row("b", "/v1/chat/completions", **CHAT), row("c", prompt="x", temperature=-1),
        row("d", prompt="y", stream=True), *(row(f"r{i}", prompt="z" * i) for i in range(1, 30))]


@pytest.fixture
def batch(tmp_path, toy_build):
    def run(rows=ROWS, *flags):
        path = tmp_path / "in.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return main([str(toy_build), "--batch", str(path), "--threads", "1", *flags]), tmp_path / "in.out.jsonl"
    return run


def answers(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({r["custom_id"] for r in rows}) == len(rows)
    return {r["custom_id"]: r["response"] for r in rows}


def test_every_line_gets_its_answer(batch, capsys):
    code, path = batch()
    got = answers(path)
    assert code == 0 and got.keys() == {r["custom_id"] for r in ROWS}
    assert {name for name, r in got.items() if r["status_code"] != 200} == {"c"}
    assert got["c"]["status_code"] == 400 and "temperature" in got["c"]["body"]["error"]["message"]
    assert got["a"]["body"]["object"] == "text_completion" and got["d"]["body"]["usage"]["completion_tokens"] <= 5
    assert got["b"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert "33 answers, 1 of them errors" in capsys.readouterr().err


def test_a_batch_goes_on_where_it_ended(batch, capsys):
    _, path = batch()
    whole = answers(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:9]) + lines[9][:40])  # killed while writing
    assert batch()[0] == 0

    def contents(rows):
        return {name: (r["status_code"], r["body"].get("choices")) for name, r in rows.items() if name not in "bc"}

    assert contents(answers(path)) == contents(whole) and answers(path).keys() == whole.keys()
    assert path.read_bytes().startswith(b"".join(lines[:9]))
    assert "(9 from before)" in capsys.readouterr().err
    assert batch()[0] == 0 and len(path.read_bytes().splitlines()) == len(ROWS)


@pytest.mark.parametrize(("rows", "words"), [
    ([], "no requests"), (["{"], "line 1"), (["[]"], "JSON object"),
    ([row("a"), row("a")], "line 2: the custom_id 'a'"),
    ([row("a", "/v1/embeddings")], "url one of"), ([{**row("a"), "method": "GET"}], "method must be POST"),
    ([{**row("a"), "body": 3}], "body must be"), ([{**row("a"), "custom_id": ""}], "custom_id must be"),
])
def test_wrong_files_are_refused(batch, capsys, rows, words):
    code, path = batch(rows)
    assert code == 2 and words in capsys.readouterr().err and not path.exists()


def test_other_files_are_not_overwritten(batch, tmp_path, capsys):
    other = tmp_path / "other"
    for text in ("precious\n", "precious", '{"a": 1}\n'):
        other.write_text(text)
        assert batch(ROWS, "--batch-output", str(other))[0] == 2
        assert other.read_text() == text and "no answers of a batch" in capsys.readouterr().err
    assert batch(ROWS, "--batch-output", str(tmp_path / "no" / "x"))[0] == 2
