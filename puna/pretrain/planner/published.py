"""Published step speeds, and the same predicted: what `Efficiency` was fitted to, and how well it fits."""

from dataclasses import dataclass

from puna.model.presets import preset
from puna.pretrain.planner.cluster import Cluster, Efficiency
from puna.pretrain.planner.layout import Checkpointing, Layout
from puna.pretrain.planner.memory import Numerics
from puna.pretrain.planner.timing import model_flops_per_token, step_time


@dataclass(frozen=True)
class Published:
    """A run that somebody measured."""

    source: str
    """Where the figure stands."""
    model: str
    """Name of the preset."""
    layout: Layout
    """How it was spread."""
    numerics: Numerics
    """What it computed with."""
    batch_rows: int
    """Rows in a step, over all GPUs."""
    row_length: int
    """Tokens in a row."""
    tokens_per_second: float
    """Per GPU, as published, or from the published TFLOP/s in the convention of `model_flops_per_token`."""


def predicted(run: Published, efficiency: Efficiency) -> float:
    """Tokens per second and GPU that the planner says."""
    cluster = Cluster(num_gpus=run.layout.num_ranks)
    seconds, _ = step_time(
        preset(run.model), cluster, run.layout, run.numerics, efficiency, run.batch_rows, run.row_length
    )
    return run.batch_rows * run.row_length / seconds.total / run.layout.num_ranks


def _llama3(gpus: int, context: int, data: int, row_length: int, tera_flops: float) -> Published:
    layout = Layout(tensor=8, context=context, pipeline=16, pipeline_chunks=8, shard=data, reshard=False)
    rows = 16 * 2**20 // row_length
    assert layout.num_ranks == gpus
    flops = model_flops_per_token(preset("llama-3.1-405b"), row_length)
    numerics = Numerics(compile=True, chunked_loss=False)
    return Published("Llama 3", "llama-3.1-405b", layout, numerics, rows, row_length, tera_flops * 1e12 / flops)


def _titan(
    table: str,
    model: str,
    tokens_per_second: float,
    *,
    rows: int,
    row_length: int = 8192,
    shard: int = 8,
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    chunks: int = 1,
    checkpointing: Checkpointing = "full",
    float8: bool = True,
    compile: bool = True,
    async_tensor: bool = False,
) -> Published:
    """A torchtitan run; `rows` is its local batch size, of which a pipeline makes as many micro-batches as ranks."""
    layout = Layout(
        tensor=tensor,
        context=context,
        shard=shard,
        pipeline=pipeline,
        pipeline_chunks=chunks,
        micro_batch_rows=rows // pipeline,
        checkpointing=checkpointing,
        reshard=pipeline == 1,
    )
    numerics = Numerics(
        precision="float8" if float8 else "bf16", compile=compile, chunked_loss=False, async_tensor=async_tensor
    )
    return Published(f"torchtitan {table}", model, layout, numerics, rows * shard, row_length, tokens_per_second)


_8B, _70B, _405B = "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"

