"""`puna reinforce`: teach a model by rewards for answers that it draws itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from puna.align.reinforce.config import ReinforceConfig
from puna.align.reinforce.loop import Run, reinforce
from puna.align.reinforce.methods import PPO
from puna.align.reinforce.policy import CRITIC, add_critic, learning_rates, open_reference
from puna.align.reinforce.preflight import preflight
from puna.align.reinforce.processes import bring_up_to_date, check_processes, whole_copy
from puna.align.reinforce.rewards import ModelReward, Scorer
from puna.align.reinforce.rollout import read_prompts
from puna.config import to_plain
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.parallel.mesh import (
    build_mesh,
    is_first_process,
    joined_processes,
    threads_of_each_process,
    wait_for_all,
)
from puna.peft.apply import virtual_tokens
from puna.peft.tuning import adapt, save_tuned
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.train.checkpoint import Checkpoints
from puna.train.checks import check_row_length, open_chat_tokenizer
from puna.train.loop import FREE_TO_CHANGE, prepare
from puna.train.metrics import read_metrics
from puna.train.optimizer import build_optimizers
from puna.train.state import TrainState
from puna.weights.load import load_model

__all__ = ["ReinforceConfig", "main"]


def main(config: ReinforceConfig) -> None:
    """Check everything, reinforce, and write the model or adapter directory.

    Raises:
        InputError: something does not fit; or it went wrong, and the last good model is written.
    """
    with joined_processes(config.train.device):
        _main(config)


def _main(config: ReinforceConfig) -> None:
    train = config.train
    device = open_device(train.device, train.num_threads or threads_of_each_process())
    mesh = build_mesh(train.parallel, device)
    check_processes(config, mesh.num_processes)
    tokenizer = open_chat_tokenizer(config.model, config.chat_template)
    model = load_model(config.model, dtype=torch.float32)
    check_row_length(train, model)
    training = adapt(model, config.peft, train.steps, train.seed)
    if config.peft is not None and virtual_tokens(model):
        raise InputError(
            f"Answers are drawn with a cache, in which the virtual tokens of {config.peft.kind} have no place. Take a "
            "method that adapts weights, such as lora."
        )
    if isinstance(config.method, PPO):
        add_critic(model, config.method.critic, config.model, tokenizer)
    reference = open_reference(model, config.model, config.reference) if config.needs_reference else None
    columns = [name for reward in config.rewards for name in reward.columns]
    longest = train.row_length - (config.sampling.max_tokens or 0)
    prompts = read_prompts(config.prompts, tokenizer, longest, columns)
    held_out = []
    if config.held_out_prompts is not None:
        held_out = read_prompts(config.held_out_prompts, tokenizer, longest, columns)
    policy = whole_copy(model, mesh, device)
    layout = prepare(model, train, device, mesh)
    policy.compute_dtype = model.compute_dtype
    if reference is not None:
        reference.to(device).eval()
        reference.compute_dtype = model.compute_dtype
    rates = learning_rates(model, config.method, training.rates)
    state = TrainState(model, build_optimizers(model, train.optimizer, rates), layout=layout)
    state.after_update = training.after_update
    policy.eval()
    run = Run(
        config=config,
        state=state,
        policy=policy,
        reference=reference,
        engine=Engine(
            policy,
            tokenizer,
            EngineConfig(max_rows=config.rows_at_once, max_context=train.row_length, step_tokens=2048),
        ),
        scorer=Scorer(config.rewards, device, config.unfinished_reward),
        judge=None if config.judge is None else Scorer([ModelReward(path=config.judge)], device, None),
        prompts=prompts,
        held_out=held_out,
        penalty=training.penalty,
        device=device,
    )
    paths = [config.model, config.prompts, config.held_out_prompts, config.held_out_preferences, config.reference]
    paths += [config.judge, *(path for reward in config.rewards for path in reward.paths)]
    if isinstance(config.method, PPO):
        paths.append(config.method.critic)
    inputs = {str(path): content_hash(path) for path in paths if path is not None}
    plain = to_plain(config)
    defining = plain | {"inputs": inputs}
    defining["train"] = {name: value for name, value in plain["train"].items() if name not in FREE_TO_CHANGE}
    facts: dict[str, Any] = {}
    with Checkpoints(config.output / "checkpoints", defining, train.keep_checkpoints) as checkpoints:
        if checkpoints.restore(state):
            say(f"Going on from step {state.step:,} of {train.steps:,}.")
        else:
            facts |= preflight(run)
        complaint = reinforce(run, plain, checkpoints)
        if failure := checkpoints.finish():
            raise InputError(
                f"The last checkpoint could not be written ({failure}). Make room; the same command goes on."
            )
    if complaint and not state.step:
        raise InputError(
            f"Stopped before there was a good checkpoint. {complaint} Nothing was written but "
            f"{config.output / 'dashboard.html'}."
        )
    wait_for_all()
    bring_up_to_date(policy, model)
    if isinstance(config.method, PPO):
        delattr(policy, CRITIC)
    policy.compute_dtype = None
    points = read_metrics(config.output / "metrics.jsonl")
    facts |= {"steps": state.step, "stopped": complaint} | _measured(points, state.step)
    written = config.output
    if is_first_process():
        written = save_tuned(
            policy,
            config.peft,
            config.output,
            base_model=config.model,
            tokenizer=tokenizer,
            dtype=config.dtype,
            manifest=Manifest("reinforce", plain, inputs, facts),
        )
    if complaint:
        raise InputError(
            f"Stopped after step {points[-1]['step']:,}. {complaint} {written} is the model as it was after step "
            f"{state.step:,}, before that began. See {config.output / 'dashboard.html'}."
        )


def _measured(points: Sequence[Mapping[str, float]], step: int) -> dict[str, float]:
    """What was measured last up to a step, and the rewards on held-out prompts before anything was learnt."""
    kept = [point for point in points if point["step"] <= step]
    last = {name.replace("/", "_"): value for point in kept for name, value in point.items() if name != "step"}
    if kept and "validation/reward" in kept[0]:
        last["validation_reward_before"] = kept[0]["validation/reward"]
    return last
