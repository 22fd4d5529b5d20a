"""`puna scaling`: fit laws to finished runs, or to a ladder trained here, and recommend how to spend a budget."""

from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from puna.config import to_plain
from puna.pretrain.scaling.downstream import Scores, TwoSteps, fit_two_steps, read_scores
from puna.pretrain.scaling.isoflop import IsoFlop, fit_isoflop, has_profiles, resample
from puna.pretrain.scaling.ladder import LadderConfig, Trained, run_ladder, to_runs
from puna.pretrain.scaling.parametric import Fit, fit
from puna.pretrain.scaling.plots import accuracy_figure, isoflop_figure, loss_figure
from puna.pretrain.scaling.recommend import Estimate, Recommendation, recommend
from puna.pretrain.scaling.runs import Columns, Runs, read_runs
from puna.runtime.errors import InputError
from puna.runtime.files import write_json
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.page import write_page
from puna.runtime.progress import say

_COEFFICIENTS = {
    "irreducible": "E",
    "parameter_scale": "A",
    "data_scale": "B",
    "parameter_exponent": "alpha",
    "data_exponent": "beta",
}


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Fit scaling laws and recommend how to spend a budget."""

    runs: Path | None = None
    """A .csv, .json or .jsonl file of finished runs: parameters, tokens or compute, and loss."""
    columns: Columns = field(default_factory=Columns)
    """What its columns are called."""
    leave_out_worst: int = 0
    """How many runs of highest loss not to fit; look at the plot before you decide that they are outliers."""
    ladder: LadderConfig | None = None
    """In place of `runs`: train a ladder of small models here, fit it, and test the law on a larger run."""
    benchmark: Path | None = None
    """A file of models with compute, nll (of the right answer) and accuracy, to predict accuracy from compute."""
    chance: float = 0.25
    """Accuracy of guessing on that benchmark."""
    budgets: tuple[float, ...] = ()
    """Training FLOPs to recommend for; empty: ten and a hundred times the largest run's."""
    bootstrap: int = 200
    """How often to fit again to runs drawn with replacement, for intervals."""
    confidence: float = 0.9
    """Share of those fits that an interval holds."""
    seed: int = 0
    """Of the drawing."""
    output: Path
    """Gets scaling.json and scaling.html, and runs/ with a ladder."""

    def __post_init__(self) -> None:
        if (self.runs is None) == (self.ladder is None):
            raise ValueError("Set either runs, a file of finished runs, or a table ladder, to train some here.")
        if self.bootstrap < 20:
            raise ValueError(f"bootstrap is {self.bootstrap}; intervals from fewer than 20 fits mean nothing.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; it is a share between 0 and 1.")
        if not 0 <= self.chance < 1:
            raise ValueError(f"chance is {self.chance}; it is an accuracy from 0 to below 1.")
        if any(budget <= 0 for budget in self.budgets):
            raise ValueError("budgets are FLOPs; each has to be positive.")
        if self.leave_out_worst < 0:
            raise ValueError(f"leave_out_worst is {self.leave_out_worst}; it cannot be negative.")


@dataclass(frozen=True)
class HeldOut:
    """What the law said about a run that it was not fitted to."""

    name: str
    """The run."""
    predicted: Estimate
    """Loss by the law, nats per token."""
    measured: float
    """Loss that it came to."""
    relative_error: float
    """Predicted / measured - 1."""
    outside: float
    """How many times more compute it took than the largest fitted run."""


def main(config: ScalingConfig) -> None:
    """Read or train, fit, recommend, and write scaling.json and scaling.html."""
    scores = None if config.benchmark is None else read_scores(config.benchmark)
    sources = [path for path in (config.runs, config.benchmark) if path is not None]
    trained: list[Trained] = []
    last: Trained | None = None
    if config.ladder is not None:
        trained, last = run_ladder(config.ladder, config.output / "runs")
        runs = to_runs(trained)
        sources += [config.ladder.tokens, config.ladder.held_out_tokens, config.ladder.tokenizer]
    else:
        assert config.runs is not None
        runs = read_runs(config.runs, config.columns)
    runs = runs.without_worst(config.leave_out_worst)
    law = fit(runs, bootstrap=config.bootstrap, seed=config.seed)
    held_out = None if last is None else _test(law, runs, last, config.confidence)
    isoflop = fit_isoflop(runs) if has_profiles(runs) else None
    two_steps = None if scores is None else fit_two_steps(scores, config.chance)
    budgets = config.budgets or (10 * float(runs.compute.max()), 100 * float(runs.compute.max()))
    recommendations = [recommend(law, budget, config.confidence) for budget in budgets]
    _tell(law, runs, isoflop, two_steps, held_out, recommendations, config)
    _write(config, sources, law, runs, isoflop, scores, two_steps, trained, last, held_out, recommendations)


def _test(law: Fit, runs: Runs, last: Trained, confidence: float) -> HeldOut:
    predicted = float(law.law.loss(last.parameters, last.tokens))
    interval = law.interval(lambda one: float(one.loss(last.parameters, last.tokens)), confidence)
    outside = last.compute / float(runs.compute.max())
    return HeldOut(last.name, Estimate(predicted, *interval), last.loss, predicted / last.loss - 1, outside)


def _coefficients(law: Fit, confidence: float) -> dict[str, Estimate]:
    return {
        short: Estimate(getattr(law.law, name), *law.interval(lambda one, name=name: getattr(one, name), confidence))  # type: ignore[misc]
        for name, short in _COEFFICIENTS.items()
    }


