import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from puna.cli import app
from puna.config import parse_config
from puna.evaluate.compare.architecture import architecture_section
from puna.evaluate.compare.candidates import Candidate, read_candidates, short_names
from puna.evaluate.compare.main import CompareConfig, main
from puna.evaluate.compare.published import published_section, read_published, same_name
from puna.evaluate.compare.speed import SpeedConfig, speed_section
from puna.evaluate.compare.tokenizers import tokenizer_section
from puna.evaluate.contamination import ContaminationConfig
from puna.evaluate.contamination import main as look_for
from puna.infer.config import EngineConfig
from puna.model.presets import preset
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.tokenizer.load import load_tokenizer

TABLES = {
    "card.md": [
        {"heading": "Carbon", "rows": [["", "GPU hours"], ["Llama 9 1B", "3"]]},
        {
            "html": True,
            "rows": [
                ["Category", "Benchmark", "# Shots", "Llama 9 1B", "Llama 3.1 8B"],
                [{"text": "General", "rowspan": 2}, "MMLU", "5", "30", "66.7"],
                ["AGIEval", "3-5", "20", "47.8"],
                ["Code", "**MBPP**", "0", "", "60"],
            ],
        },
        {"heading": "Results. More words", "rows": [["Model", "Size", "Code"], ["Llama 9", "1B", "14.1"]]},
    ]
}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    (tmp_path / "tables.json").write_text(json.dumps(TABLES))
    return tmp_path / "tables.json"


def test_published_tables_are_read_with_their_spans(tables: Path) -> None:
    wide, tall = read_published(tables)
    assert wide.models == ("Llama 9 1B", "Llama 3.1 8B")
    assert wide.rows[1] == ("General", "AGIEval", "3-5", "20", "47.8")
    assert wide.source == "card.md: table 2"
    assert (tall.columns, tall.rows, tall.source) == (
        ("Benchmark", "Llama 9 1B"),
        (("Code", "14.1"),),
        "card.md: Results",
    )
    section = published_section([wide, tall], ["llama-9-1b", "qwen2.5-7b"])
    assert [sheet.columns[-1] for sheet in section.sheets] == ["Llama 9 1B", "Llama 9 1B"]
    assert [row[1] for row in section.sheets[0].rows] == ["MMLU", "AGIEval"]
    assert section.missing == ["qwen2.5-7b: no published result in these tables"]
    tables.write_text("[1, 2]")
    with pytest.raises(InputError, match="does not hold tables of model cards"):
        read_published(tables)


def test_names_are_the_same_in_any_spelling() -> None:
    assert same_name("llama-3.1-8b", "Llama 3.1 8B")
    assert same_name("llama-2-7b", "Llama2 7B")
    assert not same_name("llama-3.1-8b", "Llama 3.1 8B Instruct")


def test_published_results_of_real_cards(real_data: Path) -> None:
    published = read_published(real_data / "reference" / "model_cards" / "tables.json")
    table = next(table for table in published if table.source == "llama3_1/MODEL_CARD.md: table 3")
    mmlu = dict(zip(table.columns, table.rows[0], strict=True))
    assert (mmlu["Benchmark"], mmlu["# Shots"], mmlu["Llama 3.1 8B"], mmlu["Llama 3.1 405B"]) == (
        "MMLU",
        "5",
        "66.7",
        "85.2",
    )
    assert len({name for table in published for name in table.models}) > 20


def test_candidates_of_every_kind(base_model: Path, tables: Path) -> None:
    published = read_published(tables)
    models = [str(base_model), "llama-3.1-8b", "Llama 9 1B"]
    found = read_candidates(models, [], {"llama-3.1-8b": base_model}, published)
    assert [candidate.kind for candidate in found] == [
        "weights",
        "published configuration, no weights",
        "published results only",
    ]
    assert [candidate.tokenizer for candidate in found] == [base_model, base_model, None]
    for wrong, message in (
        (
            (["nowhere", models[1]], [], {}, published),
            "no checkpoint at nowhere nor in the tables of published results",
        ),
        ((["llama-3.1-80b", models[1]], [], {}, []), "did you mean 'llama-3.1-8b'"),
        ((models, ["a"], {}, published), "1 names for 3 models"),
        ((models, ["a", "a", "b"], {}, published), "Two models have the same name"),
        ((models, [], {"x": base_model}, published), "tokenizers names x, which is none of the models"),
    ):
        with pytest.raises(InputError, match=message):
            read_candidates(*wrong)


