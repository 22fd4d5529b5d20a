"""How to spend a budget: parameters, tokens, batch, learning rate, and the loss to expect, each with an interval."""

from dataclasses import dataclass

from puna.pretrain.scaling.parametric import Fit, Law


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that it probably lies in."""

    value: float
    """The best guess."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


@dataclass(frozen=True)
class Recommendation:
    """How best to spend one budget."""

    compute: float
    """The budget, in FLOPs."""
    parameters: Estimate
    """Model size."""
    tokens: Estimate
    """Training tokens."""
    loss: Estimate
    """Nats per token, of the best guess at size and tokens; the interval is that of the law at them."""
    batch_tokens: Estimate
    """Tokens of a step: two published laws, see `published_batch_and_rate`."""
    learning_rate: Estimate
    """Peak, for AdamW: the same two laws."""


def published_batch_and_rate(parameters: float, tokens: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """(batch in tokens, peak learning rate) for AdamW, by each of two published laws.

    Bi et al. 2024 (DeepSeek LLM, arXiv:2401.02954, section 3.1) fit both to compute; Li et al. 2025 (Step Law,
    arXiv:2503.04715, equation 1) fit the rate to parameters and tokens, and the batch to tokens. They differ: how much
    is how little is known about your own data and model.
    """
    compute = 6 * parameters * tokens
    deepseek = 0.2920 * compute**0.3271, 0.3118 * compute**-0.1250
    step_law = 0.58 * tokens**0.571, 1.79 * parameters**-0.713 * tokens**0.307
    return deepseek, step_law


def recommend(fit: Fit, compute: float, confidence: float) -> Recommendation:
    """The best split of `compute` by the fitted law, and its intervals by the resampled ones.

    Batch and learning rate: the geometric mean of two published laws at the best split; the interval spans both laws
    and both ends of the interval of sizes.
    """
    parameters, tokens = fit.law.best_split(compute)
    low, high = fit.interval(lambda law: law.best_split(compute)[0], confidence)

    def loss(law: Law) -> float:
        return float(law.loss(parameters, tokens))

    def spread(which: int) -> Estimate:
        by_law = [pair[which] for pair in published_batch_and_rate(parameters, tokens)]
        sizes = (low, parameters, high)
        everything = [pair[which] for size in sizes for pair in published_batch_and_rate(size, compute / (6 * size))]
        return Estimate((by_law[0] * by_law[1]) ** 0.5, min(everything), max(everything))

    return Recommendation(
        compute=compute,
        parameters=Estimate(parameters, low, high),
        tokens=Estimate(tokens, compute / (6 * high), compute / (6 * low)),
        loss=Estimate(loss(fit.law), *fit.interval(loss, confidence)),
        batch_tokens=spread(0),
        learning_rate=spread(1),
    )
