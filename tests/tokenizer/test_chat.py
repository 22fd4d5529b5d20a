"""Chat rendering: text and ids against transformers and published cases, masks by hand, safety by property."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import RenderedChat, preview, render_chat
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.train import train_byte_level_bpe

Messages = list[dict[str, Any]]

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello, who are you?"}
ASSISTANT = {"role": "assistant", "content": "A llama."}
CONVERSATION: Messages = [
    SYSTEM,
    USER,
    ASSISTANT,
    {"role": "user", "content": "再见 🦙"},
    {"role": "assistant", "content": "Bye!"},
]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Puno"}}}],
}
TOOL_CONVERSATION: Messages = [
    {"role": "user", "content": "Weather?"},
    CALL,
    {"role": "tool", "name": "weather", "content": "cold"},
    {"role": "assistant", "content": "It is cold."},
]
TOOLS: Messages = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather now",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Which city"}},
                "required": ["city"],
            },
        },
    }
]


@pytest.fixture(scope="session")
def chatml(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_byte_level_bpe(corpus, 500, tmp_path_factory.mktemp("chatml"), chat_template="chatml")


@pytest.fixture(params=["llama3", "chatml", "llama2 on sentencepiece", "llama2 on metaspace", "llama2 on bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer with each built-in template."""
    fixture = {
        "llama3": "byte_level",
        "chatml": "chatml",
        "llama2 on sentencepiece": "sentencepiece",
        "llama2 on metaspace": "metaspace",
        "llama2 on bytes": "ranks",
    }[request.param]
    tokenizer: Tokenizer = request.getfixturevalue(fixture)
    if request.param == "llama2 on bytes":
        request.getfixturevalue("monkeypatch").setattr(tokenizer, "chat_template", builtin_template("llama2"))
    return tokenizer


def learned(tokenizer: Tokenizer, rendered: RenderedChat) -> list[str]:
    """Text of each run of supervised tokens; ids are decoded as a continuation, so blanks stay."""
    runs: list[bytes] = []
    before = 0
    for token_id, supervised in zip(rendered.ids, rendered.mask, strict=True):
        if supervised:
            if not before:
                runs.append(b"")
            runs[-1] += tokenizer.token_bytes(token_id)
        before = supervised
    return [run.decode() for run in runs]


def oracle_of(tokenizer: Tokenizer, directory: Path) -> PreTrainedTokenizerBase:
    tokenizer.save(directory)
    oracle: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return oracle


def assert_equal_to_transformers(
    tokenizer: Tokenizer, oracle: PreTrainedTokenizerBase, messages: Messages, template: str, **options: Any
) -> None:
    rendered = render_chat(tokenizer, messages, template=template, **options)
    expected = {"conversation": messages, "chat_template": template, **options}
    assert rendered.text == oracle.apply_chat_template(tokenize=False, **expected)
    assert rendered.ids == oracle.apply_chat_template(tokenize=True, return_dict=False, **expected)
    assert len(rendered.mask) == len(rendered.ids)


# --- Against other implementations


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_built_in_templates_in_transformers(
    tokenizer: Tokenizer, count: int, add_generation_prompt: bool, tmp_path: Path
) -> None:
    assert tokenizer.chat_template is not None
    assert_equal_to_transformers(
        tokenizer,
        oracle_of(tokenizer, tmp_path),
        CONVERSATION[:count],
        tokenizer.chat_template,
        add_generation_prompt=add_generation_prompt,
    )


PUBLISHED_TEMPLATES = {
    "meta-llama-Llama-3.1-8B-Instruct": "byte_level",
    "meta-llama-Llama-3.2-3B-Instruct": "byte_level",
    "meta-llama-Llama-3.3-70B-Instruct": "byte_level",
    "Qwen-Qwen2.5-7B-Instruct": "chatml",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "chatml",
}


