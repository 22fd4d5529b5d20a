"""`puna mix`: which mixture of sources teaches most? Tiny models, one for each candidate, ranked on held-out text.

All candidates train the same architecture, from the same weights, on the same number of tokens; only the proportions
differ. What ranks first at this size is a good guess at what ranks first when larger, and no more than that (Llama 3,
arXiv:2407.21783, section 3.1.2, chooses its mix by small models too).
"""

import shutil
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path

from puna.batches.mixture import MixedRows, MixtureConfig, MixtureSource, open_mixture, temperature_shares
from puna.batches.shards import TokenShards, shard_folders
from puna.config import to_plain
from puna.evaluate.likelihood import bits_per_byte, total_nats
from puna.model.accounting import count_parameters
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, read_jsonl, write_json
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.page import new_figure, to_svg, write_page
from puna.runtime.progress import duration, say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.train.config import TrainConfig
from puna.train.loop import fit
from puna.train.loss import causal_lm_loss


@dataclass(frozen=True)
class MixSource:
    """What candidates mix."""

    name: str
    """What candidates call it."""
    tokens: Path
    """Folder of token shards, or of several such folders, which come in proportion to their tokens."""


@dataclass(frozen=True)
class HeldOutSet:
    """What candidates are measured on."""

    name: str
    """What it is called in the ranking."""
    tokens: Path
    """Folder of token shards that is in no source."""
    weight: float = 1.0
    """In the mean over sets that candidates are ranked by; 0 only shows it."""


@dataclass(frozen=True)
class Candidate:
    """One mixture to try."""

    name: str
    """What it is called in the ranking."""
    proportions: dict[str, float] = field(default_factory=dict)
    """Source -> its share; only ratios matter. Empty: in proportion to tokens ** (1 / temperature)."""
    temperature: float = 1.0
    """Without proportions: 1 takes the sources by their sizes, larger values bring small ones up."""


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Train a tiny model on each candidate mixture and rank them on held-out text."""

    output: Path
    """Gets ranking.json, ranking.html, and candidates/."""
    tokenizer: Path
    """The tokenizer that made the shards."""
    sources: tuple[MixSource, ...]
    """What there is to mix."""
    held_out: tuple[HeldOutSet, ...]
    """What to measure on."""
    candidates: tuple[Candidate, ...]
    """The mixtures to try."""
    seeds: tuple[int, ...] = (0,)
    """Train each candidate once with each. The spread between seeds says which differences mean something."""
    max_epochs: float = 4.0
    """Refuse a candidate that goes over a source more often than this."""
    max_held_out_tokens: int = 100_000
    """Measure on at most about this many tokens of each set, from its beginning."""
    model: LlamaConfig = field(default_factory=LlamaConfig)
    """The architecture of every candidate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training of every candidate; its seed is replaced by those of `seeds`."""

    def __post_init__(self) -> None:
        for what, names in (
            ("sources", [source.name for source in self.sources]),
            ("held_out", [held_out.name for held_out in self.held_out]),
            ("candidates", [candidate.name for candidate in self.candidates]),
            ("seeds", [str(seed) for seed in self.seeds]),
        ):
            if not names:
                raise ValueError(f"{what} is empty; there has to be at least one.")
            if len(set(names)) < len(names):
                raise ValueError(f"Two of {what} have the same name ({', '.join(names)}).")
        known = {source.name for source in self.sources}
        for candidate in self.candidates:
            if strange := sorted(candidate.proportions.keys() - known):
                raise ValueError(
                    f"The candidate {candidate.name} mixes {', '.join(strange)}, but the sources are "
                    f"{', '.join(sorted(known))}."
                )
        if not sum(held_out.weight for held_out in self.held_out) > 0:
            raise ValueError("Some set of held_out needs a weight above 0.")


@dataclass(frozen=True)
class Trial:
    """A candidate trained with one seed."""

    bits_per_byte: dict[str, float]
    """By held-out set."""
    epochs: dict[str, float]
    """How often each source was gone over."""
    train_loss: float
    """At the end, in nats per token of its own mixture; not comparable between candidates."""
    seconds: float
    """Wall time."""


@dataclass(frozen=True)
class Ranked:
    """A candidate's place."""

    name: str
    proportions: dict[str, float]
    """Adding up to 1."""
    score: float
    """Weighted mean over sets of the bits per byte, mean over seeds; smaller is better."""
    spread: float | None
    """Standard deviation of the score between seeds; None with one seed."""
    bits_per_byte: dict[str, float]
    """By held-out set, mean over seeds."""
    epochs: dict[str, float]
    """How often each source was gone over."""


