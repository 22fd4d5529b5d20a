"""Learning rate as a function of the step."""

import math

from puna.train.config import ScheduleConfig


def learning_rate_ratio(step: int, steps: int, config: ScheduleConfig) -> float:
    """The learning rate of step `step` (0, 1, ...) of `steps`, as a share of the peak.

    Warm-up rises linearly from 0 at step 0 to 1 at step `warmup_steps`, as in `transformers`' schedules; the last
    ratio, reached after the last step, is `final_ratio`.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    begin = config.warmup_steps if config.kind == "cosine" else steps - config.decay_steps
    if step < begin:
        return 1.0
    fallen = (step - begin) / max(1, steps - begin)
    share = 0.5 * (1 + math.cos(math.pi * fallen)) if config.kind == "cosine" else 1 - fallen
    return config.final_ratio + (1 - config.final_ratio) * share
