"""Explanations add up, agree with captum and transformers, and can be read."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.explain.generation import GenerationSettings, explain_generation
from puna.finetune.explain.gradients import Function, Target, baseline_embeddings, head_function, integrated_gradients
from puna.finetune.explain.heads import HeadSettings, explain_head
from puna.finetune.explain.main import ExplainConfig
from puna.finetune.explain.main import main as explain
from puna.finetune.explain.rollout import attention_rollout, rollout
from puna.finetune.explain.texts import Asked, Texts, read_texts
from puna.finetune.explain.units import readable_units
from puna.finetune.main import main as finetune
from puna.finetune.tasks.classification import Classification
from puna.finetune.tasks.relations import Relations
from puna.finetune.tasks.spans import Spans
from puna.finetune.tasks.tagging import Tagging
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.peft.apply import attach
from puna.peft.heads import Attention, HeadSpec, add_head, load_head_model, save_head_model
from puna.peft.prefix import PrefixConfig
from puna.peft.prompt import PromptConfig
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

CLASSES = HeadSpec(
    "ForSequenceClassification",
    "score",
    False,
    ("bad", "good", "so-so"),
    {"problem_type": "single_label_classification"},
)


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Tokenizer:
    return load_tokenizer(base_model)


@pytest.fixture
def classifier(base_model: Path) -> Transformer:
    """A trunk and a head with weights large enough to say something, and small enough for it to be smooth."""
    model = load_model(base_model, dtype=torch.float32)
    add_head(model, CLASSES, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return model.eval()


def riemann(function: Function, x_TD: Tensor, baseline_TD: Tensor, steps: int) -> Tensor:
    """Equation 3 of the paper, term by term, for one output."""
    total_TD = torch.zeros_like(x_TD)
    for k in range(1, steps + 1):
        point = (baseline_TD + k / steps * (x_TD - baseline_TD)).requires_grad_()
        function(point[None])[0, 0].backward()
        assert point.grad is not None
        total_TD += point.grad
    return ((x_TD - baseline_TD) * total_TD / steps).sum(-1)


def test_a_linear_function_is_attributed_exactly() -> None:
    """IG of w.x is w (x - x'), whatever the path; two outputs at once."""
    generator = torch.Generator().manual_seed(0)
    x, baseline, first, second = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)

    def function(x_NTD: Tensor) -> Tensor:
        return torch.stack(((x_NTD * first).sum((1, 2)) + 7, (x_NTD * second).sum((1, 2))), dim=1)

    found = integrated_gradients(function, x, baseline)
    expected = torch.stack([(weights * (x - baseline)).sum(-1) for weights in (first, second)])
    torch.testing.assert_close(found.values_KT, expected)
    assert found.complete_K.all()
    assert found.num_points == 32


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_quadrature_is_what_the_sum_tends_to(seed: int) -> None:
    """Against equation 3 on a smooth random function. The sum's error is c / steps plus terms of the second order, so
    that of 2 R(200) - R(100) is about 1e-4 of the gradient's second derivative along the path."""
    generator = torch.Generator().manual_seed(seed)
    x, baseline, weights = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)

    def function(x_NTD: Tensor) -> Tensor:
        return ((x_NTD * weights).sum((1, 2)).tanh() + x_NTD[:, 0, 0] * x_NTD[:, 1, 1])[:, None]

    found = integrated_gradients(function, x, baseline, tolerance=1e-6)
    assert found.complete_K.all()
    limit = 2 * riemann(function, x, baseline, 200) - riemann(function, x, baseline, 100)
    torch.testing.assert_close(found.values_KT[0], limit, atol=0.01, rtol=0)


def test_what_is_not_complete_is_said() -> None:
    """A step cannot be integrated by its gradient, which is zero."""
    x, baseline = torch.ones(2, 2), torch.zeros(2, 2)

    def function(x_NTD: Tensor) -> Tensor:
        return ((x_NTD.sum((1, 2)) > 2).float() + 0 * x_NTD.sum((1, 2)))[:, None]

    found = integrated_gradients(function, x, baseline, max_points=64)
    assert 32 < found.num_points <= 64
    assert not found.complete_K.any()
    assert found.gaps_K.item() == 1