def main(config: MixConfig) -> None:
    """Train what is not trained yet, measure, rank, and write ranking.json and ranking.html."""
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size:,} ids, but model.vocab_size is {config.model.vocab_size:,}."
        )
    if tokenizer.bos_id is None:
        raise InputError("This tokenizer has no BOS token, so a document's first token cannot be predicted.")
    folders = [folder for source in config.sources for folder in shard_folders(source.tokens).values()]
    paths = [config.tokenizer, *folders, *(held_out.tokens for held_out in config.held_out)]
    inputs = {str(path): content_hash(path) for path in paths}
    held_out = {one.name: _documents(TokenShards(one.tokens, tokenizer.hash), config) for one in config.held_out}
    mixtures = {candidate.name: _mixture(candidate, config, tokenizer) for candidate in config.candidates}
    say(
        f"{len(mixtures)} candidates x {len(config.seeds)} seed(s): models of {count_parameters(config.model):,} "
        f"parameters, {config.train.steps * config.train.batch_rows * config.train.row_length:,} tokens each"
    )
    trials: dict[str, list[Trial]] = {name: [] for name in mixtures}
    for seed in config.seeds:
        for name, mixture in mixtures.items():
            folder = config.output / "candidates" / name / f"seed-{seed}"
            trials[name].append(_try(name, mixture, seed, folder, config, tokenizer, held_out, inputs))
    ranking = rank(trials, mixtures, {one.name: one.weight for one in config.held_out})
    write_json(config.output / "ranking.json", [asdict(row) for row in ranking])
    results = {"best": ranking[0].name, "bits_per_byte": ranking[0].score, "num_candidates": len(ranking)}
    manifest = Manifest("mix", to_plain(config), inputs, results)
    manifest.write(config.output)
    _write_page(config, ranking, manifest)
    for place, row in enumerate(ranking, start=1):
        spread = "" if row.spread is None else f" ± {row.spread:.4f}"
        shares = ", ".join(f"{share:.1%} {name}" for name, share in row.proportions.items())
        say(f"{place:>3}. {row.name:<20} {row.score:.4f}{spread} bits/byte   {shares}")
    say(f"Ranking: {config.output / 'ranking.html'}")


def rank(trials: dict[str, list[Trial]], mixtures: dict[str, MixtureConfig], weights: dict[str, float]) -> list[Ranked]:
    """Candidates by their weighted mean of bits per byte, best first; names decide ties."""
    ranked = []
    for name, rows in trials.items():
        scores = [
            sum(weight * row.bits_per_byte[held_out] for held_out, weight in weights.items()) / sum(weights.values())
            for row in rows
        ]
        total = sum(source.proportion for source in mixtures[name].sources)
        ranked.append(
            Ranked(
                name,
                {source.name: source.proportion / total for source in mixtures[name].sources},
                statistics.fmean(scores),
                statistics.stdev(scores) if len(scores) > 1 else None,
                {one: statistics.fmean(row.bits_per_byte[one] for row in rows) for one in weights},
                rows[0].epochs,
            )
        )
    return sorted(ranked, key=lambda row: (row.score, row.name))


def _mixture(candidate: Candidate, config: MixConfig, tokenizer: Tokenizer) -> MixtureConfig:
    """A candidate's mixture; opened once, so that a wrong one is found before anything is trained."""
    proportions = candidate.proportions
    if not proportions:
        sizes = [
            sum(TokenShards(folder).num_tokens for folder in shard_folders(source.tokens).values())
            for source in config.sources
        ]
        shares = temperature_shares(sizes, candidate.temperature)
        proportions = {source.name: share for source, share in zip(config.sources, shares, strict=True)}
    try:
        mixture = MixtureConfig(
            tuple(
                MixtureSource(source.name, source.tokens, proportions.get(source.name, 0.0))
                for source in config.sources
            ),
            max_epochs=config.max_epochs,
        )
        _open(mixture, config.train, tokenizer)
    except ValueError as error:
        raise InputError(f"Candidate {candidate.name}: {error}") from error
    return mixture


