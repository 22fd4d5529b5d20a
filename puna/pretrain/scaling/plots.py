"""Figures of fitted laws, as SVG."""

import numpy as np

from puna.pretrain.scaling.downstream import Scores, TwoSteps
from puna.pretrain.scaling.isoflop import IsoFlop
from puna.pretrain.scaling.ladder import Trained
from puna.pretrain.scaling.parametric import Fit
from puna.pretrain.scaling.recommend import Recommendation
from puna.pretrain.scaling.runs import Runs
from puna.runtime.page import new_figure, to_svg


def loss_figure(law: Fit, runs: Runs, recommendations: list[Recommendation], held_out: Trained | None) -> str:
    """Left: losses by compute, with the best that the law expects. Right: predicted against measured.

    Raises:
        InputError: matplotlib is absent.
    """
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    points = left.scatter(runs.compute, runs.loss, c=np.log10(runs.parameters), s=18, cmap="viridis")
    figure.colorbar(points, ax=left, label="log10 parameters")
    furthest = max([float(runs.compute.max()), *(one.compute for one in recommendations)])
    compute = np.geomspace(runs.compute.min(), furthest, 100)
    for number, one in enumerate(law.resampled[:50]):
        best = [float(one.loss(*one.best_split(value))) for value in compute]
        left.plot(compute, best, color="tab:orange", alpha=0.08, label="resampled" if number == 0 else None)
    best = [float(law.law.loss(*law.law.best_split(value))) for value in compute]
    left.plot(compute, best, color="tab:red", label="best split by the law")
    left.set(xscale="log", xlabel="training FLOPs", ylabel="loss, nats per token")
    left.legend()
    predicted = law.law.loss(runs.parameters, runs.tokens)
    right.scatter(runs.loss, predicted, s=18, label="fitted")
    ends = [float(min(runs.loss.min(), predicted.min())), float(max(runs.loss.max(), predicted.max()))]
    if held_out is not None:
        expected = float(law.law.loss(held_out.parameters, held_out.tokens))
        right.scatter([held_out.loss], [expected], marker="*", s=140, color="tab:red", label="held out")
        left.scatter([held_out.compute], [held_out.loss], marker="*", s=140, color="tab:red")
        ends = [min(ends[0], held_out.loss, expected), max(ends[1], held_out.loss, expected)]
    right.plot(ends, ends, color="gray", linewidth=1)
    right.set(xlabel="measured loss", ylabel="loss by the law")
    right.legend()
    figure.tight_layout()
    return to_svg(figure)


def isoflop_figure(isoflop: IsoFlop, runs: Runs) -> str:
    """Left: a parabola for each budget. Right: best parameters by compute.

    Raises:
        InputError: matplotlib is absent.
    """
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    for profile in isoflop.profiles:
        own = np.abs(np.log(runs.compute / profile.compute)) < 0.01
        (line,) = left.plot(runs.parameters[own], runs.loss[own], "o", markersize=3, label=f"{profile.compute:.2g}")
        span = np.geomspace(runs.parameters[own].min(), runs.parameters[own].max(), 50)
        left.plot(span, np.polyval(profile.coefficients, np.log(span)), color=line.get_color(), linewidth=1)
        left.plot(profile.parameters, profile.loss, "*", color=line.get_color(), markersize=9)
    left.set(xscale="log", xlabel="parameters", ylabel="loss, nats per token")
    left.legend(title="FLOPs", fontsize="x-small")
    compute = np.array([profile.compute for profile in isoflop.profiles])
    right.plot(compute, [profile.parameters for profile in isoflop.profiles], "o", label="lowest points")
    right.plot(compute, [isoflop.parameters(value) for value in compute], label=f"C^{isoflop.parameters.exponent:.3f}")
    right.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="best parameters")
    right.legend()
    figure.tight_layout()
    return to_svg(figure)


def accuracy_figure(two_steps: TwoSteps, scores: Scores, recommendations: list[Recommendation]) -> str:
    """Left: compute to the likelihood of the right answer. Right: from there to accuracy.

    Raises:
        InputError: matplotlib is absent.
    """
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    known = ~np.isnan(scores.compute)
    furthest = max([float(scores.compute[known].max()), *(one.compute for one in recommendations)])
    compute = np.geomspace(scores.compute[known].min(), furthest, 50)
    left.plot(scores.compute[known], scores.nll[known], "o")
    left.plot(compute, two_steps.nll(compute))
    left.set(xscale="log", xlabel="training FLOPs", ylabel="negative log-likelihood of the right answer")
    nll = np.linspace(min(scores.nll.min(), two_steps.nll(compute).min()), scores.nll.max(), 100)
    right.plot(scores.nll, scores.accuracy, "o")
    right.plot(nll, two_steps.accuracy_at(nll))
    right.set(xlabel="negative log-likelihood of the right answer", ylabel="accuracy", ylim=(0, 1))
    right.invert_xaxis()
    figure.tight_layout()
    return to_svg(figure)
