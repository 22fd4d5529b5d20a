"""Constrained answers: against Python's own readers of each notation, and beside all else that an engine does."""

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.config import load_config
from puna.infer import constrain, generate
from puna.infer.config import EngineConfig
from puna.infer.constrain import Constraint, Constraints
from puna.infer.engine import Engine
from puna.infer.generate import GenerateConfig
from puna.infer.llm import LLM
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "é", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]"
PAIRS = 'start: "a" start "b" | "ab"'
CHOICES = ("yes", 'no "thanks"', "né\n")
FINISHING = tuple((byte, 7.0 if byte in b"}]" else 5.0) for byte in b'}]"0')
"""A bias without which a random model hardly ends a string or a list."""


def in_pairs(text: str) -> bool:
    half = len(text) // 2
    return bool(half) and text == "a" * half + "b" * half


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


KINDS: list[tuple[Constraint, Callable[[str], object]]] = [
    (Constraint(json_schema=json.dumps(PERSON)), is_person),
    (Constraint(regex=CLOCK), lambda text: re.fullmatch(CLOCK, text)),
    (Constraint(choice=CHOICES), lambda text: text in CHOICES),
    (Constraint(grammar=PAIRS), in_pairs),
]


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize(("constraint", "fits"), KINDS)
def test_answers_are_as_demanded(engine: Engine, constraint: Constraint, fits: Callable[[str], object]) -> None:
    params = SamplingParams(constraint=constraint, temperature=2.0, max_tokens=None, logit_bias=FINISHING)
    prompt, ended = [256, *b"x"], 0
    for completion in engine.generate([prompt] * 12, [replace(params, seed=seed) for seed in range(12)]):
        if completion.finish_reason == "stop":
            assert fits(completion.text), completion.text
            ended += 1
    assert ended >= 6
    assert engine.idle


choices = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(choice=choices, data=st.data())
def test_what_may_follow_is_what_leads_on(
    constraints: Constraints, tokenizer: Tokenizer, choice: list[str], data: st.DataObject
) -> None:
    """For choices it can be said in two lines which byte may come next, and where the answer may end."""
    texts = {text.encode() for text in choice}
    matcher = constraints.compile(Constraint(choice=tuple(choice))).result().copy()
    written = b""
    while not matcher.finished:
        expected = {text[len(written)] for text in texts if text.startswith(written) and text != written}
        expected |= set(tokenizer.stop_ids) if written in texts else set()
        allowed = {token_id for token_id, fine in enumerate(matcher.allowed()) if fine}
        assert allowed == expected
        token_id = data.draw(st.sampled_from(sorted(allowed)))
        matcher.note(token_id)
        written += bytes([token_id]) if token_id < 256 else b""
    assert not matcher.error
    assert written in texts


def test_blanks_are_bounded(engine: Engine) -> None:
    """A model that likes nothing better than blanks still comes to an end."""
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 5}}, "required": ["a"]}
    params = SamplingParams(
        constraint=Constraint(json_schema=json.dumps({**schema, "additionalProperties": False})),
        temperature=0,
        logit_bias=((ord(" "), 100.0), (ord("\n"), 100.0)),
    )
    [completion] = Engine(engine.model, engine.tokenizer).generate([[256]], params)
    assert completion.finish_reason == "stop"
    assert json.loads(completion.text)["a"] <= 5
    runs = [len(run) for run in re.findall(r"\s+", completion.text)]
    assert max(runs) == 32


def test_the_same_answers_under_pressure(model: Transformer, tokenizer: Tokenizer) -> None:
    """Neighbours, preemption and shared prefixes change nothing, nor do those that have no constraint."""
    prompts = [[256, *b"a shared beginning, ", i] for i in range(6)]
    params = [
        SamplingParams(constraint=kind, temperature=1.5, seed=i, max_tokens=40, logit_bias=FINISHING)
        for i, kind in enumerate([*(kind for kind, _ in KINDS), None, KINDS[0][0]])
    ]
    alone = []
    for prompt, own in zip(prompts, params, strict=True):
        alone += Engine(model, tokenizer, EngineConfig(max_rows=1)).generate([prompt], own)
    config = EngineConfig(max_rows=5, max_context=64, cache_tokens=96, block_size=4, overcommit=4.0, step_tokens=16)
    crowded = Engine(model, tokenizer, config)
    together = crowded.generate(prompts, params)
    assert [c.ids for c in together] == [c.ids for c in alone]
    assert crowded.scheduler.num_preemptions > 0
    assert sum(c.prompt.num_cached_tokens for c in together) > 0


