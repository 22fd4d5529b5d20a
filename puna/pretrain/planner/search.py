"""Every sensible layout, weighed; the fastest that fit first."""

from collections.abc import Iterable
from dataclasses import dataclass

from puna.model.config import LlamaConfig
from puna.pretrain.planner.cluster import Cluster, Efficiency
from puna.pretrain.planner.layout import Choices, Layout, layouts
from puna.pretrain.planner.memory import Memory, Numerics, rank_memory
from puna.pretrain.planner.timing import StepTime, Traffic, model_flops_per_token, step_time


@dataclass(frozen=True)
class Plan:
    """What a layout needs and how fast it is."""

    layout: Layout
    """The layout."""
    memory: Memory
    """Bytes on the fullest rank."""
    seconds: StepTime
    """Of a step."""
    traffic: Traffic
    """Bytes that a rank sends in a step."""
    tokens_per_second: float
    """Per GPU."""
    model_flops: float
    """Per second and GPU, in the convention of `model_flops_per_token`."""
    utilisation: float
    """Share of the bfloat16 peak (MFU)."""
    bubble: float
    """Share of the step that the pipeline waits."""


@dataclass(frozen=True)
class Plans:
    """What a search found."""

    best: tuple[Plan, ...]
    """Fastest first, all of which fit."""
    smallest: Plan
    """The one that needs the least memory, whether or not it fits."""
    considered: int
    """Layouts looked at."""
    fitting: int
    """Of which fit into memory."""


def weigh(
    model: LlamaConfig,
    cluster: Cluster,
    layout: Layout,
    numerics: Numerics,
    efficiency: Efficiency,
    batch_rows: int,
    row_length: int,
) -> Plan:
    """Memory, traffic and time of one layout."""
    seconds, traffic = step_time(model, cluster, layout, numerics, efficiency, batch_rows, row_length)
    speed = batch_rows * row_length / seconds.total / layout.num_ranks
    flops = speed * model_flops_per_token(model, row_length)
    return Plan(
        layout=layout,
        memory=rank_memory(model, layout, numerics, batch_rows, row_length),
        seconds=seconds,
        traffic=traffic,
        tokens_per_second=speed,
        model_flops=flops,
        utilisation=flops / cluster.figures.bf16_flops,
        bubble=seconds.bubble / seconds.total,
    )


def search(
    model: LlamaConfig,
    cluster: Cluster,
    numerics: Numerics,
    efficiency: Efficiency,
    batch_rows: int,
    row_length: int,
    choices: Choices,
    keep: int,
) -> Plans | None:
    """The `keep` fastest layouts that fit; None when no layout divides model, batch and cluster evenly.

    Of layouts that are equally fast to a hundredth, the one that needs less memory comes first.
    """
    limit = cluster.usable_memory * cluster.figures.memory_gib * 2**30
    smallest: tuple[float, Layout] | None = None
    fitting: list[tuple[float, float, Layout]] = []
    considered = 0
    for layout in layouts(model, cluster, batch_rows, row_length, choices):
        considered += 1
        used = rank_memory(model, layout, numerics, batch_rows, row_length).total
        if smallest is None or used < smallest[0]:
            smallest = used, layout
        if used <= limit:
            seconds, _ = step_time(model, cluster, layout, numerics, efficiency, batch_rows, row_length)
            fitting.append((seconds.total, used, layout))
    if smallest is None:
        return None

    def weighed(chosen: Iterable[Layout]) -> tuple[Plan, ...]:
        return tuple(weigh(model, cluster, one, numerics, efficiency, batch_rows, row_length) for one in chosen)

    fastest = min((seconds for seconds, _, _ in fitting), default=1.0)
    fitting.sort(key=lambda found: (round(found[0] / fastest, 2), found[1]))
    best = weighed(layout for _, _, layout in fitting[:keep])
    return Plans(best, weighed([smallest[1]])[0], considered, len(fitting))
