"""Rollouts and the whole job: what the engine draws is what the trainer learns from, and a killed run goes on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puna.align.reinforce import loop
from puna.align.reinforce.config import ReinforceConfig
from puna.align.reinforce.main import main as reinforce
from puna.align.reinforce.policy import policy_logprobs, reference_logprobs
from puna.align.reinforce.rollout import Rollout, prompts_of_rollout, read_prompts, roll_out
from puna.batches.packing import IGNORE
from puna.config import load_config
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.peft.apply import attach
from puna.peft.lora import LoRAConfig
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.train.metrics import read_metrics
from puna.weights.load import load_model

CPU = torch.device("cpu")
ROUNDING = 2e-5
"""Of a log-probability from float32 logits of a few units, computed in another order."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    herd = "the llama walks to a good city in Peru and sleeps while the herd of Lima eats hay " * 2
    write_jsonl(path, ({"prompt": f"{herd if n % 2 else ''}What is {n}?", "answer": str(n)} for n in range(6)))
    return path


def settings(base_model: Path, prompts: Path, output: Path, *more: str) -> ReinforceConfig:
    """Six steps of GRPO for answers with an "a" in them."""
    usual = [
        f"model={base_model}",
        f"prompts={prompts}",
        f"output={output}",
        'rewards=[{kind = "regex", pattern = "a"}]',
        "prompts_per_rollout=2",
        "sampling.max_tokens=6",
        "rows_at_once=8",
        "method.samples=4",
        "method.epochs=2",
        "method.kind=grpo",
        "train.steps=12",
        "train.batch_rows=8",
        "train.micro_batch_rows=4",
        "train.row_length=128",
        "train.device=cpu",
        "train.num_threads=1",
        "train.tensorboard=false",
        "train.checkpoint_every=4",
        "train.optimizer.learning_rate=3e-3",
        "train.schedule.warmup_steps=2",
    ]
    return load_config(ReinforceConfig, None, [*usual, *more])


def drawn(model: Transformer, base_model: Path, prompts: Path, rows: int, *, share: bool) -> Rollout:
    tokenizer = load_tokenizer(base_model)
    config = EngineConfig(max_rows=rows, max_context=128, prefix_cache=share, block_size=8)
    engine = Engine(model.eval(), tokenizer, config)
    return roll_out(engine, read_prompts(prompts, tokenizer, 120, ()), 3, SamplingParams(max_tokens=6), (0,))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 18])
def test_engine_and_trainer_agree_at_every_batch_size(base_model: Path, prompts: Path, rows: int, share: bool) -> None:
    model = load_model(base_model, dtype=torch.float32)
    rollout = drawn(model, base_model, prompts, rows, share=share)
    trainer_NL = policy_logprobs(model, rollout, rows, CPU)
    torch.testing.assert_close(rollout.logprobs_NL, trainer_NL, atol=ROUNDING, rtol=0)


def test_batches_hold_what_was_drawn(base_model: Path, prompts: Path) -> None:
    model = load_model(base_model, dtype=torch.float32)
    rollout = drawn(model, base_model, prompts, 8, share=True)
    values_NL = torch.arange(rollout.mask_NL.numel()).view(rollout.mask_NL.shape) * rollout.mask_NL
    chosen = [4, 0, 17]
    [batch] = rollout.batches(chosen, 3, CPU, {"advantages": values_NL})
    for place, number in enumerate(chosen):
        own = batch.documents_BT == place
        text = [*rollout.prompts[number].ids, *rollout.ids[number]]
        assert batch.ids_BT[own].tolist() == text[:-1]
        assert batch.positions_BT[own].tolist() == list(range(len(text) - 1))
        labels = batch.labels_BT[own]
        assert labels[labels != IGNORE].tolist() == list(rollout.ids[number])
        # Packed beside others or alone: the same log-probabilities.
        [alone] = rollout.batches([number], 1, CPU)
        assert alone.labels_BT[0].tolist() == labels.tolist()
        expected = values_NL[number][rollout.mask_NL[number]]
        assert batch.advantages_BT[own][labels != IGNORE].tolist() == expected.tolist()
    together = policy_logprobs(model, rollout, 18, CPU)
    torch.testing.assert_close(policy_logprobs(model, rollout, 1, CPU), together, atol=ROUNDING, rtol=0)


def test_reference_is_the_policy_without_adapters(base_model: Path, prompts: Path) -> None:
    model = load_model(base_model, dtype=torch.float32)
    rollout = drawn(model, base_model, prompts, 8, share=True)
    before = policy_logprobs(model, rollout, 8, CPU)
    attach(model, LoRAConfig(rank=2), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter)
    assert (policy_logprobs(model, rollout, 8, CPU) - before).abs().max() > 0.1
    assert torch.equal(reference_logprobs(model, None, rollout, 8, CPU), before)


def test_prompts_come_equally_often(base_model: Path, prompts: Path) -> None:
    own = read_prompts(prompts, load_tokenizer(base_model), 120, ())
    seen = [prompt.where for number in range(6) for prompt in prompts_of_rollout(own, number, 3, seed=0)]
    assert all(seen.count(prompt.where) == 3 for prompt in own)
    assert seen[:6] != seen[6:12], "every pass has an order of its own"


METHODS = {
    "grpo": (),
    "rloo": ("method.kind=rloo", "method.whiten_advantages=true"),
    "ppo": ("method.kind=ppo", "method.kl_target=1.0", "method.kl_horizon=50"),
    "lora": ("peft.kind=lora", "peft.rank=4"),
}