PUBLISHED: tuple[Published, ...] = (
    _llama3(8192, 1, 64, 8192, 430),
    _llama3(16_384, 1, 128, 8192, 400),
    _llama3(16_384, 16, 8, 131_072, 380),
    _titan("1", _8B, 5762, rows=2, checkpointing="alternate", float8=False, compile=False),
    _titan("1", _8B, 6667, rows=2, checkpointing="alternate", float8=False),
    _titan("1", _8B, 8532, rows=2, checkpointing="alternate"),
    _titan("3", _8B, 5605, rows=2, shard=128, checkpointing="alternate", float8=False, compile=False),
    _titan("3", _8B, 6514, rows=2, shard=128, checkpointing="alternate", float8=False),
    _titan("3", _8B, 8380, rows=2, shard=128, checkpointing="alternate"),
    _titan("2", _8B, 3890, rows=1, row_length=32_768),
    _titan("2", _8B, 2540, rows=1, row_length=65_536, shard=4, context=2),
    _titan("2", _8B, 1071, rows=1, row_length=131_072, shard=2, context=4),
    _titan("2", _8B, 548, rows=1, row_length=262_144, shard=1, context=8),
    _titan("4", _70B, 829, rows=16, shard=32, tensor=8),
    _titan("4", _70B, 876, rows=16, shard=32, tensor=8, async_tensor=True),
    _titan("5", _405B, 100, rows=32, tensor=8, pipeline=8, async_tensor=True),
    _titan("5", _405B, 128, rows=32, tensor=8, pipeline=8, chunks=2, async_tensor=True),
    _titan("6", _405B, 76, rows=8, row_length=32_768, tensor=8, pipeline=8, async_tensor=True),
    _titan("6", _405B, 47, rows=8, row_length=65_536, shard=4, context=2, tensor=8, pipeline=8, async_tensor=True),
    _titan("6", _405B, 31, rows=8, row_length=131_072, shard=2, context=4, tensor=8, pipeline=8, async_tensor=True),
    _titan("6", _405B, 16, rows=8, row_length=262_144, shard=1, context=8, tensor=8, pipeline=8, async_tensor=True),
    _titan("2025-06", _70B, 597.3, rows=16, shard=32, tensor=8, float8=False),
    _titan("2025-06", _70B, 652.4, rows=16, shard=32, tensor=8, float8=False, async_tensor=True),
    _titan("2025-06", _70B, 809.8, rows=16, shard=32, tensor=8),
    _titan("2025-06", _70B, 942.4, rows=16, shard=32, tensor=8, async_tensor=True),
    _titan("2025-06", _8B, 4378, rows=12, tensor=8, checkpointing="alternate", float8=False),
    _titan("2025-06", _8B, 4809.4, rows=12, tensor=8, checkpointing="alternate", float8=False, async_tensor=True),
    _titan("2025-06", _8B, 5078.1, rows=12, tensor=8, checkpointing="alternate"),
    _titan("2025-06", _8B, 5570.1, rows=12, tensor=8, checkpointing="alternate", async_tensor=True),
    _titan("2024-08", _405B, 109, rows=2, shard=16, tensor=8, float8=False),
    _titan("2024-08", _405B, 177, rows=2, shard=16, tensor=8),
    _titan("2024-08", _405B, 185, rows=2, shard=16, tensor=8, async_tensor=True),
)
"""Llama 3: arXiv:2407.21783, table 4; its interleaving, which the paper does not give as a number, is taken as one
layer to a piece, its batch of 16 million tokens as 2^24. torchtitan: benchmarks/llama3_h100_202412_torchtitan.md
(tables 1 to 6) and asyncTP_llama3_h100_2025-06_torchtitan.md beside it, of github.com/pytorch/torchtitan at b5bcd76,
and docs/performance.md at 4d88a8a ("2024-08"); pipelines there make as many micro-batches as there are ranks, and two
pieces a rank when interleaved (pipelining_utils.py at 6b03ffa)."""


def comparison(efficiency: Efficiency | None = None) -> str:
    """Published and predicted speeds as a Markdown table, worst misses marked; docs/scaling.md holds it."""
    lines = [
        "| run | model | GPUs | layout | row | products | recompute | published tokens/s/GPU | predicted | off by |",
        "| --- | --- | ---: | --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for run in PUBLISHED:
        speed = predicted(run, efficiency or Efficiency())
        off = speed / run.tokens_per_second - 1
        mark = f"**{off:+.1%}**" if abs(off) > 0.1 else f"{off:+.1%}"
        products = run.numerics.precision + (", compiled" if run.numerics.compile else ", eager")
        products += ", async TP" if run.numerics.async_tensor else ""
        lines.append(
            f"| {run.source} | {run.model} | {run.layout.num_ranks:,} | {run.layout} | {run.row_length:,} | {products} "
            f"| {run.layout.checkpointing} | {run.tokens_per_second:,.1f} | {speed:,.1f} | {mark} |"
        )
    return "\n".join(lines)
