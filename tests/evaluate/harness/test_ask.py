"""Requests through the engine beside one plain forward each, and what is kept of the answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.harness.ask import Asker
from puna.evaluate.harness.cache import AnswerCache
from puna.evaluate.harness.encode import Encoder, rolling_windows
from puna.evaluate.harness.engine import EvaluationEngineConfig
from puna.evaluate.tasks.request import Continuation, Generation, Likelihood, Text
from puna.infer.cache import KVPool, PagedAttend
from puna.infer.engine import Engine
from puna.infer.runner import hidden_states
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


@settings(max_examples=20)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
@torch.inference_mode()
def test_states_of_some_tokens_are_those_of_all(loaded: Any, counts: list[int], data: Any) -> None:
    """The last layer computes the rest for those alone; float32 products of other shapes differ by rounding."""
    model, _ = loaded
    num_tokens = sum(counts)
    wanted = sorted(data.draw(st.sets(st.integers(0, num_tokens - 1))))
    pool = KVPool(model.config, num_blocks=12, block_size=4, device=torch.device("cpu"), dtype=torch.float32)
    attend = PagedAttend(pool, np.arange(12).reshape(4, 3)[: len(counts)], [0] * len(counts), counts)
    ids_1N = torch.arange(num_tokens)[None] % 7
    every_1ND = model(ids_1N, attend.positions_1N, attend, lambda h, output: h)
    found_1WD = hidden_states(model, ids_1N, attend, wanted)
    torch.testing.assert_close(found_1WD, every_1ND[:, wanted], rtol=1e-5, atol=1e-5)


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