def test_stop_strings_and_limits_cut_an_answer(engine: Engine) -> None:
    params = SamplingParams(constraint=Constraint(regex="[a-z]{4}1[a-z]{4}"), temperature=0)
    whole, stopped, short = engine.generate(
        [[256]] * 3, [params, replace(params, stop=("1",)), replace(params, max_tokens=3)]
    )
    assert re.fullmatch("[a-z]{4}1[a-z]{4}", whole.text)
    assert (stopped.text, stopped.finish_reason) == (whole.text[:4], "stop")
    assert (short.text, short.finish_reason) == (whole.text[:3], "length")
    [endless] = engine.generate([[256]], replace(params, ignore_eos=True, max_tokens=30))
    assert (endless.text, endless.finish_reason) == (whole.text, "stop")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint(regex="(a"), "unclosed group"),
        (Constraint(grammar="start: x"), "refused: .*x"),
        (Constraint(json_schema='{"type": "wizard"}'), "Invalid type: wizard"),
        (Constraint(json_schema='{"not": {"type": "string"}}'), r'Unimplemented keys: \["not"\]'),
    ],
)
def test_a_bad_constraint_fails_its_request_alone(engine: Engine, constraint: Constraint, message: str) -> None:
    bad = SamplingParams(constraint=constraint)
    good = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    time = SamplingParams(constraint=Constraint(regex=CLOCK), temperature=0)
    first, failed, fine = engine.generate([[1], [2], [3]], [good, bad, time])
    assert failed.finish_reason == "failed"
    assert re.search(message, failed.error)
    assert (failed.text, failed.ids) == ("", ())
    assert first.ids == engine.generate([[1]], good)[0].ids
    assert re.fullmatch(CLOCK, fine.text)
    with pytest.raises(InputError, match=message):
        engine.generate([[1], [2]], bad)
    with pytest.raises(InputError, match=message):
        list(engine.stream([1], bad))
    assert engine.idle


def test_an_answer_that_cannot_go_on_fails_alone(engine: Engine) -> None:
    """llguidance gives up where a grammar becomes too complex; a token that does not fit has the same effect."""
    params = SamplingParams(constraint=Constraint(regex="[ab]{30}"), seed=1)
    whole, doomed = engine.submit([1], params), engine.submit([2], params)
    while not doomed.ids:
        engine.step()
    engine.chooser.matchers[doomed].note(ord("!"))
    news = []
    while not engine.idle:
        news += engine.step()
        engine.scheduler.check_integrity()
    assert news.count(doomed) == 1
    assert doomed.finish_reason == "failed"
    assert "cannot go on" in doomed.error
    assert "<state>" not in doomed.error
    assert re.fullmatch("[ab]{30}", whole.text)