def saved(model: Transformer, tokenizer: Tokenizer, attention: Attention, folder: Path) -> Path:
    save_head_model(model, CLASSES, attention, tokenizer, folder, torch.float32, Manifest("finetune", {}, {}))
    return folder


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_captum_attributes_the_same_in_transformers(
    classifier: Transformer, tokenizer: Tokenizer, tmp_path: Path, attention: Attention
) -> None:
    """The same model read by transformers, its embeddings integrated by captum in 128 points.

    No contribution can be further off than all of them together may be; beside that there is rounding in float32.
    """
    captum = pytest.importorskip("captum.attr")
    from transformers import LlamaForSequenceClassification

    folder = saved(classifier, tokenizer, attention, tmp_path / "model")
    theirs = LlamaForSequenceClassification.from_pretrained(folder).eval()
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("the good llama sleeps")]
    targets = [Target(len(ids) - 1, label) for label in range(3)]
    baseline_TD = baseline_embeddings(classifier, ids, tokenizer, "padding")
    x_TD = classifier.embedding.weight.detach()[ids]
    ours = integrated_gradients(
        head_function(classifier, ids, CLASSES, attention, targets), x_TD, baseline_TD, tolerance=1e-4
    )
    assert ours.complete_K.all()
    assert ours.values_KT.abs().max() > 0.01

    def forward(embeddings: Tensor) -> Tensor:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        # transformers finds the last token by the ids, where there are any, else by the length.
        logits = theirs(inputs_embeds=embeddings, attention_mask=mask).logits
        return torch.softmax(logits, -1)

    reference = captum.IntegratedGradients(forward)
    for label in range(3):
        values = reference.attribute(x_TD[None], baseline_TD[None], target=label, n_steps=128, method="gausslegendre")
        tolerance = float(ours.bounds_K[label]) + 1e-5
        torch.testing.assert_close(ours.values_KT[label], values[0].sum(-1).double(), atol=tolerance, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_rollout_sums_over_all_paths(layers: int, length: int, seed: int) -> None:
    """Against the definition: the weight of every path from a token through the layers, added up."""
    generator = np.random.default_rng(seed)
    weights = generator.random((layers, length, length))
    weights /= weights.sum(-1, keepdims=True)

    def flow(layer: int, to: int, source: int) -> float:
        """What reaches `to` after `layer` layers from `source` before the first."""
        if layer == 0:
            return float(to == source)
        residual = 0.5 * flow(layer - 1, to, source)
        return residual + 0.5 * sum(weights[layer - 1, to, via] * flow(layer - 1, via, source) for via in range(length))

    found = rollout(list(torch.tensor(weights)))
    expected = [[flow(layers, to, source) for source in range(length)] for to in range(length)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.sum(-1), torch.ones(length, dtype=torch.float64))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_recorded_weights_are_those_of_transformers(
    classifier: Transformer, tokenizer: Tokenizer, tmp_path: Path, attention: Attention
) -> None:
    from transformers import LlamaForSequenceClassification

    folder = saved(classifier, tokenizer, attention, tmp_path / "model")
    theirs = LlamaForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("the bad herd of Lima")]
    with torch.no_grad():
        attentions = theirs(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    found = attention_rollout(classifier, ids, attention)
    assert found is not None
    torch.testing.assert_close(found, rollout([layer[0].mean(0) for layer in attentions]), atol=1e-5, rtol=1e-4)
    assert (found.triu(1) == 0).all() == (attention == "causal")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12), st.sampled_from(["words", "pieces"]))
def test_units_join_to_the_text(tokenizer: Tokenizer, text: str, join: Any) -> None:
    """A tokenizer of bytes tears most characters apart; every unit is readable, and none is lost."""
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.bos_id]
    units = readable_units(tokenizer, ids, join)
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == len(ids)
    assert [unit.special for unit in units] == [True, *[False] * (len(units) - 2), True]
    assert "".join(unit.text for unit in units[1:-1]) == tokenizer.decode(ids[1:-1])


def test_words_are_joined_and_wide_characters_are_not(tokenizer: Tokenizer) -> None:
    text = "naïve llamas, 草原 3x\u0301"
    units = readable_units(tokenizer, tokenizer.encode(text), "words")
    assert [unit.text for unit in units] == ["naïve", " llamas", ",", " 草", "原", " 3x\u0301"]
    assert math.prod(unit.stop - unit.start for unit in units) > 1


TRAIN = [
    "train.steps=30",
    "train.batch_rows=4",
    "train.micro_batch_rows=4",
    "train.row_length=32",
    "train.device=cpu",
    "train.num_threads=1",
    "train.tensorboard=false",
    "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=2",
]


