"""`puna pretrain`: a Llama from token shards, from random weights or going on from a model."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from puna.batches.mixture import MixedRows, MixtureConfig, open_mixture
from puna.batches.packing import EpochRows, PackedRows, Rows
from puna.batches.shards import TokenShards, shard_folders
from puna.config import to_plain
from puna.model.accounting import count_parameters
from puna.model.config import LlamaConfig
from puna.model.depths import Depths, depths_of, gate_layers
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.parallel.mesh import is_first_process, joined_processes
from puna.pretrain import layer_skip
from puna.pretrain.layer_skip import LayerSkip, SkipPlan
from puna.pretrain.objectives import (
    AnyObjective,
    CausalObjective,
    ObjectiveRows,
    add_pair_head,
    objective_loss,
    predicts_pairs,
    take_pair_head,
    with_mask_tokens,
)
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.train.config import TrainConfig
from puna.train.loop import fit
from puna.train.loss import Loss, causal_lm_loss
from puna.weights.load import load_model, read_config, resolve, save_model


@dataclass(frozen=True)
class MixtureOfDepths:
    """Layers that most tokens pass by, so that a token costs less (arXiv:2404.02258)."""

    every: int = 2
    """Gate every so many layers: 2 is the second, the fourth, ..., as in the paper."""
    capacity: float = 0.125
    """Share of a row's tokens that go through a gated layer."""

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.capacity <= 1:
            raise ValueError(
                f"mixture_of_depths.every ({self.every}) has to be at least 1, and capacity ({self.capacity}) above 0 "
                "and at most 1."
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a model on token shards, from random weights or from those of another model."""

    tokens: Path | None = None
    """Folder of token shards to train on (`puna tokenize` makes them)."""
    mixture: MixtureConfig | None = None
    """Several folders in proportions of your choice, in place of `tokens`."""
    tokenizer: Path | None = None
    """The tokenizer that made the shards; it becomes part of the model directory. Absent, that of `init_from`."""
    init_from: Path | None = None
    """Go on from the weights of this model, of any format that Puna reads. The schedule begins anew, with its warm-up;
    `puna extend` gives a model new tokens or a longer context before."""
    output: Path
    """Gets model/ (the finished model directory), checkpoints/, metrics.jsonl and tensorboard/."""
    held_out_tokens: Path | None = None
    """Folder of token shards to measure the loss on."""
    model: LlamaConfig = field(default_factory=LlamaConfig)
    """The architecture. `vocab_size` has to hold the tokenizer's vocabulary. With `init_from` it is that model's: leave
    it out."""
    objectives: tuple[AnyObjective, ...] = (CausalObjective(),)
    """What to learn. Several share the rows, each with its `share`; causal alone when absent."""
    layer_skip: LayerSkip | None = None
    """Train early layers to predict too, so that the model can draft for itself; not when absent."""
    mixture_of_depths: MixtureOfDepths | None = None
    """Layers that most tokens pass by; none when absent. A model with such layers keeps them with `init_from`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run."""

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.mixture is None):
            raise ValueError("Set either tokens, one folder of token shards, or mixture, several of them.")
        if self.init_from is None and self.tokenizer is None:
            raise ValueError("Set tokenizer, the one that made the token shards.")
        if self.init_from is not None and self.model != LlamaConfig():
            raise ValueError(f"With init_from the architecture is that of {self.init_from}; leave the table model out.")
        parallel = self.train.parallel
        if max(parallel.pipeline, parallel.tensor, parallel.context) > 1:
            for name in ("layer_skip", "mixture_of_depths"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} works with the layouts data and shard only. Set train.parallel.pipeline, tensor and "
                        "context to 1."
                    )
        if self.layer_skip is not None and self.mixture_of_depths is not None:
            raise ValueError("layer_skip and mixture_of_depths do not go together; leave one of them out.")
        if not self.objectives:
            raise ValueError("objectives is empty; leave it out for the causal objective, or name one.")


def main(config: PretrainConfig) -> None:
    """Train to the last step, going on from a checkpoint if there is one, and write the model directory."""
    with joined_processes(config.train.device):
        _pretrain(config)


def _pretrain(config: PretrainConfig) -> None:
    if config.init_from is not None:
        config = replace(config, init_from=resolve(config.init_from))
    shards_tokenizer = load_tokenizer(_tokenizer_path(config))
    tokenizer = with_mask_tokens(shards_tokenizer, config.objectives)
    architecture = config.model if config.init_from is None else read_config(config.init_from)
    if config.init_from is not None and config.tokenizer is not None:
        _check_tokenizer(config.init_from, {shards_tokenizer.hash, tokenizer.hash})
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"The tokenizer in {_tokenizer_path(config)} has {tokenizer.vocab_size:,} ids with the objectives' mask "
            f"tokens, but the model's vocab_size is only {architecture.vocab_size:,}. Raise model.vocab_size, to a "
            "multiple of 64 for speed; a model to go on from gets more with `puna extend`."
        )
    if config.train.row_length > architecture.context_length:
        raise InputError(
            f"train.row_length ({config.train.row_length:,}) is longer than the model's context_length "
            f"({architecture.context_length:,}). `puna extend` gives a trained model a longer one."
        )
    text = _rows(config, shards_tokenizer)
    held_out_text = None
    if config.held_out_tokens is not None:
        shards = TokenShards(config.held_out_tokens, shards_tokenizer.hash)
        held_out_text = PackedRows(shards, config.train.row_length, 0, "cut", tokenizer.pad_id)

    rows: Rows = text
    held_out: EpochRows | None = held_out_text
    loss: Loss = partial(causal_lm_loss, z_loss=config.train.z_loss)
    if config.layer_skip is not None or config.objectives != (CausalObjective(),):
        rows = ObjectiveRows(text, config.objectives, tokenizer, config.train.row_length, config.train.seed)
        if held_out_text is not None:
            held_out = ObjectiveRows(held_out_text, config.objectives, tokenizer, config.train.row_length, 0)
        loss = objective_loss(config.objectives, _skip_plan(config, architecture), config.train.z_loss)

    model = _initial_model(config, architecture)
    epochs = _epochs(text, config.train.steps * config.train.batch_rows)
    say(
        f"{count_parameters(architecture):,} parameters; "
        f"{config.train.steps * config.train.batch_rows * config.train.row_length:,} tokens to train on: "
        + ", ".join(f"{passes:.2f} passes over {name}" for name, passes in epochs.items())
    )
    paths = (*_folders(config), _tokenizer_path(config), *([] if config.init_from is None else [config.init_from]))
    inputs = {str(path): content_hash(path) for path in paths}
    run = to_plain(config) | {"inputs": inputs}
    result = fit(model, rows, loss, config.train, config.output, run, held_out)

    model.compute_dtype = None
    write_head = take_pair_head(model) if predicts_pairs(config.objectives) else None
    manifest = Manifest("pretrain", to_plain(config), inputs, asdict(result) | {"epochs": epochs})
    if is_first_process():
        save_model(model, config.output / "model", tokenizer=tokenizer, dtype=torch.float32, manifest=manifest)
        if write_head is not None:
            write_head(config.output / "model")
    say(f"Wrote {config.output / 'model'}")


def _tokenizer_path(config: PretrainConfig) -> Path:
    path = config.tokenizer or config.init_from
    assert path is not None
    return path


def _check_tokenizer(init_from: Path, hashes: Collection[str]) -> None:
    """Refuse a tokenizer that is not the one of the model to go on from, where that has one."""
    try:
        own = load_tokenizer(init_from).hash
    except InputError:
        return
    if own not in hashes:
        raise InputError(
            f"tokenizer is not the one in {init_from}, so its ids would mean other tokens than the model has learnt. "
            "Leave tokenizer out, and make the token shards with the model's own."
        )


def _skip_plan(config: PretrainConfig, architecture: LlamaConfig) -> SkipPlan | None:
    if config.layer_skip is None:
        return None
    train = config.train
    return SkipPlan(config.layer_skip, architecture.num_layers, train.steps, train.batch_rows, train.seed)


def _initial_model(config: PretrainConfig, architecture: LlamaConfig) -> Transformer:
    """Random weights, or those to go on from, in float32; with what the objectives need beside."""
    if config.init_from is None:
        model = Transformer(architecture)
        initialize(model, config.train.seed)
    else:
        model = load_model(config.init_from, dtype=torch.float32)
    if predicts_pairs(config.objectives):
        add_pair_head(model, config.train.seed, config.init_from)
    if config.mixture_of_depths is not None:
        _gate(model, config.mixture_of_depths, config.train.seed)
    if config.layer_skip is not None:
        layer_skip.install(model)
    return model


def _gate(model: Transformer, config: MixtureOfDepths, seed: int) -> None:
    if depths_of(model) is not None:
        raise InputError("The model to go on from has gated layers already; leave mixture_of_depths out.")
    layers = tuple(range(config.every - 1, len(model.layers), config.every))
    if not layers:
        raise InputError(
            f"mixture_of_depths.every is {config.every}, but the model has only {len(model.layers)} layers: none would "
            "be gated."
        )
    gate_layers(model, Depths(layers, config.capacity), derive_seed(seed, "mixture of depths"))


def _folders(config: PretrainConfig) -> list[Path]:
    """Every folder of token shards that is trained on."""
    if config.mixture is None:
        return [] if config.tokens is None else [config.tokens]
    return [folder for source in config.mixture.sources for folder in shard_folders(source.tokens).values()]


def _rows(config: PretrainConfig, tokenizer: Tokenizer) -> PackedRows | MixedRows:
    train = config.train
    if config.mixture is None:
        assert config.tokens is not None
        shards = TokenShards(config.tokens, tokenizer.hash)
        return PackedRows(shards, train.row_length, train.seed, "cut", tokenizer.pad_id)
    return open_mixture(
        config.mixture,
        tokenizer=tokenizer,
        row_length=train.row_length,
        seed=train.seed,
        steps=train.steps,
        batch_rows=train.batch_rows,
    )


def _epochs(rows: PackedRows | MixedRows, num_rows: int) -> dict[str, float]:
    """How often each source is gone over."""
    if isinstance(rows, MixedRows):
        return rows.epochs(num_rows)
    return {str(rows.shards.directory): num_rows / rows.rows_per_epoch}