def test_short_names_tell_models_apart() -> None:
    assert short_names(["runs/a/model", "runs/b/model", "qwen3-8b"]) == ["a", "b", "qwen3-8b"]
    assert short_names(["one/a/model", "two/a/model"]) == ["one/a", "two/a"]
    assert short_names(["model", "x/model"]) == ["model", "x"]


def test_architecture_counts_are_the_published_ones() -> None:
    configs = [Candidate(name, name, "published", preset(name), None, None) for name in ("llama-3.1-8b", "qwen2.5-7b")]
    section = architecture_section([*configs, Candidate("x", "x", "results", None, None, None)])
    rows = {row[0]: row[1:] for row in section.sheets[0].rows}
    assert rows["parameters"] == ["8,030,261,248", "7,615,616,512", "not known"]
    assert rows["cache, bytes per token"][:2] == ["131,072", "57,344"]
    assert rows["bias on queries, keys, values"][:2] == ["no", "yes"]
    assert section.missing == ["x: not measured: no configuration, only published results"]


def test_bytes_per_token_and_tokens_in_common(base_model: Path, tmp_path: Path) -> None:
    texts = {"en": ["the llama walks", "to Lima"], "zh": ["秘鲁的羊驼"]}
    write_jsonl(tmp_path / "lang.jsonl", ({"lang": key, "text": text} for key, own in texts.items() for text in own))
    write_jsonl(tmp_path / "docs.jsonl", [{"text": "a good bad city"}, {"text": "left out"}])
    candidates = [Candidate(name, name, "weights", None, base_model, base_model) for name in ("a", "b")]
    candidates.append(Candidate("c", "c", "published", None, None, None))
    section = tokenizer_section(candidates, tmp_path / "lang.jsonl", {"docs": tmp_path / "docs.jsonl"}, 1)
    tokenizer = load_tokenizer(base_model)
    rates = section.data["bytes_per_token"]
    assert rates["corpora"]["docs"]["a"] == 15 / len(tokenizer.encode("a good bad city"))
    assert rates["languages"]["en"]["a"] == 22 / sum(len(tokenizer.encode(text)) for text in texts["en"])
    assert rates["languages"]["zh"]["a"] == 1.0  # 300 ids have no room for Chinese
    ordinary = tokenizer.vocab_size - len(tokenizer.special_ids)
    assert section.sheets[-1].rows == [["a and b", str(ordinary), str(ordinary), f"{ordinary} (100% and 100%)", "100%"]]
    assert section.missing == ["c: not measured: no tokenizer"]
    write_jsonl(tmp_path / "lang.jsonl", [{"language": "en", "text": "x"}])
    with pytest.raises(InputError, match=r"row 1: a sentence needs"):
        tokenizer_section(candidates, tmp_path / "lang.jsonl", {}, 1)