def trained(base_model: Path, folder: Path, data: Path, *settings: str) -> Path:
    """What `puna finetune` wrote for a task."""
    paths = [f"model={base_model}", f"output={folder}", f"data.train={data}", f"data.held_out={data}"]
    finetune(load_config(FinetuneConfig, None, [*paths, *TRAIN, *settings]))
    return next(path for path in (folder / "model", folder / "adapter") if path.is_dir())


def explain_page(output: Path, *settings: str) -> str:
    explain(load_config(ExplainConfig, None, [f"output={output}", "head.device=cpu", *settings]))
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sentiment(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that knows good from bad."""
    folder = tmp_path_factory.mktemp("sentiment")
    data = folder / "data.csv"
    places = (
        "the {} llama sleeps",
        "a {} city in Peru",
        "{} hay",
        "the herd of {} Lima eats",
        "{} and {}",
        "in a {} herd",
    )
    rows = [f"{place.format(word, word)},{word}" for place in places for word in ("good", "bad")]
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    return trained(base_model, folder, data, "task.kind=classification")


def test_a_trained_class_rests_on_the_word_that_makes_it(
    sentiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_head_model(sentiment)
    answers = {}
    for word in ("good", "bad"):
        [asked] = read_texts(Texts((f"the {word} herd sleeps",)), Classification(), loaded.tokenizer, 32)
        found = explain_head(loaded.model, loaded.tokenizer, loaded.spec, loaded.attention, asked, HeadSettings())
        assert found.answers[0][1] == word
        for part in found.contributions:
            assert part.complete
            total = sum(cell.value for cell in part.cells)
            assert total == pytest.approx(part.output - part.baseline_output, abs=part.bound)
            answers[word, part.label] = next(cell.value for cell in part.cells if cell.text == f" {word}")
    assert {pair: value > 0 for pair, value in answers.items()} == {
        ("good", "good"): True,
        ("good", "bad"): False,
        ("bad", "good"): False,
        ("bad", "bad"): True,
    }
    assert [cell.special for cell in found.rollouts[0].cells] == [True, *[False] * 4]
    assert sum(cell.value for cell in found.rollouts[0].cells) == pytest.approx(1, abs=1e-5)

    texts = tmp_path / "texts.txt"
    texts.write_text("the good llama sleeps\n\nthe <b>bad</b> herd\nand a third\n", encoding="utf-8")
    page = explain_page(tmp_path / "page.html", f"model={sentiment}", f"data={texts}", "max_texts=2")
    assert f"{texts}, line 3" in page
    assert "third" not in page
    assert page.count("Attention rollout</h3>") == 2
    assert "&lt;" in page
    assert "<b>bad</b> herd" not in page
    printed = capsys.readouterr()
    assert printed.out.count(": complete") == 4
    assert "holds more than max_texts=2 texts" in printed.err


def test_tags_are_explained_word_by_word(base_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "tags.conll"
    data.write_text("the O\nherd O\nof O\nLima B-LOC\n\nPeru B-LOC\nsleeps O\n")
    model = trained(base_model, tmp_path, data, "task.kind=tagging")
    page = explain_page(tmp_path / "page.html", f"model={model}", 'text="the herd of Lima"')
    assert re.findall(r"<h3>(\S+) <span class=\"unit\">of (\w+)", page) == [("B-LOC", "Lima")]
    assert page.count("Attention rollout <span") == 1
    both = explain_page(tmp_path / "both.html", f"model={model}", f"data={data}")
    assert both.count("B-LOC <span") == 2
    assert f"{data}, line 1</h2>" in both
    nothing = explain_page(tmp_path / "none.html", f"model={model}", 'text="the sleeps"', 'head.labels=["I-LOC"]')
    assert "nothing to explain" in nothing


def test_relations_and_pairs_are_read_as_they_were_learnt(tokenizer: Tokenizer) -> None:
    """The second text of a relation is its two entities; what is no pair, and other tasks, are refused."""
    given = Texts(("the <e1>llama</e1> eats <e2>hay</e2>",))
    [related] = read_texts(given, Relations(), tokenizer, 64)
    pair = Texts((*given.given, "llama, hay"))
    [paired] = read_texts(pair, Classification(second_text="other"), tokenizer, 64)
    assert related.ids == paired.ids
    with pytest.raises(InputError, match="reads pairs of texts: set second_text"):
        read_texts(given, Classification(second_text="other"), tokenizer, 64)
    for task in (Relations(), Tagging()):
        with pytest.raises(InputError, match="one text, not a pair"):
            read_texts(pair, task, tokenizer, 64)
    with pytest.raises(InputError, match="classes and tags; this head is for spans"):
        read_texts(given, Spans(), tokenizer, 64)
    with pytest.raises(InputError, match="holds nothing to read"):
        read_texts(Texts((" ",)), Tagging(), tokenizer, 64)
    [cut] = read_texts(Texts(("a good city",)), Tagging(), tokenizer, 4)
    assert len(cut.ids) == 4
    assert len(cut.positions) == len(cut.words) < 3


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_are_no_text(classifier: Transformer, tokenizer: Tokenizer, kind: str) -> None:
    """Contributions add up with them; rollout is not shown."""
    attach(classifier, {"prefix": PrefixConfig, "prompt": PromptConfig}[kind](num_virtual_tokens=3), seed=0)
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("a good city")]
    asked = Asked("here", ids, [len(ids) - 1], [""])
    found = explain_head(classifier, tokenizer, CLASSES, "causal", asked, HeadSettings())
    assert all(part.complete for part in found.contributions)
    assert found.rollouts == []


def test_a_written_text_shows_what_else_it_might_have_been(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the model's own logits."""
    model, tokenizer = load_model(base_model), load_tokenizer(base_model)
    engine = Engine(model, tokenizer)
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    [found] = explain_generation(engine, ["a good 草 city"], GenerationSettings(alternatives=3, sampling=greedy))
    ids = engine.encode("a good 草 city")
    [completion] = engine.generate([ids], greedy)
    whole = [*ids, *completion.ids]
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([whole]))[0].log_softmax(-1)
    tokens = [token for stretch in found.stretches for token in stretch.tokens]
    expected = [float(logprobs_TV[at - 1, token_id]) for at, token_id in enumerate(whole) if at]
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)
    best = logprobs_TV[:-1].exp().topk(3).values
    given = [[probability for _, probability in token.alternatives] for token in tokens]
    torch.testing.assert_close(torch.tensor(given), best, atol=1e-4, rtol=1e-3)
    assert found.logprob == pytest.approx(sum(expected[-5:]) / 5, abs=1e-4)
    chinese = next(stretch for stretch in found.stretches if "草" in stretch.text)
    assert len(chinese.tokens) == 3
    assert chinese.tokens[0].text == "<E8>"
    assert 0 < chinese.strength <= 1

    settings = [f"model={base_model}", 'text="a good city"', "generation.chat=true"]
    settings += ["generation.sampling.max_tokens=3", "generation.sampling.seed=1"]
    output = tmp_path / "page.html"
    explain(load_config(ExplainConfig, None, [f"output={output}", *settings]))
    page = output.read_text(encoding="utf-8")
    assert page.count("&lt;|start_header_id|&gt;") >= 2
    assert page.count('class="tip"') >= 3
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    # However the table breaks its lines.
    assert {"likeliest", "place"} <= set(printed.split())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["text=hay", "generation.alternatives=3"], "has a head, and writes no text"),
        (["text=hay", 'head.labels=["ugly"]'], "no output 'ugly'; it has bad, good"),
        (["text=hay", "second_text=grass"], "reads one text, not a pair"),
        (["data=absent.csv"], "absent.csv does not exist"),
        (["text=hay", "data=x.csv"], "one of text and data"),
        ([], "one of text and data"),
        (["text=hay", "columns=['a']"], "columns are those of data"),
        (["text=hay", "head.tolerance=0"], "tolerance is 0"),
    ],
)
def test_what_cannot_be_explained_is_refused(sentiment: Path, tmp_path: Path, settings: list[str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        explain_page(tmp_path / "page.html", f"model={sentiment}", *settings)
    assert not (tmp_path / "page.html").exists()


def test_a_model_without_a_head_has_no_settings_for_one(base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no head: leave head"):
        explain_page(tmp_path / "page.html", f"model={base_model}", "text=hay")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter of a model that writes\. Name"):
        explain_page(tmp_path / "page.html", f"model={tmp_path}", "text=hay")
    with pytest.raises(InputError, match="leave logprobs and prompt_logprobs"):
        explain_page(tmp_path / "page.html", f"model={base_model}", "text=hay", "generation.sampling.logprobs=2")
