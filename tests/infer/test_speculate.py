"""Speculative decoding: the same tokens, the same distribution, only in fewer steps."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.engine import Engine
from puna.infer.load import load_engine
from puna.infer.request import Completion
from puna.infer.sampling import Sampler, SamplingParams
from puna.infer.speculate import Speculator
from puna.infer.speculate_draft import Draft, revise
from puna.infer.speculate_lookup import Lookup, continued
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.peft.apply import adapted_maps, attach
from puna.peft.files import save_adapter
from puna.peft.lora import LoRAConfig
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer
from puna.weights.load import save_model

CONTEXT = 96
NO_FILE = Path("given as an object")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def guesser(model: Transformer) -> Transformer:
    """Like the model, but for noise, so that some of its guesses are right."""
    noisy = Transformer(model.config)
    noisy.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += torch.randn_like(weight) * weight.std() * 0.1
    return noisy.eval()


def speculating(
    model: Transformer, tokenizer: Tokenizer, guesser: Transformer, config: EngineConfig, kind: str, tokens: int
) -> Engine:
    more = {"lookup": {"shortest_match": 1}, "model": {"model": NO_FILE}, "layers": {"layers": 1}}[kind]
    speculation = SpeculationConfig(kind, tokens, **more)  # type: ignore[arg-type]
    return Engine(model, tokenizer, replace(config, speculation=speculation), guesser=guesser)


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    params: SamplingParams
    arrival: int
    cancelled_after: int | None


asks = st.builds(
    Ask,
    # Few different tokens, so that texts begin alike and repeat themselves.
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=50),
    params=st.builds(
        SamplingParams,
        max_tokens=st.integers(0, 30),
        temperature=st.sampled_from((0.0, 0.0, 0.5, 1.0)),
        top_k=st.sampled_from((0, 4)),
        top_p=st.sampled_from((1.0, 0.9)),
        min_p=st.sampled_from((0.0, 0.05)),
        repetition_penalty=st.sampled_from((1.0, 1.0, 1.2)),
        frequency_penalty=st.sampled_from((0.0, 0.0, 1.0)),
        presence_penalty=st.sampled_from((0.0, 0.0, 0.5)),
        logit_bias=st.sampled_from(((), ((7, 5.0), (8, -3.0)))),
        seed=st.integers(0, 5),
        stop=st.sampled_from(((), (), ("\x07\x07",))),
        stop_ids=st.sampled_from(((), (), (9, 10))),
        ignore_eos=st.just(True),
        logprobs=st.sampled_from((None, 2, 2)),
        prompt_logprobs=st.sampled_from((None, None, 1)),
    ),
    arrival=st.integers(0, 6),
    cancelled_after=st.sampled_from((None, None, None, 3)),
)
configs = st.builds(
    EngineConfig,
    max_rows=st.integers(1, 4),
    max_context=st.just(CONTEXT),
    step_tokens=st.sampled_from((4, 16, 64)),
    block_size=st.sampled_from((1, 4, 16)),
    cache_tokens=st.sampled_from((CONTEXT, CONTEXT + 40, 400)),
    overcommit=st.sampled_from((1.0, 4.0)),
    prefix_cache=st.booleans(),
)


def serve(engine: Engine, schedule: list[Ask]) -> list[Completion]:
    """Every request at its time."""
    requests = {}
    for time in range(3000):
        for number, ask in enumerate(schedule):
            if ask.arrival == time:
                requests[number] = engine.submit(ask.prompt, ask.params)
            if number in requests and ask.cancelled_after == time - ask.arrival:
                engine.cancel(requests[number])
        engine.step()
        engine.scheduler.check_integrity()
        if engine.idle and len(requests) == len(schedule):
            break
    assert engine.idle
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    return [requests[number].completion() for number in range(len(schedule))]


@pytest.mark.parametrize("kind", ["lookup", "model", "layers"])
@settings(max_examples=12, deadline=None)
@given(config=configs, schedule=st.lists(asks, min_size=1, max_size=5), tokens=st.integers(1, 7), twice=st.booleans())
def test_greedy_and_seeded_answers_are_those_without_speculation(
    model: Transformer,
    tokenizer: Tokenizer,
    guesser: Transformer,
    kind: str,
    config: EngineConfig,
    schedule: list[Ask],
    tokens: int,
    twice: bool,
) -> None:
    """Token by token, for every number of guesses, batch, piece and block size, preemption, cancellation and shared
    prefix; and log-probabilities are the training forward's. 4e-5: float32 rounding, four times as much as usual since
    this model's logits are; tests/parity has the bound for a usual one."""
    engine = speculating(model, tokenizer, guesser, config, kind, tokens)
    if twice:
        serve(engine, schedule)  # so that the cache is warm, and holds what was accepted
    plain = Engine(model, tokenizer, EngineConfig(max_rows=1, max_context=CONTEXT))
    for ask, got in zip(schedule, serve(engine, schedule), strict=True):
        [expected] = plain.generate([ask.prompt], ask.params)
        if got.finish_reason == "cancelled":
            assert got.ids == expected.ids[: len(got.ids)]
        else:
            assert (got.ids, got.text) == (expected.ids, expected.text)
            assert got.finish_reason == expected.finish_reason
        ids = [*ask.prompt, *got.ids]
        with torch.inference_mode():
            exact_TV = model(torch.tensor([ids]))[0].log_softmax(-1)
        assert [entry.id for entry in got.logprobs] == ([] if ask.params.logprobs is None else list(got.ids))
        for position, entry in enumerate(got.logprobs, start=len(ask.prompt) - 1):
            assert entry.logprob == pytest.approx(exact_TV[position, entry.id].item(), abs=4e-5)
            assert [logprob for _, logprob in entry.top] == pytest.approx(
                exact_TV[position].topk(2)[0].tolist(), abs=4e-5
            )


