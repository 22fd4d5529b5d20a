"""Requests through the engine beside one plain forward each, and what is kept of the answers."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.harness.ask import Asker
from puna.evaluate.harness.cache import AnswerCache
from puna.evaluate.harness.encode import Encoder, rolling_windows
from puna.evaluate.harness.engine import EvaluationEngineConfig
from puna.evaluate.tasks.request import Continuation, Generation, Likelihood, Text
from puna.infer.engine import Engine
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

CONTEXT = 48

WORDS = st.sampled_from(["the llama", " walks", " to a", " good city", "\n", " ", " in Peru", " x"])
TEXTS = st.lists(WORDS, max_size=30).map("".join)


@pytest.fixture(scope="module")
def loaded(make_model: Any) -> tuple[Transformer, Any]:
    directory = make_model(CONTEXT)
    return load_model(directory, device=torch.device("cpu")), load_tokenizer(directory)


def forward_once(model: Transformer, ids: Sequence[int], first: int) -> Likelihood:
    """The tokens from `first` on, by the model's own forward."""
    logprobs_TV = model(torch.tensor([ids[:-1]]))[0].float().log_softmax(-1)
    scored = logprobs_TV[first - 1 :]
    follow = torch.tensor(ids[first:])
    total = scored.gather(1, follow[:, None]).sum().item()
    return Likelihood(total, bool((scored.argmax(-1) == follow).all()), len(follow))


@settings(max_examples=15)
@given(
    prompts=st.lists(TEXTS, min_size=1, max_size=3),
    answers=st.lists(WORDS.filter(str.strip), min_size=1, max_size=3),
    block_size=st.sampled_from((1, 4, 16)),
    max_rows=st.sampled_from((1, 3, 16)),
    step_tokens=st.sampled_from((16, 64)),
    overcommit=st.sampled_from((1.0, 3.0)),
    batch_invariant=st.booleans(),
)
@torch.inference_mode()
def test_likelihoods_are_those_of_plain_forwards(
    loaded: Any, prompts: list[str], answers: list[str], **limits: Any
) -> None:
    """However many run at once, in whatever pieces, also where some are put off and begun again."""
    model, tokenizer = loaded
    config = EvaluationEngineConfig(**limits, cache_tokens=CONTEXT)
    asker = Asker(Engine(model, tokenizer, config), AnswerCache(Path(":memory:"), ""))
    requests = [Continuation(prompt, answer) for prompt in prompts for answer in answers]
    asked = [Text(prompt + "x") for prompt in prompts]
    found = asker.ask([*requests, *asked])
    for request, answer in zip(requests, found, strict=False):
        kept = request.prompt.rstrip()
        before = [tokenizer.bos_id, *tokenizer.encode(kept)]
        ids = [tokenizer.bos_id, *tokenizer.encode(request.prompt + request.text)]
        cut = max(len(ids) - CONTEXT - 1, 0)
        expected = forward_once(model, ids[cut:], len(before) - cut)
        assert answer.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
        assert (answer.greedy, answer.num_tokens) == (expected.greedy, expected.num_tokens)
        assert answer.num_truncated == cut
    for text, answer in zip(asked, found[len(requests) :], strict=True):
        ids = [tokenizer.bos_id, *tokenizer.encode(text.text)]
        windows = [forward_once(model, [*w.ids, w.next], w.first) for w in rolling_windows(ids, CONTEXT, CONTEXT)]
        assert answer.log_likelihood == pytest.approx(sum(w.log_likelihood for w in windows), abs=1e-4)
        assert answer.num_tokens == len(ids) - 1


@given(length=st.integers(2, 60), context=st.integers(1, 20), data=st.data())
def test_windows_are_those_of_lm_eval_and_predict_each_token_once(length: int, context: int, data: Any) -> None:
    stride = data.draw(st.integers(1, context))
    ids = list(range(length))
    windows = rolling_windows(ids, context, stride)
    assert [i for w in windows for i in [*w.ids, w.next][w.first :]] == ids[1:]
    assert all(1 <= w.first <= len(w.ids) <= context for w in windows)
    theirs = pytest.importorskip("lm_eval.utils").get_rolling_token_windows(ids[1:], 0, context, context - stride + 1)
    assert [([*w.ids], [*w.ids, w.next][-w.num_scored :]) for w in windows] == list(theirs)


def test_answers_that_begin_alike_are_computed_together(model, open_asker):
    asker = open_asker(model, max_context=1024)
    computed = 0
    run = asker.engine._runner.run

    def counting(plan: dict[Any, int]) -> Any:
        nonlocal computed
        computed += sum(plan.values())
        return run(plan)

    asker.engine._runner.run = counting
    prompt = "the llama walks " * 20 + "to"
    length = len(asker.engine.encode(prompt))
    asker.ask([Continuation(prompt, f" {letter}") for letter in "abcd"])
    block = asker.engine.pool.block_size
    assert length <= computed <= length + 4 * (2 + block)


class Killed(Exception):
    pass