def _tell(
    law: Fit,
    runs: Runs,
    isoflop: IsoFlop | None,
    two_steps: TwoSteps | None,
    held_out: HeldOut | None,
    recommendations: list[Recommendation],
    config: ScalingConfig,
) -> None:
    values = law.law
    say(
        f"{len(runs)} runs: L(N, D) = {values.irreducible:.4f} + {values.parameter_scale:,.2f} / "
        f"N^{values.parameter_exponent:.4f} + {values.data_scale:,.2f} / D^{values.data_exponent:.4f}; "
        f"Huber sum {law.objective:.4g}"
    )
    for name, estimate in _coefficients(law, config.confidence).items():
        interval = f"{config.confidence:.0%} between {estimate.low:.5g} and {estimate.high:.5g}"
        say(f"  {name:<6} {estimate.value:>10.5g}   {interval}")
    if isoflop is not None:
        say(
            f"IsoFLOP, {len(isoflop.profiles)} budgets: best parameters = {isoflop.parameters.scale:.4g} * "
            f"C^{isoflop.parameters.exponent:.4f}"
        )
    if held_out is not None:
        say(
            f"Held out: {held_out.name}, {held_out.outside:.1f} times the compute of the largest fitted run: predicted "
            f"{held_out.predicted.value:.4f} ({held_out.predicted.low:.4f} to {held_out.predicted.high:.4f}), measured "
            f"{held_out.measured:.4f}: off by {held_out.relative_error:+.2%}"
        )
    for one in recommendations:
        say(
            f"{one.compute:.3g} FLOPs: {_human(one.parameters)} parameters, {_human(one.tokens)} tokens, loss "
            f"{_short(one.loss, '.3f')}; batch {_human(one.batch_tokens)} tokens, "
            f"learning rate {_short(one.learning_rate, '.2g')}"
        )
        if two_steps is not None:
            say(f"  accuracy {float(two_steps.accuracy(one.compute)):.3f} on {config.benchmark}")


def _short(estimate: Estimate, form: str) -> str:
    """A number with its interval."""
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _human(estimate: Estimate) -> str:
    """Large numbers with their interval, short."""

    def short(value: float) -> str:
        for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= scale:
                return f"{value / scale:.3g}{unit}"
        return f"{value:.3g}"

    return f"{short(estimate.value)} ({short(estimate.low)} to {short(estimate.high)})"


def _write(
    config: ScalingConfig,
    sources: list[Path],
    law: Fit,
    runs: Runs,
    isoflop: IsoFlop | None,
    scores: Scores | None,
    two_steps: TwoSteps | None,
    trained: list[Trained],
    last: Trained | None,
    held_out: HeldOut | None,
    recommendations: list[Recommendation],
) -> None:
    coefficients = _coefficients(law, config.confidence)
    powers = () if isoflop is None else resample(runs, config.bootstrap, config.seed)
    plain: dict[str, Any] = {
        "num_runs": len(runs),
        "objective": law.objective,
        "coefficients": {name: asdict(estimate) for name, estimate in coefficients.items()},
        "recommendations": [asdict(one) for one in recommendations],
        "isoflop": None if isoflop is None else asdict(isoflop),
        "isoflop_exponents": sorted(power.exponent for power in powers),
        "two_steps": None if two_steps is None else asdict(two_steps),
        "ladder": [asdict(run) for run in trained],
        "held_out": None if held_out is None else asdict(held_out),
    }
    write_json(config.output / "scaling.json", plain)
    inputs = {str(path): content_hash(path) for path in sources}
    results = {"objective": law.objective} | {name: estimate.value for name, estimate in coefficients.items()}
    if held_out is not None:
        results["held_out_relative_error"] = held_out.relative_error
    manifest = Manifest("scaling", to_plain(config), inputs, results)
    figures: dict[str, str | None] = {"losses": None, "isoflops": None, "accuracies": None}
    try:
        figures["losses"] = loss_figure(law, runs, recommendations, last)
        if isoflop is not None:
            figures["isoflops"] = isoflop_figure(isoflop, runs)
        if scores is not None and two_steps is not None:
            figures["accuracies"] = accuracy_figure(two_steps, scores, recommendations)
    except InputError as error:
        say(f"The page has no plots. {error}")
    write_page(
        config.output / "scaling.html",
        files("puna.pretrain.scaling").joinpath("scaling.html.jinja").read_text(encoding="utf-8"),
        title=f"Scaling laws in {config.output.resolve().name}",
        created=manifest.created,
        law=law,
        num_runs=len(runs),
        coefficients=coefficients,
        confidence=config.confidence,
        isoflop=isoflop,
        held_out=held_out,
        trained=trained,
        recommendations=[
            {
                "compute": f"{one.compute:.3g}",
                "parameters": _human(one.parameters),
                "tokens": _human(one.tokens),
                "loss": _short(one.loss, ".3f"),
                "batch": _human(one.batch_tokens),
                "rate": _short(one.learning_rate, ".2g"),
                "accuracy": "" if two_steps is None else f"{float(two_steps.accuracy(one.compute)):.3f}",
            }
            for one in recommendations
        ],
        **figures,
    )
    manifest.write(config.output)
    say(f"Wrote {config.output / 'scaling.html'}")
