"""Chat templates render as Hugging Face's own code renders them."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcn_compile
from qcn_compile.errors import ArtifactError, UsageError
from qcn_compile.runtime.chat import ChatTemplate
from qcn_compile.runtime.tokenizer import GenerationDefaults, Tokenizer

MESSAGES = [{"role": "system", "content": " be <brief> & 'kind' "}, {"role": "user", "content": "你好 \"x\"\n"},
            {"role": "assistant", "content": "",
             "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, None, "é"]}}}]},
            {"role": "tool", "content": "42"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "dö <it>", "parameters": {"type": "object"}}}]
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'tool' %}{% continue %}{% endif %}\n{{ m.role }}: "
    "{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}go{% endif %}",
    "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ messages[2].tool_calls[0].function.arguments | tojson }}",
    "{%- for m in messages -%}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}"
    "{% endif %}{%- endfor -%}{{ eos_token }}{{ bos_token is defined }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ strftime_now('%Y') }}{{ extra }}{% for k, v in tools[0].function | items %}{{ k }}{% endfor %}",
    "{% macro show(x) %}[{{ x }}]{% endmacro %}{% for m in messages if m.role != 'tool' %}"
    "{{ show(m.role) ~ '!' }}{% endfor %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_as_hugging_face(source, generation_prompt):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    want = theirs.render_jinja_template([MESSAGES], tools=TOOLS, chat_template=source, eos_token="</s>", extra="e",
                                        add_generation_prompt=generation_prompt)[0][0]
    template = ChatTemplate(source, {"eos_token": "</s>"})
    assert template.render(MESSAGES, TOOLS, generation_prompt, extra="e") == want


def test_the_bundled_template_as_hugging_face():
    path = Path(qcn_compile.__file__).parent / "assets" / "tiny-coder" / "chat_template.jinja"
    if not path.is_file():
        pytest.skip("no bundled model here")
    theirs, source = pytest.importorskip("transformers.utils.chat_template_utils"), path.read_text(encoding="utf-8")
    for messages, tools in [(MESSAGES, TOOLS), (MESSAGES[:2], None), (MESSAGES[1:2], TOOLS),
                            (MESSAGES + MESSAGES[3:], None)]:
        want = theirs.render_jinja_template([messages], tools=tools, chat_template=source,
                                            add_generation_prompt=True)[0][0]
        assert ChatTemplate(source, {}).render(messages, tools) == want


def test_refusals_are_usage_errors():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(UsageError, match="refuses these messages: roles must alternate"):
        template.render(MESSAGES)
    with pytest.raises(UsageError, match="does not parse"):
        ChatTemplate("{% if %}", {})
    with pytest.raises(UsageError, match="refuses"):
        ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", {}).render(MESSAGES)


def test_defaults_and_template_of_a_build(toy_build):
    tokenizer = Tokenizer(toy_build)
    assert tokenizer.defaults.sampling == {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
    assert len(tokenizer.defaults.eos_token_ids) == 2
    text = tokenizer.chat.render([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids & set(ids) and tokenizer.decode(ids) == "user\nhi\nassistant\n"


def test_defaults_of_odd_files(tmp_path):
    path = tmp_path / "generation_config.json"
    assert GenerationDefaults.read(path) == GenerationDefaults(frozenset(), {})
    path.write_text('{"eos_token_id": 7, "do_sample": false, "temperature": 0.5}')
    assert GenerationDefaults.read(path) == GenerationDefaults(frozenset({7}), {"temperature": 0.0})
    path.write_text("{")
    with pytest.raises(ArtifactError, match="is no JSON"):
        GenerationDefaults.read(path)


def test_a_build_without_template(toy_copy):
    (toy_copy / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match="no chat template"):
        _ = Tokenizer(toy_copy).chat
    (toy_copy / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer(toy_copy).chat.render([{"role": "user", "content": "x"}]) == "x"