def test_speed_is_measured_in_a_process_of_its_own(base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(device="cpu", num_threads=1, max_rows=2)
    config = SpeedConfig(prompt_tokens=1000, new_tokens=6, repeats=1, rounds=1, engine=engine)
    candidates = [Candidate("a", "a", "weights", None, base_model, base_model)]
    candidates.append(Candidate("b", "b", "published", None, None, None))
    section = speed_section(candidates, config)
    (speed,) = section.data["speeds"].values()
    assert (speed["prompt_tokens"], speed["new_tokens"]) == (122, 6)  # what the context of 128 has room for
    assert min(value for key, value in speed.items() if "per_second" in key) > 0
    assert 50e6 < speed["peak_memory_bytes"] < 4e9
    assert section.missing == ["b: not measured: no weights"]
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(InputError, match="The speed of a could not be measured: exit status 1"):
        speed_section(candidates, config)


def test_a_whole_comparison(base_model: Path, tables: Path, tmp_path: Path) -> None:
    shutil.copytree(base_model, tmp_path / "second" / "model")
    write_jsonl(
        tmp_path / "docs.jsonl", ({"id": str(n), "text": f"{n} llamas walk to <Lima> & sleep"} for n in range(6))
    )
    quiz = [{"question": f"{n} llamas walk to", "choices": ["Lima", "two"], "answer": n % 2} for n in range(8)]
    write_jsonl(tmp_path / "quiz.jsonl", quiz)
    task = {"kind": "choice", "name": "quiz", "file": str(tmp_path / "quiz.jsonl"), "prompt": "{question}"}
    values = {
        "models": [str(base_model), str(tmp_path / "second" / "model"), "llama-3.1-8b", "Llama 9 1B"],
        "names": ["first", "second", "big", "paper"],
        "output": str(tmp_path / "out"),
        "documents": {"notes": str(tmp_path / "docs.jsonl")},
        "tasks": [task | {"choices": "choices", "answer": "answer"}],
        "published": str(tables),
        "prompts": ["the <b>llama</b>"],
        "speed": {"measure": False},
        "engine": {"device": "cpu", "num_threads": 1},
    }
    check = {"tasks": values["tasks"], "against": [str(tmp_path / "docs.jsonl")], "ngram_words": [5]}
    contamination = str(tmp_path / "contamination")
    look_for(parse_config(ContaminationConfig, check | {"output": contamination}, "test"))
    main(parse_config(CompareConfig, values | {"contamination": contamination}, "test"))
    results = json.loads((tmp_path / "out" / "evaluations" / "first" / "results.json").read_text())
    assert re.search(r"on 4 clean; .* on 4 contaminated", results["tasks"]["quiz"]["contamination"])
    data = json.loads((tmp_path / "out" / "compare.json").read_text())
    quality = data["sections"]["Quality"]
    assert {(d["task"], d["count"], d["mean"], d["p"]) for d in quality["differences"]} == {
        ("quiz", 8, 0, 1),
        ("notes", 6, 0, 1),
    }
    answers = data["generations"][0]["answers"]
    assert answers["first"] == answers["second"] != ""
    assert answers["big"] == "not measured: no weights"
    page = (tmp_path / "out" / "compare.html").read_text()
    for part in (
        "first or second or big or paper?",
        "big: not measured: no weights",
        "paper: not measured: no tokenizer",
        "switched off (speed.measure)",
        results["tasks"]["quiz"]["contamination"],
        'Published results <span class="badge">published</span>',
        "the &lt;b&gt;llama&lt;/b&gt;",
        "quiz: no difference shown between first and second in 8 questions",
    ):
        assert part in page
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing outside the page is needed

    second = {str(base_model): "evaluations/first", "llama-3.1-8b": "evaluations/second"}
    paths = {model: str(tmp_path / "out" / folder) for model, folder in second.items()}
    again = values | {
        "evaluations": paths,
        "tasks": [],
        "documents": {},
        "prompts": [],
        "output": str(tmp_path / "again"),
    }
    main(parse_config(CompareConfig, again, "test"))
    assert "contamination: not checked, so there is no clean score" in (tmp_path / "again" / "compare.html").read_text()
    found = json.loads((tmp_path / "again" / "compare.json").read_text())["sections"]["Quality"]
    assert {(d["ours"], d["theirs"], d["task"]) for d in found["differences"]} == {
        ("first", "big", "quiz"),
        ("first", "big", "notes"),
    }
    assert "second: not measured: no tasks, documents or evaluations were named" in found["missing"]


def test_mistakes_are_named(base_model: Path) -> None:
    for values, message in (
        ({"models": [str(base_model)]}, "at least two models"),
        ({"models": ["a", "b"], "evaluations": {"a": "x"}, "documents": {"en": "y"}}, "but not both"),
        ({"models": ["a", "b"], "max_documents": 0}, "have to be at least 1"),
        ({"models": ["a", "b"], "speed": {"new_tokens": 1}}, "new_tokens at least 2"),
    ):
        with pytest.raises(InputError, match=message):
            parse_config(CompareConfig, values, "test")
    done = CliRunner().invoke(app, ["compare", "llama-3.1-8b", "llama-3.1-9b"])
    assert "did you mean" in str(done.exception)
