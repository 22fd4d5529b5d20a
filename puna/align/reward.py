"""`puna reward`: a model that says how good an answer is, learnt from comparisons (arXiv:2307.09288, 3.2.2)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from puna.align.learn import PreferenceSource, check_processes, check_sources, learn, open_data, preference_paths
from puna.align.reward_loss import HEAD, reward_loss
from puna.align.reward_watch import RewardWatch
from puna.config import to_plain
from puna.parallel.mesh import is_first_process, joined_processes
from puna.peft.apply import merge, why_not_merged
from puna.peft.heads import add_head, save_head_adapter, save_head_model
from puna.peft.methods import AnyMethod
from puna.peft.tuning import adapt
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.train.checks import check_row_length, open_chat_tokenizer
from puna.train.config import TrainConfig
from puna.weights.load import load_model


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Teach a model to say how good an answer is, from comparisons of answers."""

    model: Path
    """Model directory to start from; one that has learnt to answer (`puna finetune`)."""
    output: Path
    """Gets model/ (which `transformers` loads as a sequence classifier with one label) or adapter/, report.txt,
    reliability.svg, tokens/, checkpoints/, metrics.jsonl and tensorboard/."""
    preferences: Path | None = None
    """A file of preferences, or a folder of such files, as `puna align` reads them."""
    mixture: tuple[PreferenceSource, ...] = ()
    """Several sources in proportions of your choice, such as helpfulness and safety, in place of `preferences`."""
    held_out_preferences: Path | None = None
    """Preferences to measure on."""
    margins: tuple[float, float, float, float] = (0.0, 1 / 3, 2 / 3, 1.0)
    """How much higher the better answer's reward should be, by the preference's strength: negligibly, slightly, plainly
    and significantly better (the paper's small margins, table 27). Preferences without a strength have the first."""
    center_weight: float = 0.0
    """Factor of the squared sum of a pair's rewards, which keeps rewards around zero (Eisenstein et al. 2023,
    arXiv:2312.09244, section 3.2: 0.01)."""
    chat_template: Literal["keep", "llama2", "llama3", "chatml"] = "keep"
    """The model's own chat template, or a built-in one whose special tokens its tokenizer has."""
    leave_out: bool = False
    """Leave out rows that cannot be used (broken, too long, without difference) and write them down, instead of
    refusing them."""
    peft: AnyMethod = None
    """Train by a method that leaves most parameters as they are; merged into model/ where that is possible."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the finished model directory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run. A row holds all answers to its prompts, each with the prompt."""

    def __post_init__(self) -> None:
        check_sources(self)
        if self.center_weight < 0:
            raise ValueError(f"center_weight is {self.center_weight}; it cannot be negative.")
        if list(self.margins) != sorted(self.margins) or self.margins[0] < 0:
            raise ValueError(f"margins are {self.margins}; they have to rise, from 0 at least.")


def main(config: RewardConfig) -> None:
    """Check the preferences, put the head on, train, and write the model directory."""
    with joined_processes(config.train.device):
        check_processes(config)
        _train(config)


def _train(config: RewardConfig) -> None:
    train = config.train
    tokenizer = open_chat_tokenizer(config.model, config.chat_template)
    model = load_model(config.model, dtype=torch.float32)
    check_row_length(train, model)
    data = open_data(config, model, tokenizer, judged=False, formatting=True)
    training = adapt(model, config.peft, train.steps, train.seed)
    add_head(model, HEAD, train.seed)
    loss = reward_loss(config.margins, config.center_weight)
    watch = None if data.held_out is None else RewardWatch(data.held_out, train.validation_rows)
    inputs = {str(path): content_hash(path) for path in (config.model, *preference_paths(config))}
    facts = learn(model, data, loss, config, inputs, training, watch)
    if not is_first_process():
        return
    if watch is not None and watch.latest is not None:
        watch.draw(config.output)
    manifest = Manifest("reward", to_plain(config), inputs, facts)
    if config.peft is not None and why_not_merged(model):
        written = config.output / "adapter"
        save_head_adapter(model, config.peft, HEAD, "causal", tokenizer, written, config.model, manifest)
    else:
        merge(model)
        written = config.output / "model"
        save_head_model(model, HEAD, "causal", tokenizer, written, getattr(torch, config.dtype), manifest)
    say(f"Wrote {written}")