def _try(
    name: str,
    mixture: MixtureConfig,
    seed: int,
    folder: Path,
    config: MixConfig,
    tokenizer: Tokenizer,
    held_out: dict[str, "_HeldOut"],
    inputs: dict[str, str],
) -> Trial:
    """Train and measure one candidate, unless it has been; go on where it was interrupted."""
    train = replace(config.train, seed=seed)
    run = {
        "mixture": to_plain(mixture),
        "model": to_plain(config.model),
        "train": to_plain(train),
        "inputs": inputs,
        "held_out_tokens": config.max_held_out_tokens,
    }
    done, begun = folder / "trial.json", folder / "run.json"
    if begun.exists() and read_json(begun) != run:
        shutil.rmtree(folder)
    if done.exists():
        return Trial(**read_json(done))
    write_json(begun, run)
    say(f"Candidate {name}, seed {seed}")
    started = time.monotonic()
    rows = _open(mixture, train, tokenizer)
    model = Transformer(config.model)
    initialize(model, seed)
    result = fit(model, rows, causal_lm_loss, train, folder, run)
    model.eval()
    measured = {}
    for set_name, one in held_out.items():
        nats, _ = total_nats(
            model,
            [(ids, None) for ids in one.documents],
            window=config.train.row_length,
            title=f"Measuring on {set_name}",
        )
        measured[set_name] = bits_per_byte(nats, one.num_bytes)
    epochs = rows.epochs(train.steps * train.batch_rows)
    trial = Trial(measured, epochs, result.train_loss, time.monotonic() - started)
    write_json(done, asdict(trial))
    shutil.rmtree(folder / "checkpoints")
    say(f"Candidate {name}, seed {seed}: done in {duration(trial.seconds)}")
    return trial


@dataclass(frozen=True)
class _HeldOut:
    documents: list[list[int]]
    num_bytes: int


def _documents(shards: TokenShards, config: MixConfig) -> _HeldOut:
    """The first documents of a set, up to `max_held_out_tokens`, and the bytes of their texts."""
    count = max(1, int((shards.offsets <= config.max_held_out_tokens).sum()) - 1)
    facts = islice(read_jsonl(shards.directory / "documents.jsonl"), count)
    return _HeldOut([shards.ids(n).tolist() for n in range(count)], sum(row["bytes"] for row in facts))


def _open(mixture: MixtureConfig, train: TrainConfig, tokenizer: Tokenizer) -> MixedRows:
    return open_mixture(
        mixture,
        tokenizer=tokenizer,
        row_length=train.row_length,
        seed=train.seed,
        steps=train.steps,
        batch_rows=train.batch_rows,
    )


def _write_page(config: MixConfig, ranking: list[Ranked], manifest: Manifest) -> None:
    sets = [held_out.name for held_out in config.held_out]
    write_page(
        config.output / "ranking.html",
        files("puna.curate").joinpath("mix.html.jinja").read_text(encoding="utf-8"),
        title=f"Mixtures in {config.output.resolve().name}",
        created=manifest.created,
        ranking=ranking,
        sets=sets,
        weights={held_out.name: held_out.weight for held_out in config.held_out},
        best={name: min(row.bits_per_byte[name] for row in ranking) for name in sets},
        sources=[source.name for source in config.sources],
        seeds=config.seeds,
        parameters=count_parameters(config.model),
        tokens=config.train.steps * config.train.batch_rows * config.train.row_length,
        figure=_figure(ranking, sets),
    )


def _figure(ranking: list[Ranked], sets: list[str]) -> str | None:
    """Bits per byte of every candidate, best first: the score, and each set beside it."""
    try:
        figure = new_figure(9, 0.45 * len(ranking) + 1.2)
    except InputError as error:
        say(f"The page has no plot. {error}")
        return None
    axes = figure.subplots()
    names = [row.name for row in ranking]
    scores = [row.score for row in ranking]
    axes.barh(names, scores, xerr=[row.spread or 0 for row in ranking], color="lightgray", height=0.6, label="score")
    for name in sets:
        values = [row.bits_per_byte[name] for row in ranking]
        axes.plot(values, names, linestyle="", marker="o", markersize=5, label=name)
    everything = [*scores, *(value for row in ranking for value in row.bits_per_byte.values())]
    axes.set_xlim(left=0.95 * min(everything))
    axes.invert_yaxis()
    axes.set(xlabel="bits per byte of held-out text (smaller is better; the axis does not start at 0)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return to_svg(figure)