def test_compiling_holds_nobody_up_and_can_be_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, compiled = threading.Event(), constrain._grammar

    def slow(constraint: Constraint) -> str:
        assert may_go_on.wait(20)
        return compiled(constraint)

    monkeypatch.setattr(constrain, "_grammar", slow)
    params = SamplingParams(constraint=Constraint(regex="[ab]{3}"))
    waiting, unwanted = engine.submit([1], params), engine.submit([2], params)
    other = engine.submit([3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    while other.finish_reason is None:
        engine.step()
    assert engine.step() == []
    assert not engine.idle
    engine.cancel(unwanted)
    may_go_on.set()
    while not engine.idle:
        engine.step()
    assert re.fullmatch("[ab]{3}", waiting.text)
    assert (unwanted.finish_reason, unwanted.ids) == ("cancelled", [])


def test_what_is_remembered_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by length, the least recently used going first; one that is too long is compiled all the same."""
    monkeypatch.setattr(constrain, "_MAX_REMEMBERED", 3)
    monkeypatch.setattr(constrain, "_MAX_REMEMBERED_CHARACTERS", 40)
    constraints = Constraints(tokenizer, tokenizer.vocab_size)
    short = [Constraint(regex=letter) for letter in "abcd"]
    for each in (short[0], short[1], short[2], short[0], short[3]):
        constraints.compile(each)
    assert list(constraints._compiled) == [short[2], short[0], short[3]]
    long, too_long = Constraint(choice=("x" * 30, "y" * 9)), Constraint(choice=("x" * 30, "y" * 11))
    constraints.compile(long)
    assert list(constraints._compiled) == [short[3], long]
    assert constraints.compile(too_long).result().allowed()[ord("x")]
    assert not constraints._compiled


def test_impossible_constraints_are_refused_where_they_are_made() -> None:
    for fields, message in [
        ({}, "here none of them is given"),
        ({"regex": "a", "choice": ("b",)}, "here regex and choice of them is given"),
        ({"choice": ("a", "")}, "an empty string"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": "[]"}, "has to be an object"),
    ]:
        with pytest.raises(InputError, match=message):
            Constraint(**fields)  # type: ignore[arg-type]


def test_what_constraints_need(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(constraint=Constraint(regex="a"))
    monkeypatch.setattr(constrain, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install llguidance"):
        engine.generate([[1]], params)
    monkeypatch.undo()
    monkeypatch.setattr(engine.tokenizer, "stop_ids", frozenset())
    with pytest.raises(InputError, match="no end token"):
        engine.generate([[1]], params)


def test_python_and_command_line(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(model_directory, device="cpu", num_threads=1, max_rows=3)
    output = llm.generate("What time is it?", constraint=Constraint(regex=CLOCK), n=4, seed=1, temperature=3.0)
    assert len({completion.text for completion in output.completions}) > 1
    assert all(re.fullmatch(CLOCK, completion.text) for completion in output.completions)
    talk = [{"role": "user", "content": "Well?"}]
    assert llm.chat(talk, constraint=Constraint(choice=CHOICES)).text in CHOICES
    with pytest.raises(InputError, match="unclosed group"):
        llm.chat(talk, constraint=Constraint(regex="("))

    settings = [f'model="{model_directory}"', 'prompt="at "', "engine.num_threads=1", "sampling.temperature=0"]
    generate.main(load_config(GenerateConfig, None, [*settings, f"sampling.constraint.regex='{CLOCK}'"]))
    assert re.fullmatch(f"at {CLOCK}\n", capsys.readouterr().out)
    schema = json.dumps({"enum": ["left", "right"]})
    generate.main(load_config(GenerateConfig, None, [*settings, f"sampling.constraint.json_schema='{schema}'"]))
    assert capsys.readouterr().out.strip() in ('at "left"', 'at "right"')
    with pytest.raises(InputError, match="unclosed group"):
        generate.main(load_config(GenerateConfig, None, [*settings, "sampling.constraint.regex='('"]))


def schemas(real_data: Path) -> list[dict[str, Any]]:
    import gzip

    with gzip.open(real_data / "structured" / "maskbench_schemas.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def supported(constraints: Constraints, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    compiled = [(row, constraints.compile(Constraint(json_schema=json.dumps(row["schema"])))) for row in rows]
    return [row for row, matcher in compiled if matcher.exception() is None]


def test_published_instances_are_told_apart(real_data: Path, constraints: Constraints, tokenizer: Tokenizer) -> None:
    """Every valid instance can be written, and no invalid one; 379 of the 440 schemas are supported."""
    rows = schemas(real_data)
    fine = supported(constraints, rows)
    assert len(fine) / len(rows) >= 0.86
    for row in fine:
        start = constraints.compile(Constraint(json_schema=json.dumps(row["schema"]))).result()
        for test in row["tests"]:
            matcher = start.copy()
            for byte in json.dumps(test["data"], ensure_ascii=False).encode():
                matcher.note(byte)
                if matcher.error:
                    break
            complete = not matcher.error and bool(matcher.finished or matcher.allowed()[min(tokenizer.stop_ids)])
            assert complete == test["valid"], (row["id"], test)


def check_generated(engine: Engine, rows: Sequence[dict[str, Any]]) -> int:
    """Let a random model write an instance of each schema; how many came to their end, all of them valid."""
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=300, logit_bias=FINISHING)
    own = [replace(params, constraint=Constraint(json_schema=json.dumps(row["schema"]))) for row in rows]
    ended = 0
    for row, completion in zip(rows, engine.generate([[256]] * len(rows), own), strict=True):
        assert completion.finish_reason in ("stop", "length"), completion.error
        if completion.finish_reason == "stop":
            validator = jsonschema.validators.validator_for(row["schema"], jsonschema.Draft202012Validator)
            validator(row["schema"]).validate(json.loads(completion.text))
            ended += 1
    return ended


@pytest.mark.parametrize("part", [slice(0, 20), pytest.param(slice(0, 440), marks=pytest.mark.slow)])
def test_answers_to_published_schemas_are_valid(
    real_data: Path, constraints: Constraints, model: Transformer, tokenizer: Tokenizer, part: slice
) -> None:
    rows = supported(constraints, schemas(real_data)[part])
    longer = Transformer(replace(model.config, context_length=1024))
    longer.load_state_dict(model.state_dict())
    engine = Engine(longer, tokenizer, EngineConfig(max_rows=16))
    assert check_generated(engine, rows) >= 0.4 * len(rows)