@torch.inference_mode()
def exact_distribution(
    model: Transformer, prompt: list[int], params: SamplingParams, num_tokens: int
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `num_tokens` tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    sampler = Sampler([params], torch.device("cpu"))
    for _ in range(num_tokens):
        longer = {}
        for ids, probability in found.items():
            p_V = sampler.filter(model(torch.tensor([[*prompt, *ids]]))[0, -1:]).softmax(-1)[0].double()
            longer |= {(*ids, int(i)): probability * float(p_V[i]) for i in p_V.nonzero().flatten()}
        found = longer
    return found


def chi_squared(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; continuations expected less than 5 times count as one."""
    assert set(counts) <= set(exact)
    total = counts.total()
    pairs = [(counts[ids], total * p) for ids, p in exact.items() if total * p >= 5]
    rare = [(counts[ids], total * p) for ids, p in exact.items() if total * p < 5]
    if rare:
        pairs.append((sum(got for got, _ in rare), sum(expected for _, expected in rare)))
    return sum((got - expected) ** 2 / expected for got, expected in pairs), len(pairs) - 1


def sample_continuations(
    engine: Engine, params: SamplingParams, prompt: list[int], count: int
) -> Counter[tuple[int, ...]]:
    requests = []
    for number in range(count):
        requests.append(engine.submit(prompt, params))
        requests[-1]._random = random.Random(number)  # unseeded, but the same in every run
    while not engine.idle:
        engine.step()
    return Counter(tuple(request.ids[:3]) for request in requests)


@pytest.mark.parametrize("kind", ["lookup", "model", "layers"])
def test_answers_without_a_seed_have_the_right_distribution(
    model: Transformer, tokenizer: Tokenizer, guesser: Transformer, kind: str
) -> None:
    """2,000 samples of three tokens at temperature 1 with top-p (and top-k, which makes them countable).

    The bound is the chi-squared distribution's mean and five standard deviations, beyond its 99.99 % quantile.
    """
    params = SamplingParams(temperature=1, top_k=4, top_p=0.95, max_tokens=4, ignore_eos=True)
    prompt = [5, 6, 5, 7, 5, 6, 5]
    exact = exact_distribution(model, prompt, params, 3)
    engine = speculating(model, tokenizer, guesser, EngineConfig(max_rows=250, max_context=16), kind, 3)
    counts = sample_continuations(engine, params, prompt, 2000)
    assert engine.speculator is not None
    assert 0.02 < engine.speculator.num_accepted / engine.speculator.num_proposed < 0.98
    statistic, freedom = chi_squared(counts, exact)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_the_distribution_test_sees_a_wrong_rule(
    model: Transformer, tokenizer: Tokenizer, guesser: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn after a refusal comes from all of p here, not from its rest."""

    def careless(p_RV: Tensor, guesses: list[int], q_KW: Tensor, chance: object) -> None:
        for p_V, q_W, guess in zip(p_RV, q_KW, guesses, strict=False):
            if random.random() * q_W[guess] >= p_V[guess]:
                return
            p_V.zero_()
            p_V[guess] = 1

    monkeypatch.setattr("puna.infer.speculate.revise", careless)
    params = SamplingParams(temperature=1, top_k=4, top_p=0.95, max_tokens=4, ignore_eos=True)
    prompt = [5, 6, 5, 7, 5, 6, 5]
    engine = speculating(model, tokenizer, guesser, EngineConfig(max_rows=250, max_context=16), "layers", 3)
    counts = sample_continuations(engine, params, prompt, 2000)
    statistic, freedom = chi_squared(counts, exact_distribution(model, prompt, params, 3))
    assert statistic > freedom + 5 * (2 * freedom) ** 0.5


weights = st.lists(st.sampled_from((0.0, 0.1, 0.5, 1.0, 3.0)), min_size=4, max_size=4).filter(any)


@given(p=weights, q=weights, width=st.integers(2, 4))
def test_acceptance_and_rest_add_up_to_the_models_distribution(p: list[float], q: list[float], width: int) -> None:
    """Summed over all guesses and both outcomes, weighted by their probabilities: exactly p."""
    p_V = torch.tensor(p, dtype=torch.float64)
    p_V /= p_V.sum()
    q_W = torch.tensor(q[:width], dtype=torch.float64)
    if not q_W.any():
        return
    q_W /= q_W.sum()
    total_V = torch.zeros(4, dtype=torch.float64)
    for guess in q_W.nonzero().flatten().tolist():
        accepting = min(1.0, float(p_V[guess] / q_W[guess]))
        below, above = accepting - 1e-9, accepting + 1e-9
        outcomes = []
        for chance in (below, above):
            rows_RV = torch.stack([p_V, p_V])
            revise(rows_RV, [guess], q_W[None], lambda chance=chance: chance)  # type: ignore[misc]
            outcomes.append(rows_RV[0] / rows_RV[0].sum())
            assert rows_RV[1].equal(p_V)
        if below >= 0:
            assert outcomes[0].tolist() == [float(i == guess) for i in range(4)]
            total_V += q_W[guess] * accepting * outcomes[0]
        if above < 1:
            assert outcomes[1][guess] == 0
            total_V += q_W[guess] * (1 - accepting) * outcomes[1]
    torch.testing.assert_close(total_V, p_V, atol=1e-8, rtol=0)


def naive_lookup(tokens: list[int], shortest: int, longest: int) -> int | None:
    for size in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == tokens[-size:]:
                return end
    return None


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=5),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    count=st.integers(1, 9),
)
def test_lookup_finds_what_a_search_finds(
    model: Transformer, tokenizer: Tokenizer, pieces: list[list[int]], sizes: tuple[int, int], count: int
) -> None:
    """However the text grows."""
    shortest, longest = min(sizes), max(sizes)
    lookup = Lookup(shortest, longest)
    engine = Engine(model, tokenizer, EngineConfig(max_rows=1))
    request = engine.submit(pieces[0], GREEDY)
    for piece in [[], *pieces[1:]]:
        request.tokens += piece
        [draft] = lookup.propose([request], [count])
        follows = naive_lookup(request.tokens, shortest, longest)
        if follows is None:
            assert draft == Draft([])
        else:
            text = list(request.tokens)
            for i in range(count):
                text.append(text[follows + i])
            assert draft == Draft(text[len(request.tokens) :])
    assert continued([1, 2, 3], 1, 5) == [2, 3, 2, 3, 2]