@pytest.mark.parametrize(("model", "fixture"), PUBLISHED_TEMPLATES.items())
def test_published_templates(
    real_data: Path, model: str, fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(fixture)
    oracle = oracle_of(tokenizer, tmp_path)
    file = json.loads((real_data / "chat_templates/jinja_templates.json").read_text())
    template = file.get("templates", file)[model]
    options: dict[str, Any] = {"date_string": "1 Nov 2026"} if "Llama-3." in model and "meta" in model else {}
    with_tools = {**options, "tools": TOOLS}
    for prompt in (False, True):
        if "Hermes" not in model:  # its template does not work without tools
            assert_equal_to_transformers(
                tokenizer, oracle, CONVERSATION, template, add_generation_prompt=prompt, **options
            )
        assert_equal_to_transformers(
            tokenizer, oracle, TOOL_CONVERSATION, template, add_generation_prompt=prompt, **with_tools
        )
    runs = learned(tokenizer, render_chat(tokenizer, TOOL_CONVERSATION, template=template, **with_tools))
    stop = "<|eot_id|>" if fixture == "byte_level" else "<|im_end|>"
    assert len(runs) == 2
    assert '"weather"' in runs[0]
    assert runs[0].endswith(stop)
    assert runs[1].removeprefix("\n") == f"It is cold.{stop}"
    if "Llama-3.1" in model and "meta" in model:
        runs = learned(
            tokenizer,
            render_chat(tokenizer, TOOL_CONVERSATION, template=template, builtin_tools=["weather"], **options),
        )
        assert runs == ['<|python_tag|>weather.call(city="Puno")<|eom_id|>', "It is cold.<|eot_id|>"]


OLLAMA_LLAMA2 = """
{%- set ns = namespace(system='<<SYS>><</SYS>>\n\n') -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' -%}
{%- elif m.role == 'user' -%}{{- '[INST] ' + ns.system + m.content + ' [/INST]' -}}
{%- set ns.system = '<<SYS>><</SYS>>\n\n' -%}
{%- else -%}{{- ' ' + m.content + '</s><s>' -}}{%- endif -%}{%- endfor -%}"""

ALPACA = """
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content + '\n\n' -}}
{%- elif m.role == 'user' -%}{{- '### Instruction:\n' + m.content + '\n\n' -}}
{%- else -%}{{- '### Response:\n' + m.content + '\n\n' -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}"""


def test_ollama_cases(real_data: Path, byte_level: Tokenizer, chatml: Tokenizer, sentencepiece: Tokenizer) -> None:
    """ollama's llama2-chat prints an empty <<SYS>> block and no first BOS; Meta's code, which the built-in template
    follows, does not. Its cases show that any template works; the built-in's are below."""
    cases = json.loads((real_data / "chat_templates/ollama_expected.json").read_text())["cases"]
    how = {
        "llama2-chat": (sentencepiece, OLLAMA_LLAMA2, ""),
        "llama3-instruct": (byte_level, builtin_template("llama3"), "<|begin_of_text|>"),
        "chatml": (chatml, builtin_template("chatml"), ""),
        "alpaca": (byte_level, ALPACA, ""),
    }
    assert len(cases) == 12
    for case in cases:
        tokenizer, template, bos = how[case["template"]]
        rendered = render_chat(tokenizer, case["messages"], template=template, add_generation_prompt=True)
        assert rendered.text == bos + case["expected"]
        assert tokenizer.decode(rendered.ids) == rendered.text


def test_llama2_as_meta_encodes_dialogs(sentencepiece: Tokenizer) -> None:
    """llama/generation.py, chat_completion: each pair encoded on its own, with BOS and EOS."""
    user, assistant = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello, who are you? [/INST]", " A llama. "
    last = "[INST] 再见 🦙 [/INST]"
    encode = sentencepiece.encode
    expected = [1, *encode(user + assistant), 2, 1, *encode(last)]
    rendered = render_chat(sentencepiece, CONVERSATION[:4], add_generation_prompt=True)
    assert rendered.text == f"<s>{user}{assistant}</s><s>{last}"
    assert rendered.ids == expected


@pytest.mark.parametrize(
    ("messages", "index", "reason"),
    [
        ([SYSTEM], 0, "needs a user message"),
        ([USER, USER], 1, "in turns"),
        ([SYSTEM, ASSISTANT], 1, "in turns"),
        ([USER, ASSISTANT, SYSTEM], 2, "in turns"),
        ([{"role": "user", "content": "a [INST] b"}], 0, r"\[INST\] is not allowed"),
        ([USER, {"role": "tool", "content": "x"}], 1, "in turns"),
    ],
)
def test_llama2_refusals(sentencepiece: Tokenizer, messages: Messages, index: int, reason: str) -> None:
    with pytest.raises(InputError, match=f"(?s)message {index} .*{reason}"):
        render_chat(sentencepiece, messages)


def test_llama3_tools_as_in_meta_s_template(real_data: Path, byte_level: Tokenizer) -> None:
    """The built-in differs from Llama 3.1's published template by the dated system header alone."""
    file = json.loads((real_data / "chat_templates/jinja_templates.json").read_text())
    published = file.get("templates", file)["meta-llama-Llama-3.1-8B-Instruct"]
    options: dict[str, Any] = {"tools": TOOLS, "add_generation_prompt": True}
    messages: Messages = [{"role": "user", "content": "Weather?"}, CALL]
    ours = render_chat(byte_level, messages, **options).text
    theirs = render_chat(byte_level, messages, template=published, **options).text
    user = "<|start_header_id|>user<|end_header_id|>"
    assert ours[ours.index(user) :] == theirs[theirs.index(user) :]


def test_chatml_tools_as_in_qwen_s_template(real_data: Path, chatml: Tokenizer) -> None:
    file = json.loads((real_data / "chat_templates/jinja_templates.json").read_text())
    published = file.get("templates", file)["Qwen-Qwen2.5-7B-Instruct"]
    two_results = [*TOOL_CONVERSATION[:3], {"role": "tool", "content": "windy"}, *TOOL_CONVERSATION[3:]]
    for messages in (TOOL_CONVERSATION, two_results):
        options: dict[str, Any] = {"tools": TOOLS, "add_generation_prompt": True}
        with_system = [SYSTEM, *messages]
        ours = render_chat(chatml, with_system, **options).text
        assert ours == render_chat(chatml, with_system, template=published, **options).text
        assert "You are Qwen" not in render_chat(chatml, messages, **options).text


GENERATION = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' -%}
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


@pytest.mark.parametrize("ending", ["<|im_end|>", "END"])
def test_generation_blocks_mask_as_transformers_does(chatml: Tokenizer, ending: str, tmp_path: Path) -> None:
    oracle = oracle_of(chatml, tmp_path)
    template = GENERATION.replace("<|im_end|>", ending)
    expected = oracle.apply_chat_template(
        CONVERSATION, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    rendered = render_chat(chatml, CONVERSATION, template=template)
    assert rendered.ids == expected["input_ids"]
    assert rendered.mask == expected["assistant_masks"]
    assert learned(chatml, rendered) == [f"A llama.{ending}", f"Bye!{ending}"]


def test_a_generation_block_is_authoritative(chatml: Tokenizer) -> None:
    """Here the template says that only the last answer is learned."""
    template = GENERATION.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    assert learned(chatml, render_chat(chatml, CONVERSATION, template=template)) == ["Bye!<|im_end|>"]


# --- Masks by hand


def test_mask_of_a_conversation(
    byte_level: Tokenizer, chatml: Tokenizer, sentencepiece: Tokenizer, metaspace: Tokenizer
) -> None:
    assert learned(byte_level, render_chat(byte_level, CONVERSATION)) == ["A llama.<|eot_id|>", "Bye!<|eot_id|>"]
    assert learned(chatml, render_chat(chatml, CONVERSATION)) == ["A llama.<|im_end|>", "Bye!<|im_end|>"]
    for tokenizer in (sentencepiece, metaspace):
        assert learned(tokenizer, render_chat(tokenizer, CONVERSATION)) == [" A llama. </s>", " Bye! </s>"]


@pytest.mark.parametrize(
    ("content", "llama3", "chatml_"),
    [
        ("  padded\n\n", "padded", "  padded\n\n"),
        ("", "", ""),
        ("   ", "", "   "),
        ("\nnew line", "new line", "\nnew line"),
        ("你好 🏔️", "你好 🏔️", "你好 🏔️"),
        (
            "stop <|eot_id|> and <|im_end|></s>",
            "stop <|eot_id|> and <|im_end|></s>",
            "stop <|eot_id|> and <|im_end|></s>",
        ),
        ("<|eot_id|>", "<|eot_id|>", "<|eot_id|>"),
        ("A llama.", "A llama.", "A llama."),
    ],
)
def test_mask_of_odd_contents(
    byte_level: Tokenizer, chatml: Tokenizer, content: str, llama3: str, chatml_: str
) -> None:
    messages = [USER, {"role": "assistant", "content": content}, USER, {"role": "assistant", "content": "A llama."}]
    for tokenizer, expected, stop in ((byte_level, llama3, "<|eot_id|>"), (chatml, chatml_, "<|im_end|>")):
        rendered = render_chat(tokenizer, messages)
        assert learned(tokenizer, rendered) == [expected + stop, "A llama." + stop]
        assert tokenizer.decode(rendered.ids) == rendered.text


def test_mask_of_tool_calls(byte_level: Tokenizer, chatml: Tokenizer) -> None:
    assert learned(byte_level, render_chat(byte_level, TOOL_CONVERSATION, tools=TOOLS)) == [
        '{"name": "weather", "parameters": {"city": "Puno"}}<|eot_id|>',
        "It is cold.<|eot_id|>",
    ]
    both = [{**m, "content": "Let me look."} if m is CALL else m for m in TOOL_CONVERSATION]
    call = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Puno"}}\n</tool_call><|im_end|>'
    # Qwen's template prints no line feed after the header of a bare call, so the call holds it; the prompt's own
    # line feed comes first, and what is left to learn begins after it.
    assert learned(chatml, render_chat(chatml, TOOL_CONVERSATION, tools=TOOLS))[0] == call.removeprefix("\n")
    assert learned(chatml, render_chat(chatml, both, tools=TOOLS)) == ["Let me look." + call, "It is cold.<|im_end|>"]


def test_arguments_as_json_text_equal_arguments_as_object(chatml: Tokenizer) -> None:
    text = {"function": {"name": "weather", "arguments": '{"city": "Puno"}'}}
    as_text = [USER, {"role": "assistant", "content": None, "tool_calls": [text]}]
    assert render_chat(chatml, as_text) == render_chat(chatml, [USER, CALL])


def test_mask_without_a_stop_token(byte_level: Tokenizer) -> None:
    """Alpaca's format ends no answer; nothing of the next question may be learned."""
    rendered = render_chat(byte_level, CONVERSATION, template=ALPACA)
    assert learned(byte_level, rendered) == ["A llama.", "Bye!"]
    final = ALPACA + "{{- eos_token if not add_generation_prompt -}}"
    rendered = render_chat(byte_level, [*CONVERSATION, USER], template=final)
    assert learned(byte_level, rendered) == ["A llama.", "Bye!"]
    assert learned(byte_level, render_chat(byte_level, CONVERSATION, template=final)) == [
        "A llama.",
        "Bye!\n\n<|end_of_text|>",
    ]


def test_template_that_rewrites_the_past(chatml: Tokenizer) -> None:
    """Reasoning models drop earlier reasoning and open the prompt with a thought: the content is found by itself."""
    template = """{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' -%}{{- m.content.split('</think>')[-1].lstrip('\n') -}}
{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"""
    plain = render_chat(chatml, CONVERSATION, template=template)
    assert learned(chatml, plain) == ["A llama.<|im_end|>", "Bye!<|im_end|>"]
    messages = [USER, {"role": "assistant", "content": "<think>hm</think>\n\nA llama."}]
    rendered = render_chat(chatml, messages, template=template)
    assert "hm" not in rendered.text
    assert learned(chatml, rendered) in ([], ["A llama.<|im_end|>"])


def test_dropped_messages_are_not_learned(chatml: Tokenizer) -> None:
    template = "{%- for m in messages if m.role != 'assistant' -%}{{- m.content + '<|im_end|>' -}}{%- endfor -%}"
    assert sum(render_chat(chatml, [USER, ASSISTANT, USER], template=template).mask) == 0


# --- Training and serving agree


CONTENT = st.text(st.sampled_from("ab \n<|>你🦙é1."), max_size=12)


@settings(max_examples=80, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6), system=st.booleans())
def test_prompts_are_prefixes_of_training_ids(
    byte_level: Tokenizer,
    chatml: Tokenizer,
    sentencepiece: Tokenizer,
    metaspace: Tokenizer,
    contents: list[str],
    system: bool,
) -> None:
    roles = ["user", "assistant"] * 3
    messages: Messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    messages = [SYSTEM] * system + messages
    vicuna = (
        "{%- for m in messages -%}{{- m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
    )
    for tokenizer in (byte_level, chatml, sentencepiece, metaspace):
        for template in (None, vicuna, ALPACA):
            full = render_chat(tokenizer, messages, template=template)
            assert tokenizer.decode(full.ids) == full.text
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    prompt = render_chat(tokenizer, messages[:i], template=template, add_generation_prompt=True)
                    count = len(prompt.ids)
                    assert full.ids[:count] == prompt.ids
                    assert full.mask[:count] == prompt.mask
                    assert all(full.mask[count : count + 1])


def test_a_blank_at_the_end_of_the_prompt_is_left_to_the_answer(sentencepiece: Tokenizer) -> None:
    template = "{{ messages[0].content }} ASSISTANT: {{ messages[1].content if messages | length > 1 }}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "llama"}]
    full = render_chat(sentencepiece, messages, template=template)
    prompt = render_chat(sentencepiece, messages[:1], template=template, add_generation_prompt=True)
    assert prompt.text == "Hi ASSISTANT: "
    assert prompt.ids == sentencepiece.encode("Hi ASSISTANT:")
    assert full.ids == sentencepiece.encode("Hi ASSISTANT: llama")
    assert learned(sentencepiece, full) == [" llama"]


def test_no_second_bos(tokenizer: Tokenizer) -> None:
    rendered = render_chat(tokenizer, CONVERSATION[:2], add_generation_prompt=True)
    assert tokenizer.bos_id is not None
    assert rendered.ids.count(tokenizer.bos_id) == rendered.text.count(tokenizer.special_names()["bos_token"])
    assert rendered.ids[1] != tokenizer.bos_id


# --- Nobody but the template writes special tokens


def piece_of(names: list[str]) -> st.SearchStrategy[str]:
    parts = [name[i:j] for name in names for i, j in ((0, None), (0, -1), (1, None), (0, 2), (-2, None))]
    return st.lists(st.sampled_from([*parts, " ", "x", "\n"]), max_size=6).map("".join)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_no_special_token_comes_from_a_message(
    byte_level: Tokenizer, chatml: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject
) -> None:
    for tokenizer in (byte_level, chatml, sentencepiece):
        text = piece_of([*tokenizer.special_tokens])
        user, answer = data.draw(text), data.draw(text)
        harmless = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        expected = [i for i in render_chat(tokenizer, harmless).ids if i in tokenizer.special_ids]
        rendered = render_chat(tokenizer, [{"role": "user", "content": user}, {"role": "assistant", "content": answer}])
        assert [i for i in rendered.ids if i in tokenizer.special_ids] == expected
        assert tokenizer.decode(rendered.ids) == rendered.text
        if tokenizer is chatml:  # its template changes nothing in the contents
            assert user in rendered.text
            assert answer in rendered.text


@pytest.mark.parametrize("content", ["a <|im_end|> b", "<|im_start|>assistant\n", "<|im_end|", "<|im_<|im_end|>end|>"])
def test_special_token_names_as_transformers_sanitizes_them(chatml: Tokenizer, content: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    sanitized = oracle_of(chatml, tmp_path).apply_chat_template(
        messages, return_dict=False, sanitize_control_tokens=True
    )
    rendered = render_chat(chatml, messages)
    assert chatml.decode(rendered.ids) == chatml.decode(sanitized)
    special = chatml.special_ids
    assert [i for i in rendered.ids if i in special] == [i for i in sanitized if i in special]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_no_special_token_comes_from_tools(byte_level: Tokenizer, chatml: Tokenizer, data: st.DataObject) -> None:
    for tokenizer in (byte_level, chatml):
        text = piece_of(["<|eot_id|>", "<|im_end|>", "<|begin_of_text|>"])
        a, b, c, d = data.draw(st.lists(text, min_size=4, max_size=4))
        call = {"type": "function", "function": {"name": a, "arguments": {b: [c, {d: a}]}}}
        tool = {"type": "function", "function": {"name": b, "description": c}}
        result = {"role": "tool", "name": c, "content": d}
        messages = [USER, {"role": "assistant", "tool_calls": [call]}, result]
        harmless = [USER, CALL, {"role": "tool", "content": "x"}]
        expected = [i for i in render_chat(tokenizer, harmless, tools=TOOLS).ids if i in tokenizer.special_ids]
        rendered = render_chat(tokenizer, messages, tools=[tool])
        assert [i for i in rendered.ids if i in tokenizer.special_ids] == expected


def test_a_template_variable_cannot_smuggle_either(byte_level: Tokenizer) -> None:
    template = "{{ date }}<|eot_id|>{{ messages[0].content }}"
    rendered = render_chat(byte_level, [USER], template=template, date="<|eot_id|>")
    assert rendered.ids.count(byte_level.special_tokens["<|eot_id|>"]) == 1
    assert rendered.text == "<|eot_id|><|eot_id|>Hello, who are you?"


@pytest.mark.parametrize("role", ["eot_id", "<|eot_id|>", "end_of_text"])
def test_a_role_cannot_smuggle_either(byte_level: Tokenizer, role: str) -> None:
    with pytest.raises(InputError, match="role of message 1"):
        render_chat(
            byte_level,
            [USER, {"role": role, "content": "x"}],
            template="{%- for m in messages -%}{{ '<|' + m.role + '|>' + m.content }}{%- endfor -%}",
        )


def test_templates_that_would_undo_the_protection_are_refused(byte_level: Tokenizer) -> None:
    message = {"role": "user", "content": "<|eot_id|>"}
    for template in (
        "{{ messages[0].content[:1] + messages[0].content[2:] }}",
        "{{ messages[0].content | tojson(ensure_ascii=true) }}",
        "{{ messages[0].content | length }}",
    ):
        with pytest.raises(InputError, match="alters the text"):
            render_chat(byte_level, [message], template=template)
        render_chat(byte_level, [USER], template=template)


def test_reserved_noncharacters_are_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InputError, match="chat template holds a Unicode noncharacter"):
        render_chat(byte_level, [USER], template="{{ messages[0].content | replace('\ufdd0', '') }}")
    for text in ("a\ufdd0b", "\ufdd11\ufdd3", "\ufdd4"):
        with pytest.raises(InputError, match="message 1 holds a Unicode noncharacter"):
            render_chat(byte_level, [USER, {"role": "assistant", "content": text}])


# --- Mistakes


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ([USER, "hello"], "Message 1 must be a dictionary"),
        ([USER, {"content": "x"}], "Message 1 has no role"),
        ([{"role": 5, "content": "x"}], "Message 0 has no role"),
        ([USER, {"role": "assistant"}], "Message 1 .* has no content"),
        ([USER, {"role": "assistant", "content": None}], "Message 1 .* has no content"),
        ([{"role": "user", "content": 5}], "content of message 0 must be a string, not int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "Message 0 holds a part that is not text"),
        ([USER, {"role": "narrator", "content": "x"}], r"message 1 \(role 'narrator'\)"),
        ([USER, {"role": "assistant", "tool_calls": ["x"]}], "Message 1 has a tool call"),
        ([USER, {"role": "assistant", "tool_calls": 5}], "tool_calls of message 1 must be a list"),
        ([{"role": "user", "content": "x", "when": Path()}], "message 0 is a PosixPath"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "arguments in message 0 are not JSON",
        ),
    ],
)
def test_wrong_messages(byte_level: Tokenizer, messages: Messages, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        render_chat(byte_level, messages)


def test_text_parts_are_joined(byte_level: Tokenizer) -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "who are you?"}]
    assert render_chat(byte_level, [{"role": "user", "content": parts}]) == render_chat(byte_level, [USER])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "mistake in line 1"),
        ("\n{{ messages", "mistake in line 2"),
        ("{{ messages[0].missing.deeper }}", "message 0"),
        ("{{ 1 // 0 }}", "fails at message 0"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails at message 0"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
            "printed more",
        ),
        ("{{ 'x' * 10 ** 12 }}", "too large"),
        ("{{ 9 ** 9 ** 9 }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ raise_exception('no thanks') }}", "no thanks"),
    ],
)
def test_wrong_templates(byte_level: Tokenizer, template: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        render_chat(byte_level, [USER], template=template)


def test_nothing_given_is_ignored(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    with pytest.raises(InputError, match="does not read tools"):
        render_chat(sentencepiece, [USER], tools=TOOLS)
    with pytest.raises(InputError, match="does not read date_string"):
        render_chat(byte_level, [USER], date_string="today")
    assert render_chat(sentencepiece, [USER], tools=[]) == render_chat(sentencepiece, [USER])


def test_no_template(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "chat_template", None)
    with pytest.raises(InputError, match="has no chat template"):
        render_chat(byte_level, [USER])
    with pytest.raises(InputError, match="no built-in chat template 'llama4'"):
        builtin_template("llama4")  # type: ignore[arg-type]


def test_jinja_as_in_transformers(byte_level: Tokenizer, tmp_path: Path) -> None:
    template = """{% for m in messages %}
  {% if loop.index0 == 2 %}{% break %}{% endif %}
  {{ m | tojson }} {{ [1, "<é>"] | tojson(indent=2) }}
{% endfor %}{{ strftime_now("%Y")[:2] }} {{ bos_token }} {{ eos_token }} {{ missing }}"""
    assert_equal_to_transformers(byte_level, oracle_of(byte_level, tmp_path), CONVERSATION, template)


# --- Preview


def test_preview(tokenizer: Tokenizer) -> None:
    rendered = render_chat(tokenizer, CONVERSATION)
    text = preview(rendered, tokenizer)
    assert text.plain == rendered.text
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert "Bye!" in green
    assert "who" not in green
    with_ids = preview(rendered, tokenizer, show_ids=True).plain
    assert all(f"[{token_id}]" in with_ids for token_id in rendered.ids)
