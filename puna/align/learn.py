"""The training on preferences, the same for reward models and for what is aligned without one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from puna.align.rows import open_rows
from puna.align.watch import HeldOutWatch
from puna.batches.mixture import Ingredient, MixedRows
from puna.batches.preference_rows import PreferenceRows
from puna.config import to_plain
from puna.model.depths import depths_of
from puna.model.transformer import Transformer
from puna.parallel.mesh import is_first_process
from puna.peft.method import Training, VirtualMethod
from puna.peft.methods import AnyMethod
from puna.runtime.errors import InputError
from puna.runtime.files import write_text
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.train.config import TrainConfig
from puna.train.loop import fit
from puna.train.loss import Loss, with_penalty


@dataclass(frozen=True, kw_only=True)
class PreferenceSource:
    """One ingredient of a mixture."""

    name: str
    """What it is called in reports."""
    preferences: Path
    """Preferences, as in `preferences` above."""
    weight: float = 1.0
    """Share of the rows; only the ratio to the other sources' matters."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"The weight of {self.name} is {self.weight}; it has to be above 0.")


class PreferenceConfig(Protocol):
    """The settings that both have."""

    @property
    def output(self) -> Path: ...
    @property
    def preferences(self) -> Path | None: ...
    @property
    def mixture(self) -> tuple[PreferenceSource, ...]: ...
    @property
    def held_out_preferences(self) -> Path | None: ...
    @property
    def leave_out(self) -> bool: ...
    @property
    def peft(self) -> AnyMethod: ...
    @property
    def train(self) -> TrainConfig: ...


def check_sources(config: PreferenceConfig) -> None:
    """Refuse settings that do not say what to learn from.

    Raises:
        ValueError: there are no preferences, or two settings for them; or two sources have the same name.
    """
    if (config.preferences is not None) == bool(config.mixture):
        raise ValueError("Set preferences or mixture, one of them: what is to be learnt from.")
    names = [source.name for source in config.mixture]
    if len(set(names)) < len(names):
        raise ValueError(f"Two sources of the mixture have the same name ({', '.join(names)}).")


def several_processes() -> bool:
    """Whether torchrun started more than this one."""
    return dist.is_initialized() and dist.get_world_size() > 1


def check_processes(config: PreferenceConfig) -> None:
    """Refuse what works on one process only.

    Raises:
        InputError: there are several, and the settings have something that does not.
    """
    parallel = config.train.parallel
    if several_processes() and (
        max(parallel.tensor, parallel.context, parallel.pipeline) > 1 or config.peft is not None
    ):
        raise InputError(
            "On several processes, preferences are learnt from with all parameters, and what processes share are rows "
            "(train.parallel.data) or parameters (train.parallel.shard): leave out peft, tensor, context and pipeline, "
            "or start the command without torchrun."
        )


def preference_paths(config: PreferenceConfig) -> list[Path]:
    """Every file or folder of preferences that is read."""
    paths = [config.preferences, *(source.preferences for source in config.mixture), config.held_out_preferences]
    return [path for path in paths if path is not None]


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """What is learnt from, and what is measured on."""

    rows: PreferenceRows | MixedRows
    """The training data."""
    sources: list[PreferenceRows]
    """The rows of each of its sources."""
    held_out: PreferenceRows | None
    """What is held out."""

    @property
    def all_rows(self) -> list[PreferenceRows]:
        """Those of all sources and those held out."""
        return self.sources + ([] if self.held_out is None else [self.held_out])


def open_data(
    config: PreferenceConfig, model: Transformer, tokenizer: Tokenizer, *, judged: bool, formatting: bool
) -> PreferenceData:
    """Read and render the preferences; see `open_rows`."""
    train = config.train
    # Virtual tokens and gated layers need documents that stand alone.
    share_prompts = not isinstance(config.peft, VirtualMethod) and depths_of(model) is None

    def opened(preferences: Path, name: str, seed: int) -> PreferenceRows:
        return open_rows(
            preferences,
            config.output / "tokens" / name,
            tokenizer=tokenizer,
            row_length=train.row_length,
            seed=seed,
            judged=judged,
            formatting=formatting,
            leave_out=config.leave_out,
            share_prompts=share_prompts,
        )

    rows: PreferenceRows | MixedRows
    if config.preferences is not None:
        rows = opened(config.preferences, "train", train.seed)
        sources = [rows]
    else:
        total = sum(source.weight for source in config.mixture)
        sources = [opened(source.preferences, f"train-{source.name}", train.seed) for source in config.mixture]
        ingredients = [
            Ingredient(source.name, own, source.weight / total, source.weight / total)
            for source, own in zip(config.mixture, sources, strict=True)
        ]
        rows = MixedRows(ingredients, annealing_start=0)
    held_out = None
    if config.held_out_preferences is not None:
        held_out = opened(config.held_out_preferences, "held_out", 0)
    num_rows = sum(own.rows_per_epoch for own in sources)
    say(
        f"{sum(own.num_groups for own in sources):,} prompts in {num_rows:,} rows; "
        f"{train.steps * train.batch_rows / num_rows:.2f} passes"
    )
    return PreferenceData(rows, sources, held_out)


def learn(
    model: Transformer,
    data: PreferenceData,
    loss: Loss,
    config: PreferenceConfig,
    inputs: Mapping[str, str],
    training: Training,
    watch: HeldOutWatch | None,
) -> dict[str, Any]:
    """Train `model` in place, and leave it for inference; writes report.txt where there is a watch.

    Of several processes the first has the whole model in the end, and writes.

    Args:
        inputs: content hashes of what the training follows from.
        training: what the method of `peft` asks for.

    Returns:
        What was measured, for the manifest.
    """
    if training.penalty is not None:
        loss = with_penalty(loss, training.penalty)
    run = to_plain(config) | {"inputs": dict(inputs)}
    extra: dict[str, Any] = {"rates": training.rates, "after_update": training.after_update}
    result = fit(model, data.rows, loss, config.train, config.output, run, data.held_out, watch, **extra)
    model.compute_dtype = None
    model.eval()
    facts: dict[str, Any] = asdict(result)
    # On several processes the model cannot be asked any more; but the last validation was at the end.
    if watch is not None and not several_processes():
        watch.latest = watch.of(model)
    if watch is not None and watch.latest is not None and is_first_process():
        measured, report = watch.latest
        facts |= measured
        write_text(config.output / "report.txt", report + "\n")
        say(report)
    return facts