def test_right_guesses_save_steps_and_are_counted(model: Transformer, tokenizer: Tokenizer) -> None:
    """The model guesses for itself: everything is right, and 24 tokens take 5 steps, the first without guesses."""
    engine = speculating(model, tokenizer, model, EngineConfig(max_rows=2, max_context=CONTEXT), "model", 5)
    requests = [engine.submit(prompt, GREEDY) for prompt in ([1, 2, 3], [4])]
    num_steps = 0
    while not engine.idle:
        engine.step()
        num_steps += 1
    assert num_steps == 5
    assert all(len(request.ids) == 24 for request in requests)
    assert engine.speculator is not None
    # Of 24 tokens, the first and one a step are the model's own.
    assert engine.speculator.num_accepted == engine.speculator.num_proposed == 2 * 19


def test_hopeless_guessing_is_given_up(reciting: object, tokenizer: Tokenizer, model: Transformer) -> None:
    """A guesser that is always wrong is asked for fewer than one token in ten."""

    class Wrong:
        def propose(self, requests: list[object], counts: list[int]) -> list[Draft]:
            return [Draft([11] * count) for count in counts]

        def forget(self, request: object) -> None:
            pass

    engine = Engine(model, tokenizer, EngineConfig(max_rows=1, max_context=256))
    engine.speculator = Speculator(Wrong(), 8)  # type: ignore[arg-type]
    [done] = engine.generate([[1]], replace(GREEDY, max_tokens=250, logit_bias=((11, -100.0),)))
    assert len(done.ids) == 250
    assert engine.speculator.num_accepted == 0
    assert 8 <= engine.speculator.num_proposed < 25


