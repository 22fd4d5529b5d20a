"""Conversations of every form, from files of every kind."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from puna.batches.conversations import read_conversations, to_conversation
from puna.batches.tables import Row, read_table
from puna.runtime.errors import InputError

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind."}
TOOL = {"name": "find", "description": "", "parameters": {}}
WRAPPED = [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize(
    ("values", "messages", "tools"),
    [
        ({"messages": ASKED, "tools": WRAPPED}, ASKED, WRAPPED),
        ({"messages": json.dumps(ASKED)}, ASKED, None),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ASKED, None),
        ({"conversations": ASKED, "system": "Be kind."}, [SYSTEM, *ASKED], None),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": '{"name": "find", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "found"},
                    {"from": "gpt", "value": "Hello"},
                ],
                "tools": json.dumps([TOOL]),
            },
            [
                ASKED[0],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "found"},
                ASKED[1],
            ],
            WRAPPED,
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind."}, [SYSTEM, *ASKED], None),
        (
            {"instruction": "Hi", "input": "there", "output": "Hello", "history": [["Hi", "Hello"]]},
            [*ASKED, {"role": "user", "content": "Hi\n\nthere"}, ASKED[1]],
            None,
        ),
        ({"prompt": "Hi", "completion": "Hello"}, ASKED, None),
        ({"prompt": "Hi", "response": "Hello"}, ASKED, None),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED, None),
    ],
)
def test_every_form(values: dict[str, Any], messages: list[Any], tools: Any) -> None:
    conversation = to_conversation(Row("here", values))
    assert conversation.messages == messages
    assert conversation.tools == tools


@pytest.mark.parametrize(
    ("values", "form", "message"),
    [
        ({"text": "x"}, "detect", "here is not a conversation: it has text"),
        ({"messages": 3}, "detect", "here is not of the form messages: messages is not a list"),
        ({"prompt": "x"}, "alpaca", "here is not of the form alpaca: there is no 'instruction'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "detect", "'robot' speaks, but the known speakers"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "detect", "here is not of the form sharegpt"),
        ({"messages": [{**ASKED[1], "weight": 0}]}, "detect", "here: a message has the weight 0"),
    ],
)
def test_rows_that_are_no_conversation(values: dict[str, Any], form: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_conversation(Row("here", values), form)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"a": 'x "y"', "b": "z, é"}, {"a": "line\nbreak", "b": "2"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {
        "t.jsonl": lines,
        "lines.json": lines,
        "t.json": json.dumps(rows, indent=1),
        "t.csv": '\ufeffa,b\n"x ""y""","z, é"\n"line\nbreak",2\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert [row.values for row in read_table(tmp_path / name)] == rows, name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert [row.values for row in read_table(tmp_path / f"{name}.gz")] == rows, name
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert [row.values for row in read_table(tmp_path / "t.parquet")] == rows
    assert len(list(read_table(tmp_path))) == 2 * (2 * len(files) + 1)
    (tmp_path / "plain.tsv").write_text('say "hi\t1\nb\t2\n')
    assert [row.values for row in read_table(tmp_path / "plain.tsv", ["text", "label"])] == [
        {"text": 'say "hi', "label": "1"},
        {"text": "b", "label": "2"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"a": 1}\n{"a": \n', "t.jsonl, line 2: not valid JSON"),
        ("t.jsonl", b'{"a": 1}\n3\n', "line 2: expected a JSON object"),
        ("t.jsonl", b'{"a": 1}\n\xff\xfe\n', "line 2: byte 0xff is not UTF-8"),
        ("t.json", b'[{"a": 1},\n3]', "element 2: expected a JSON object"),
        ("t.csv", b'a,b\n"x,y\n', "line 2"),
        ("t.csv", b"a,a\nx,y\n", "two columns of the header have the same name"),
        ("t.csv.gz", b"a,b\n", "is not gzipped"),
        ("t.docx", b"", "ends in .docx; tables end in"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_table(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alpaca_en_demo.json.gz", 999),
        ("alpaca_zh_demo.json", 1000),
        ("dolly_hhrlhf_small.jsonl.gz", 1000),
        ("glaive_toolcall_en_demo.json.gz", 300),
        ("rasbt_instruction_data.json", 1100),
    ],
)
def test_published_conversations(real_data: Path, name: str, count: int) -> None:
    conversations = list(read_conversations(real_data / "instruct" / name))
    assert len(conversations) == count
    assert all(any(message["role"] == "assistant" for message in each.messages) for each in conversations)