def test_a_run_that_was_killed_ends_with_the_same_bits(model, open_asker, monkeypatch, tmp_path):
    monkeypatch.setattr("puna.evaluate.harness.ask._SLAB_WINDOWS", 4)
    requests = [Continuation(f"the llama number {n} walks", f" to {end}") for n in range(6) for end in ("a", "Peru")]
    requests.append(Generation("the llama", max_tokens=5, temperature=1.0, seed=3))
    whole = open_asker(model).ask(requests)
    dying = open_asker(model, tmp_path / "kept")
    puts = 0
    put = dying._cache.put

    def put_or_die(answers: Any) -> None:
        nonlocal puts
        puts += 1
        if puts == 3:
            raise Killed
        put(answers)

    monkeypatch.setattr(dying._cache, "put", put_or_die)
    with pytest.raises(Killed):
        dying.ask(requests)
    again = open_asker(model, tmp_path / "kept")
    asked = []
    generate = again.engine.generate
    again.engine.generate = lambda prompts, *rest, **more: asked.extend(prompts) or generate(prompts, *rest, **more)
    assert again.ask(requests) == whole
    assert 0 < len(asked) == len({(r.prompt, r.text) for r in requests[:-1]}) - 8 + 1
    asked.clear()
    assert again.ask(requests) == whole
    assert not asked


def test_another_model_is_asked_again(tmp_path):
    ours, theirs = (AnswerCache(tmp_path / "answers", model) for model in ("a", "b"))
    ours.put({ours.key("likelihood", [1], 1, 2): [-1.5, True]})
    assert ours.get([ours.key("likelihood", [1], 1, 2)]) == {ours.key("likelihood", [1], 1, 2): [-1.5, True]}
    assert theirs.get([theirs.key("likelihood", [1], 1, 2)]) == {}


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "answers").write_text("not a database, but long enough to be looked at" * 50)
    with pytest.raises(InputError, match="holds no answers"):
        AnswerCache(tmp_path / "answers", "a")


def test_prompts_are_cut_so_that_the_answer_has_room(loaded):
    encoder = Encoder(loaded[1], CONTEXT)
    ids, cut = encoder.prompt(Generation("the llama walks " * 40, max_tokens=8))
    assert len(ids) == CONTEXT - 8
    assert cut > 0
    with pytest.raises(InputError, match="may have 48 tokens"):
        encoder.prompt(Generation("the llama", max_tokens=CONTEXT))


def test_an_answer_that_cannot_be_scored_is_refused(loaded):
    encoder = Encoder(loaded[1], CONTEXT)
    with pytest.raises(InputError, match="adds no token"):
        encoder.encode([Continuation("the llama", "")])
    with pytest.raises(InputError, match="holds only 48"):
        encoder.encode([Continuation("the llama", " x" * 100)])
    with pytest.raises(InputError, match="stride is 49"):
        encoder.encode([Text("the llama", stride=49)])


def test_names_of_special_tokens_are_text_unless_asked_for(loaded):
    tokenizer = loaded[1]
    bos = next(iter(tokenizer.special_names().values()))
    plain, special = (
        Encoder(tokenizer, CONTEXT, read_special=read).prompt(Generation(bos, 1)) for read in (False, True)
    )
    assert special[0] == [tokenizer.bos_id] * 2
    assert len(plain[0]) > 2


def test_puna_as_a_model_of_lm_eval(make_model, lm_eval_model):
    """Everything that its tasks ask for, beside its own class, also where the context is too short."""
    directory = make_model(64)
    theirs = lm_eval_model(directory, add_bos_token=None)
    from lm_eval.api.registry import get_model

    from puna.evaluate.harness import lm_eval_model as module

    assert get_model("puna") is module.PunaLM
    ours = module.PunaLM.create_from_arg_string(
        f"pretrained={directory},num_threads=1", {"batch_size": 4, "device": "cpu"}
    )

    def instances(*args: tuple[Any, ...]) -> list[Any]:
        return [SimpleNamespace(args=each) for each in args]

    pairs = instances(
        ("the llama", " walks"), ("", "the llama"), ("the llama walks to a " * 20, " good city"), ("a ", "b")
    )
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for (log_likelihood, greedy), (other, other_greedy) in zip(ours.loglikelihood(pairs), expected, strict=True):
        assert (log_likelihood, greedy) == (pytest.approx(other, abs=1e-3), other_greedy)
    # lm-eval puts a BOS before the BOS that the tokenizer puts: without the latter, both predict the same tokens.
    theirs.add_bos_token = False
    texts = instances(("the llama walks to a good city in Peru " * 10,), ("x",))
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, abs=1e-3)
    theirs.add_bos_token = None
    greedy = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    asked = instances(("the llama walks", greedy), ("a good bad city", greedy))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    with pytest.raises(InputError, match="'num_beams'"):
        ours.generate_until(instances(("the llama", {**greedy, "num_beams": 2})))
    drawn = {"do_sample": True, "max_gen_toks": 8}
    assert len(set(ours.generate_until(instances(*[("the llama", drawn)] * 4)))) > 1
    chat = ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat == theirs.apply_chat_template([{"role": "user", "content": "Hi"}]).removeprefix("<|begin_of_text|>")
    assert ours._asker._encoder.prompt(Generation(chat, 1))[0] == theirs.tok_encode("<|begin_of_text|>" + chat)
