"""Architectures side by side, and what follows from them by counting."""

from collections.abc import Sequence
from typing import Any

from puna.evaluate.compare.candidates import Candidate
from puna.evaluate.compare.section import Figure, Section, Sheet, not_measured
from puna.model.accounting import count_parameters, forward_flops_per_token, kv_bytes_per_token
from puna.model.config import LlamaConfig
from puna.runtime.page import new_figure, plain_label, to_svg

_COMMON_CONTEXT = 2048


def architecture_section(candidates: Sequence[Candidate]) -> Section:
    """Sizes, heads, context, cache and computation of each, as exact counts from the configurations."""
    known = [candidate for candidate in candidates if candidate.config is not None]
    facts = {candidate.name: _facts(candidate.config) for candidate in known if candidate.config is not None}
    labels = next(iter(facts.values()), {}).keys()
    rows = [["what there is", *(candidate.kind for candidate in candidates)]]
    rows += [
        [label, *(_show(facts[c.name][label]) if c.name in facts else "not known" for c in candidates)]
        for label in labels
    ]
    names = [candidate.name for candidate in candidates]
    return Section(
        "Architecture",
        "Counted from the configurations. Cache and weights in bfloat16; computation of one token is that of a forward "
        "pass, a multiply-add counted as two.",
        [Sheet("", ["", *names], rows)],
        [_parts_figure({c.name: c.config for c in known if c.config is not None})] if known else [],
        [f"{c.name}: {not_measured('no configuration, only published results')}" for c in candidates if c not in known],
        data={"models": facts},
    )


def _facts(config: LlamaConfig) -> dict[str, Any]:
    parameters = count_parameters(config)
    scaling = config.rope_scaling
    return {
        "parameters": parameters,
        "of these in embeddings": _parts(config)["embeddings"],
        "layers": config.num_layers,
        "width": config.dim,
        "query heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "width of a head": config.head_dim,
        "width of the feed-forward": config.hidden_dim,
        "vocabulary": config.vocab_size,
        "context, tokens": config.context_length,
        "rotary base": config.rope_theta,
        "rotary scaling": "none" if scaling is None else f"{scaling.kind}, {scaling.factor:g} times",
        "embeddings tied": config.tie_embeddings,
        "bias on queries, keys, values": config.qkv_bias,
        "normalised queries and keys": config.qk_norm,
        "weights, MB": 2 * parameters / 1e6,
        "cache, bytes per token": kv_bytes_per_token(config),
        "cache of a full context, MB": kv_bytes_per_token(config) * config.context_length / 1e6,
        f"MFLOP per token, context {_COMMON_CONTEXT:,}": forward_flops_per_token(config, (_COMMON_CONTEXT + 1) / 2)
        / 1e6,
        "MFLOP per token, own full context": forward_flops_per_token(config, (config.context_length + 1) / 2) / 1e6,
    }


def _parts(config: LlamaConfig) -> dict[str, int]:
    """Parameters by what they are for; norms and biases count to the rest."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    parts = {
        "embeddings": config.vocab_size * config.dim * (1 if config.tie_embeddings else 2),
        "attention": config.num_layers * config.dim * heads,
        "feed-forward": config.num_layers * 3 * config.dim * config.hidden_dim,
    }
    return parts | {"norms and biases": count_parameters(config) - sum(parts.values())}


def _parts_figure(configs: dict[str, LlamaConfig]) -> Figure:
    figure = new_figure(9, 0.45 * len(configs) + 1.3)
    axes = figure.subplots()
    left = [0.0] * len(configs)
    shares = {name: _parts(config) for name, config in configs.items()}
    for part in ("embeddings", "attention", "feed-forward", "norms and biases"):
        widths = [values[part] / sum(values.values()) for values in shares.values()]
        axes.barh(range(len(configs)), widths, left=left, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    labels = [f"{plain_label(name)} ({_millions(count_parameters(config))})" for name, config in configs.items()]
    axes.set_yticks(range(len(configs)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="share of the parameters", xlim=(0, 1))
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=9)
    return Figure("Where the parameters are.", to_svg(figure))


def _millions(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value < 1000:
        return f"{value:.4g}"
    return value if isinstance(value, str) else f"{value:,.0f}"
