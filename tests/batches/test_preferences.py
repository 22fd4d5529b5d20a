"""Preferences in every form, what is refused, and rows of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.packing import IGNORE, PADDING
from puna.batches.preference_rows import PreferenceRows, write_preference_shards
from puna.batches.preferences import BAD, GOOD, MISMATCHED, Preference, read_preferences, to_preference, with_mismatched
from puna.batches.shards import TokenShards
from puna.batches.tables import Row
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl
from puna.tokenizer.chat import render_chat
from puna.tokenizer.load import load_tokenizer

QUESTION = {"role": "user", "content": "Where?"}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


PAIR = ([QUESTION], (said("Lima"), said("no idea")), (0, 1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "Where?", "chosen": "Lima", "rejected": " no idea"}, PAIR),
        ({"prompt": [QUESTION], "chosen": said("Lima"), "rejected": said("no idea")[0]}, PAIR),
        ({"instruction": "Where?", "input": "", "chosen": "Lima", "rejected": "no idea", "output": "x"}, PAIR),
        ({"question": "Where?", "response_j": "Lima", "response_k": "no idea"}, PAIR),
        ({"chosen": [QUESTION, *said("Lima")], "rejected": [QUESTION, *said("no idea")]}, PAIR),
        (
            {
                "conversations": [{"from": "human", "value": "Where?"}],
                "chosen": {"from": "gpt", "value": "Lima"},
                "rejected": {"from": "gpt", "value": "no idea"},
            },
            PAIR,
        ),
        (
            {
                "chosen": "\n\nHuman: Where?\n\nAssistant: Lima",
                "rejected": "\n\nHuman: Where?\n\nAssistant: no idea",
            },
            PAIR,
        ),
        (
            {"prompt": "Where?", "edited": "Lima!", "chosen": "Lima", "rejected": "no idea"},
            ([QUESTION], (said("Lima!"), said("Lima"), said("no idea")), (0, 1, 2)),
        ),
        (
            {"prompt": "Where?", "answers": ["a", "b", "c"], "system": "Be kind."},
            ([{"role": "system", "content": "Be kind."}, QUESTION], (said("a"), said("b"), said("c")), (0, 1, 2)),
        ),
        ({"prompt": "Where?", "completion": "Lima", "label": True}, ([QUESTION], (said("Lima"),), (GOOD,))),
        ({"messages": [QUESTION, *said("Lima")], "label": "false"}, ([QUESTION], (said("Lima"),), (BAD,))),
    ],
)
def test_forms(values: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = to_preference(Row("here", values))
    assert (found.prompt, found.answers, found.ranks) == expected


def test_a_transcript_of_several_turns() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where?\n\nAssistant:"
    found = to_preference(Row("here", {"chosen": f"{start} Lima", "rejected": f"{start} no idea"}))
    assert found.prompt == [{"role": "user", "content": "Hi"}, *said("Hello!"), QUESTION]
    assert found.answers == (said("Lima"), said("no idea"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chosen": "Lima"}, "needed are a prompt"),
        ({"prompt": "Where?", "chosen": "Lima", "rejected": ""}, "an answer is empty"),
        ({"prompt": "Where?", "chosen": "Lima", "rejected": "Lima "}, "two answers are the same"),
        ({"prompt": "Where?", "answers": ["a"]}, "fewer than two"),
        ({"prompt": "Where?", "answers": ["a", "b"], "strength": "lots"}, "strength is 'lots'"),
        ({"prompt": "Where?", "completion": "Lima", "label": "maybe"}, "label is 'maybe'"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "does not end with something to answer"),
        ({"chosen": "Hello", "rejected": "x"}, "does not begin with Human"),
        (
            {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "the same side speaks twice",
        ),
        ({"prompt": "Where?", "chosen": [QUESTION], "rejected": "b"}, "an answer is not the assistant's"),
    ],
)
def test_what_is_no_preference_is_named_with_its_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"file.jsonl, line 3.*{message}"):
        to_preference(Row("file.jsonl, line 3", values))


def test_real_files(real_data: Path) -> None:
    for name, fewest in [
        ("hh_rlhf_harmless_base.jsonl.gz", 1300),
        ("dpo_en_demo.json.gz", 290),
        ("kto_en_demo.json.gz", 290),
        ("rasbt_instruction_preference.json", 1090),
        ("stack_exchange_paired_tiny.json", 25),
    ]:
        found = list(read_preferences(real_data / "preference" / name))
        assert sum(isinstance(each, Preference) for each in found) >= fewest, name
        assert all(name in str(each) for each in found if isinstance(each, InputError)), name


def preference(number: int, answers: int, length: int = 1) -> Preference:
    texts = tuple(said(f"{'llama ' * length}{number} {n}") for n in range(answers))
    return Preference(f"line {number}", [{"role": "user", "content": f"Where {number}?"}], texts, tuple(range(answers)))


def write(base_model: Path, folder: Path, preferences: Any, row_length: int = 128, **options: bool) -> PreferenceRows:
    tokenizer = load_tokenizer(base_model)
    given = {"judged": False, "formatting": True, "leave_out": False} | options
    write_preference_shards(preferences, tokenizer, folder, row_length, **given)
    return PreferenceRows(TokenShards(folder, tokenizer.hash), row_length, 3, tokenizer.pad_id)


@settings(max_examples=15)
@given(counts=st.lists(st.integers(2, 3), min_size=1, max_size=8))
def test_every_prompts_answers_are_in_one_row_once_an_epoch(
    base_model: Path, tmp_path_factory: pytest.TempPathFactory, counts: list[int]
) -> None:
    tokenizer = load_tokenizer(base_model)
    preferences = [preference(n, count) for n, count in enumerate(counts)]
    rows = write(base_model, tmp_path_factory.mktemp("p") / "shards", preferences)
    rows.reference = np.arange(sum(rows.shards.lengths()), dtype=np.float32)
    expected = {}
    first = 0
    for n, each in enumerate(preferences):
        for rank, answer in enumerate(each.answers):
            chat = render_chat(tokenizer, [*each.prompt, *answer])
            expected[n, rank] = (chat.ids, chat.mask, first)
            first += len(chat.ids)
    for epoch in range(2):
        seen = []
        for row in range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch):
            batch = rows.batch([row])
            origins = [document for _, document in rows.origins(row)]
            assert batch.documents_BT.max() + 1 == len(origins)
            for at, document in enumerate(origins):
                here_T = batch.documents_BT[0] == at
                [group] = batch.groups_BT[0][here_T].unique().tolist()
                [rank] = batch.ranks_BT[0][here_T].unique().tolist()
                number = int(rows.shards.document_ids()[document]) - 1
                ids, mask, start = expected[number, rank]
                assert batch.ids_BT[0][here_T].tolist() == ids
                labels = [token if own else IGNORE for token, own in zip(ids[1:], mask[1:], strict=True)]
                assert batch.labels_BT[0][here_T].tolist() == [*labels, IGNORE]
                assert batch.reference_BT[0][here_T].tolist() == list(range(start, start + len(ids)))
                seen.append((number, rank, group, row))
        assert sorted(each[:2] for each in seen) == sorted(expected)
        together = {(number, group, row) for number, _, group, row in seen}
        assert len(together) == len(counts), "all answers to a prompt are one group of one row"
    assert torch.equal(batch.groups_BT == PADDING, batch.documents_BT == PADDING)


def test_only_the_last_answer_is_a_label_and_special_tokens_if_wished(base_model: Path, tmp_path: Path) -> None:
    prompt = [QUESTION, *said("Lima"), {"role": "user", "content": "And then?"}]
    given = [Preference("here", prompt, (said("hay"), said("a city")), (0, 1))]
    tokenizer = load_tokenizer(base_model)
    for formatting in (True, False):
        rows = write(base_model, tmp_path / str(formatting), given, 256, formatting=formatting)
        batch = rows.batch([0])
        learnt = []
        for document in (0, 1):
            labels = batch.labels_BT[batch.documents_BT == document]
            learnt.append(tokenizer.decode(labels[labels != IGNORE].tolist()))
        end = "<|eot_id|>" if formatting else ""
        assert sorted(learnt) == sorted([f"hay{end}", f"a city{end}"])


def test_what_cannot_be_used_is_refused_or_written_down(base_model: Path, tmp_path: Path) -> None:
    given = [preference(0, 2), InputError("file, line 2: an answer is empty."), preference(2, 2, length=90)]
    with pytest.raises(InputError, match=r"line 2: an answer is empty\. Set leave_out=true"):
        write(base_model, tmp_path / "refused", given)
    assert not (tmp_path / "refused").exists()
    rows = write(base_model, tmp_path / "rest", given, leave_out=True)
    assert rows.num_groups == 1
    reasons = [line["reason"] for line in read_jsonl(tmp_path / "rest" / "left_out.jsonl")]
    assert len(reasons) == 2
    assert "more than a row (128)" in reasons[1]
    with pytest.raises(InputError, match="no preference to learn from in 2 rows"):
        write(base_model, tmp_path / "none", given[1:], leave_out=True)
    with pytest.raises(InputError, match="it has several, but the method needs one judged"):
        write(base_model, tmp_path / "kto", given, judged=True)


def test_judged_answers_stand_beside_one_to_another_prompt() -> None:
    judged = [Preference(f"line {n}", [QUESTION], (said(str(n)),), (GOOD,)) for n in range(3)]
    found = [each for each in with_mismatched(judged) if isinstance(each, Preference)]
    assert [[answer[0]["content"] for answer in each.answers] for each in found] == [["0", "2"], ["1", "0"], ["2", "1"]]
    assert all(each.ranks == (GOOD, MISMATCHED) and each.is_judged for each in found)