def test_constrained_answers_are_left_alone(model: Transformer, tokenizer: Tokenizer, guesser: Transformer) -> None:
    constrain = pytest.importorskip("puna.infer.constrain")
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=0, constraint=constrain.Constraint(regex="(ab){20}"), max_tokens=60)
    engine = speculating(model, tokenizer, guesser, EngineConfig(max_context=CONTEXT), "lookup", 4)
    [done] = engine.generate([[1, 2, 3]], params)
    assert done.text == "ab" * 20
    assert engine.speculator is not None
    assert engine.speculator.num_proposed == 0


def test_a_smaller_model_is_loaded_beside(
    model: Transformer, model_directory: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small = Transformer(replace(model.config, num_layers=1, context_length=40, vocab_size=264))
    initialize(small, seed=3)
    save_model(small, tmp_path / "small", tokenizer=tokenizer)
    config = EngineConfig(device="cpu", num_threads=1, speculation=SpeculationConfig("model", model=tmp_path / "small"))
    engine = load_engine(model_directory, config)
    plain = Engine(model, tokenizer)
    prompts = [[1, 2, 3], [4] * 70]  # the second is longer than the smaller model reads
    params = replace(GREEDY, max_tokens=50)
    assert [one.ids for one in engine.generate(prompts, params)] == [one.ids for one in plain.generate(prompts, params)]
    assert engine.speculator is not None
    assert engine.speculator.num_proposed > 0

    other = TiktokenTokenizer({bytes([255 - i]): i for i in range(256)}, "llama3", tokenizer.special_tokens)
    save_model(small, tmp_path / "foreign", tokenizer=other)
    with pytest.raises(InputError, match=r"foreign cannot guess for .*tiny: their tokenizers differ"):
        load_engine(
            model_directory, replace(config, speculation=SpeculationConfig("model", model=tmp_path / "foreign"))
        )


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"kind": "model"}, r'kind = "model" needs speculation.model'),
        ({"kind": "layers"}, r'kind = "layers" needs speculation.layers'),
        ({"kind": "lookup", "layers": 1}, r'speculation.layers is for kind = "layers", but kind is "lookup"'),
        ({"longest_match": 3}, r'longest_match is for kind = "lookup", but kind is "none"'),
        ({"kind": "lookup", "tokens": 0}, r"speculation.tokens is 0; it has to be at least 1"),
        ({"kind": "lookup", "shortest_match": 0}, r"shortest_match is 0 and longest_match 4"),
        ({"kind": "lookup", "shortest_match": 5, "longest_match": 3}, r"shortest_match is 5 and longest_match 3"),
    ],
)
def test_settings_that_make_no_sense(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpeculationConfig(**settings_)  # type: ignore[arg-type]


def test_what_does_not_go_together(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="batch_invariant does not go with speculation"):
        EngineConfig(batch_invariant=True, speculation=SpeculationConfig("lookup"))
    with pytest.raises(InputError, match=r"speculation.layers is 2; .* less than the model's 2"):
        Engine(model, tokenizer, EngineConfig(speculation=SpeculationConfig("layers", layers=2)))
    with pytest.raises(InputError, match="has to be given one"):
        Engine(model, tokenizer, EngineConfig(speculation=SpeculationConfig("model", model=NO_FILE)))


def test_first_layers_guess_with_the_texts_own_adapter(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Mixed with the bare model; and what comes out is what comes out without guesses."""
    adapted, bare = (Transformer(model.config) for _ in range(2))
    for copy in (adapted, bare):
        copy.load_state_dict(model.state_dict())
    lora = LoRAConfig(rank=2, alpha=8)
    attach(adapted, lora, seed=0)
    for part in adapted_maps(adapted).values():
        part.lora_b.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    save_adapter(adapted, lora, tmp_path / "lora")
    prompts = [[1, 2, 3], [1, 2, 3], [7] * 9]
    params = [replace(GREEDY, adapter="lora"), GREEDY, replace(GREEDY, adapter="lora")]
    config = EngineConfig(max_rows=3, max_context=CONTEXT, adapters={"lora": tmp_path / "lora"})
    expected = Engine(bare, tokenizer, config).generate(prompts, params)
    assert expected[0].ids != expected[1].ids
    for kind in ("layers", "model"):
        engine = speculating(bare, tokenizer, model, config, kind, 3)
        assert [done.ids for done in engine.generate(prompts, params)] == [done.ids for done in expected]
        assert engine.speculator is not None
        assert engine.speculator.num_accepted > 0