@pytest.mark.parametrize("name", METHODS)
def test_killed_run_goes_on_to_the_same_bits(
    name: str, base_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = METHODS[name]
    monkeypatch.setattr(loop, "write_dashboard", lambda *_: None)  # it takes longer than the training
    reinforce(settings(base_model, prompts, tmp_path / "whole", *more))
    draw, calls = loop.draw, iter(range(100))

    def dying(run: loop.Run, number: int, kl_weight: float) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return draw(run, number, kl_weight)

    monkeypatch.setattr(loop, "draw", dying)
    killed = settings(base_model, prompts, tmp_path / "killed", *more)
    with pytest.raises(KeyboardInterrupt):
        reinforce(killed)
    reinforce(killed)

    folder = "adapter" if name == "lora" else "model"
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    whole, again = (load_file(tmp_path / run / folder / file) for run in ("whole", "killed"))
    assert whole.keys() == again.keys()
    assert not any(key.startswith("critic") for key in whole)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    curves = [
        [{key: value for key, value in point.items() if not key.startswith("speed/")} for point in read_metrics(path)]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "killed/metrics.jsonl")
    ]
    assert json.dumps(curves[0]) == json.dumps(curves[1])


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_learns_and_reports(kind: str, base_model: Path, prompts: Path, tmp_path: Path) -> None:
    config = settings(
        base_model,
        prompts,
        tmp_path / "out",
        f"held_out_prompts={prompts}",
        f"method.kind={kind}",
        "method.epochs=1",
        "prompts_per_rollout=4",
        "alarms.most_divergence=10.0",
        "train.steps=24",
        "train.batch_rows=16",
        "train.checkpoint_every=0",
        "train.optimizer.learning_rate=1e-2",
    )
    reinforce(config)
    points = [point for point in read_metrics(config.output / "metrics.jsonl") if "reward/mean" in point]
    first, last = (sum(p["reward/mean"] for p in part) / len(part) for part in (points[:3], points[-3:]))
    assert last > first + 0.3
    assert points[0]["kl/token"] < 1e-6, "it begins at its reference"
    # One update a rollout: if the engine had missed one, it would have drawn from another model than was then trained.
    assert all(point["train/policy_divergence"] < 1e-6 for point in points)
    # A token's mean negative log-probability under the policy; a random model of 300 ids has about log 300.
    assert 0.5 * math.log(300) < points[0]["entropy"] < 1.1 * math.log(300)
    facts = Manifest.read(config.output / "model").results
    assert facts["engine_gap"] < ROUNDING
    assert facts["reference_gap"] == 0
    assert facts["validation_reward"] >= facts["validation_reward_before"]
    rows = list(read_jsonl(config.output / "answers.jsonl"))
    assert all(row["reward"] == ("a" in row["answer"]) for row in rows)
    page = (config.output / "dashboard.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "Stopped" not in page
    assert ("Critic" in page) == (kind == "ppo")


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "equal": (('rewards=[{kind = "regex", pattern = ""}]',), "All 8 rewards of the first rollout are 1"),
    "column": (('rewards=[{kind = "unit_tests"}]',), "line 1: there is no column 'tests'"),
    "long": (("sampling.max_tokens=120",), "only 8 leave room"),
    "prefix": (("peft.kind=prefix",), "no place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, base_model: Path, prompts: Path, tmp_path: Path) -> None:
    more, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        reinforce(settings(base_model, prompts, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("train.steps=7", "multiple of the 2 steps"),
        ("train.batch_rows=3", "multiple of train.batch_rows"),
        ("sampling.temperature=0.5", "drawn from the"),
        ("train.z_loss=0.1", "train.z_loss has no meaning"),
        ("train.log_every=3", "train.log_every has no meaning"),
        ("train.faults.check_every=3", "train.faults"),
        ("rewards=[]", "rewards is empty"),
        ("judge=some", "held_out_prompts"),
        ("sampling.max_tokens=128", "leave room"),
        ("train.parallel.tensor=2", "only data and shard"),
    ],
)
def test_refused_settings(more: str, message: str, base_model: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        settings(base_model, prompts, tmp_path, *(["train.micro_batch_rows=3"] if "batch" in more else []), more)


def test_stops_when_it_goes_wrong(
    base_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good model is kept: the one of the checkpoint before the divergence was too great."""
    diagnose: Callable[..., str] = loop.diagnose
    config = settings(
        base_model,
        prompts,
        tmp_path / "out",
        "train.steps=40",
        "alarms.most_divergence=0.02",
        "alarms.patience=2",
        "method.kl_weight=0.001",
        "train.optimizer.learning_rate=1e-2",
        "train.checkpoint_every=2",
    )
    shown = []
    monkeypatch.setattr(loop, "write_dashboard", lambda *seen: shown.append(seen))
    with pytest.raises(InputError, match="runs away from its reference") as error:
        reinforce(config)
    assert "is the model as it was after step" in str(error.value)
    points = read_metrics(config.output / "metrics.jsonl")
    kept = Manifest.read(config.output / "model").results
    assert 0 < kept["steps"] < points[-1]["step"] < 40
    assert diagnose(points, config.alarms)
    at_kept = next(point for point in points if point["step"] == kept["steps"])
    assert at_kept["kl/token"] <= 0.02
    complaints = [complaint for *_, complaint in shown]
    assert not any(complaints[:-1])
    assert "runs away" in complaints[-1]
