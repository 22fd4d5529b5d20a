"""`puna plan`: which layout to train a model in on a cluster, and how fast that will be."""

import json
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from puna.config import to_plain
from puna.model.accounting import count_parameters
from puna.model.config import LlamaConfig
from puna.model.presets import PRESETS, preset
from puna.parallel.config import ParallelConfig
from puna.pretrain.planner.cluster import Cluster, Efficiency
from puna.pretrain.planner.layout import Choices, Layout
from puna.pretrain.planner.memory import Numerics
from puna.pretrain.planner.search import Plan, Plans, search, weigh
from puna.runtime.errors import InputError
from puna.runtime.files import write_json
from puna.runtime.manifest import Manifest
from puna.runtime.page import new_figure, to_svg, write_page
from puna.runtime.progress import say
from puna.weights.load import read_config

_GIB = 2**30
_PAGE_ONLY = ("state", "gathered", "activations", "logits", "links", "sent GiB")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Weigh every sensible layout of a training run on a cluster."""

    model: str = ""
    """A published model such as llama-3.1-8b, or a checkpoint or config.json to read the architecture from."""
    architecture: LlamaConfig | None = None
    """The architecture itself, in place of `model`."""
    cluster: Cluster = field(default_factory=Cluster)
    """The machines."""
    batch_tokens: int = 4 * 2**20
    """Tokens of one optimiser step, over all GPUs."""
    row_length: int = 0
    """Tokens in a row; 0: 8192, or the model's context where that is shorter."""
    numerics: Numerics = field(default_factory=Numerics)
    """What the step computes with."""
    choices: Choices = field(default_factory=Choices)
    """Which layouts to look at."""
    layout: Layout | None = None
    """Weigh this one layout, whether or not it fits, in place of a search."""
    efficiency: Efficiency = field(default_factory=Efficiency)
    """Shares of the nominal figures that are reached; measure a run of yours and adapt them."""
    keep: int = 10
    """How many layouts to show."""
    output: Path | None = None
    """Gets plan.json and plan.html; nothing is written where absent."""

    def __post_init__(self) -> None:
        if bool(self.model) == (self.architecture is not None):
            raise ValueError(
                "Say which model to plan for: either model, such as llama-3.1-8b, or a table architecture."
            )
        for name in ("batch_tokens", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        if "alternate" in (*self.choices.checkpointing, self.layout and self.layout.checkpointing):
            raise ValueError('The checkpointing "alternate" is torchtitan\'s; Puna trains with "selective".')
        if self.row_length < 0:
            raise ValueError(f"row_length is {self.row_length}; it has to be positive, or 0 for the usual.")
        if self.numerics.precision == "float8" and not self.cluster.figures.float8_flops:
            raise ValueError("numerics.precision is float8, but this GPU has no float8 products.")


def main(config: PlanConfig) -> None:
    """Search, show a table, and write the page if asked to."""
    name, model = _model(config)
    row_length = config.row_length or min(8192, model.context_length)
    batch_rows, rest = divmod(config.batch_tokens, row_length)
    if rest or not batch_rows:
        raise InputError(
            f"batch_tokens ({config.batch_tokens:,}) has to be a multiple of row_length ({row_length:,}); "
            f"the nearest is {max(1, round(config.batch_tokens / row_length)) * row_length:,}."
        )
    plans = _plans(config, name, model, batch_rows, row_length)
    title = (
        f"{name}, {count_parameters(model):,} parameters, on {config.cluster.num_gpus:,} {config.cluster.gpu.upper()}: "
        f"{batch_rows:,} rows of {row_length:,} tokens a step"
    )
    shown = plans.best or (plans.smallest,)
    console = Console()
    console.print(title)
    console.print(_table(shown))
    limit = config.cluster.usable_memory * config.cluster.figures.memory_gib
    note = f"{plans.considered:,} layouts weighed, {plans.fitting:,} fit into {limit:.1f} GiB."
    if not plans.best:
        note += (
            f" None fits: shown is the one that needs least, {plans.smallest.memory.total / _GIB:.1f} GiB. Use more "
            "GPUs, shorter rows, or fewer bytes of optimiser state (numerics.optimizer_bytes)."
        )
    say(note)
    say(f"In a recipe, the first is train = {_recipe(shown[0].layout)}")
    if config.output is not None:
        _write(config, config.output, title, note, shown)


def _model(config: PlanConfig) -> tuple[str, LlamaConfig]:
    """What to call the model, and its architecture."""
    if config.architecture is not None:
        return "this architecture", config.architecture
    path = Path(config.model)
    if config.model in PRESETS or not path.exists():
        try:
            return config.model, preset(config.model)
        except ValueError as error:
            raise InputError(f"There is no checkpoint at {config.model}. {error}") from error
    return config.model, read_config(path.parent if path.name == "config.json" else path)


def _plans(config: PlanConfig, name: str, model: LlamaConfig, batch_rows: int, row_length: int) -> Plans:
    if config.layout is not None:
        _check(config.layout, config.cluster, model, batch_rows, row_length)
        plan = weigh(model, config.cluster, config.layout, config.numerics, config.efficiency, batch_rows, row_length)
        limit = config.cluster.usable_memory * config.cluster.figures.memory_gib * _GIB
        return Plans((plan,), plan, considered=1, fitting=int(plan.memory.total <= limit))
    plans = search(
        model,
        config.cluster,
        config.numerics,
        config.efficiency,
        batch_rows,
        row_length,
        config.choices,
        config.keep,
    )
    if plans is None:
        raise InputError(
            f"No layout among the choices spreads {name} and {batch_rows:,} rows evenly over "
            f"{config.cluster.num_gpus:,} GPUs. Tensor parallelism has to divide the {model.num_kv_heads} key/value "
            "heads, and the rows have to be a multiple of the data-parallel ranks: try a larger batch_tokens, or "
            "numbers of GPUs and rows that are powers of two."
        )
    return plans


def _check(layout: Layout, cluster: Cluster, model: LlamaConfig, batch_rows: int, row_length: int) -> None:
    """Raise InputError unless the layout divides everything evenly."""
    per_rank = layout.data * layout.micro_batch_rows
    problems = {
        f"it takes {layout.num_ranks:,} GPUs, but cluster.num_gpus is {cluster.num_gpus:,}": layout.num_ranks
        != cluster.num_gpus,
        f"layout.tensor ({layout.tensor}) does not divide the {model.num_kv_heads} key/value heads": model.num_kv_heads
        % layout.tensor,
        f"layout.pipeline ({layout.pipeline}) times pipeline_chunks ({layout.pipeline_chunks}) is more than the "
        f"{model.num_layers} layers": layout.pipeline * (layout.pipeline_chunks - 1) >= model.num_layers,
        f"layout.context ({layout.context}) does not divide rows of {row_length:,} tokens": row_length % layout.context,
        f"{batch_rows:,} rows are no multiple of shard * replicate * micro_batch_rows ({per_rank:,})": batch_rows
        % per_rank,
    }
    wrong = [problem for problem, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise InputError(f"This layout does not come out: {'; '.join(wrong)}.")


def _recipe(layout: Layout) -> str:
    """What `train` of a recipe has to hold to be laid out so, as an inline table of TOML."""
    chosen, usual = vars(layout.to_parallel()), vars(ParallelConfig())
    settings = {name: value for name, value in chosen.items() if value != usual[name] or name == "data"}
    parallel = ", ".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    return f"{{ micro_batch_rows = {layout.micro_batch_rows}, parallel = {{ {parallel} }} }}"


def _row(plan: Plan) -> dict[str, str]:
    """What tables show of a plan; speeds are those of one GPU."""
    layout, memory, seconds = plan.layout, plan.memory, plan.seconds
    visible = seconds.tensor + seconds.context + seconds.data
    return {
        "layout": str(layout),
        "rows": str(layout.micro_batch_rows),
        "recompute": layout.checkpointing,
        "GiB": f"{memory.total / _GIB:.1f}",
        "state": f"{(memory.parameters + memory.gradients + memory.optimizer) / _GIB:.1f}",
        "gathered": f"{memory.gathered / _GIB:.1f}",
        "activations": f"{memory.activations / _GIB:.1f}",
        "logits": f"{memory.logits / _GIB:.1f}",
        "step s": f"{seconds.total:.2f}",
        "tokens/s": f"{plan.tokens_per_second:,.0f}",
        "TFLOP/s": f"{plan.model_flops / 1e12:,.0f}",
        "MFU": f"{plan.utilisation:.1%}",
        "bubble": f"{plan.bubble:.1%}",
        "links": f"{visible / seconds.total:.1%}",
        "sent GiB": f"{sum(vars(plan.traffic).values()) / _GIB:,.1f}",
    }


def _table(plans: tuple[Plan, ...]) -> Table:
    """The columns that fit into a terminal; the page has all."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    rows = [_row(plan) for plan in plans]
    shown = [name for name in rows[0] if name not in _PAGE_ONLY]
    for name in shown:
        table.add_column(name, justify="left" if name in ("layout", "recompute") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def _write(config: PlanConfig, output: Path, title: str, note: str, plans: tuple[Plan, ...]) -> None:
    plain: list[dict[str, Any]] = [
        asdict(plan)
        | {"train_parallel": to_plain(plan.layout.to_parallel())}
        | {"memory_bytes": plan.memory.total, "step_seconds": plan.seconds.total}
        for plan in plans
    ]
    write_json(output / "plan.json", plain)
    best = {"step_seconds": plans[0].seconds.total, "utilisation": plans[0].utilisation}
    manifest = Manifest("plan", to_plain(config), {}, best)
    write_page(
        output / "plan.html",
        files("puna.pretrain.planner").joinpath("plan.html.jinja").read_text(encoding="utf-8"),
        title=title,
        created=manifest.created,
        note=note,
        recipe=_recipe(plans[0].layout),
        rows=[_row(plan) for plan in plans],
        memory=_bars(plans, "memory", 1 / _GIB, "GiB on the fullest rank"),
        seconds=_bars(plans, "seconds", 1.0, "seconds of a step"),
    )
    manifest.write(output)
    say(f"Wrote {output / 'plan.html'}")


def _bars(plans: tuple[Plan, ...], part: str, scale: float, unit: str) -> str | None:
    """Stacked bars of a plan's memory or seconds by kind, best plan on top."""
    try:
        figure = new_figure(9, 0.4 * len(plans) + 1.4)
    except InputError as error:
        say(f"The page has no plot. {error}")
        return None
    axes = figure.subplots()
    names = [f"{number}. {plan.layout}, {plan.layout.checkpointing}" for number, plan in enumerate(plans, start=1)]
    left = [0.0] * len(plans)
    for kind in vars(getattr(plans[0], part)):
        widths = [scale * getattr(getattr(plan, part), kind) for plan in plans]
        axes.barh(names, widths, left=left, height=0.7, label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel=unit)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return to_svg(figure)
