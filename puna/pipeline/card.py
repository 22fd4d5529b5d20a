"""`puna inspect MODEL --card`: the model card, README.md of a model directory, from manifests alone.

What the manifests do not say is said to be unknown. The front matter is the hub's (model-index with the scores),
checked by `huggingface_hub`'s own classes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from puna.evaluate.compare.samples import first_values, read_samples
from puna.evaluate.contamination import Contamination, contamination_line
from puna.evaluate.statistics.intervals import estimate
from puna.model.accounting import count_parameters
from puna.model.config import LlamaConfig
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, read_jsonl, write_text
from puna.runtime.manifest import FILE_NAME, Manifest, content_hash
from puna.weights.load import read_config

MARK = "<!-- Written by `puna inspect --card`, which may replace it. -->"
_TRAININGS = ("pretrain", "finetune", "align", "reward", "reinforce")
_DEPTH = 4
"""How many folders deep evaluations are looked for."""


@dataclass(frozen=True, slots=True)
class Ancestor:
    """Something that a model was made from."""

    path: str
    """As the manifest names it."""
    hash: str
    """Of its content then."""
    manifest: Manifest | None
    """None where there is none, as for raw text, or where it is not there any more."""


def write_card(model: Path, evaluations: Sequence[Path] = (), licence: str | None = None) -> Path:
    """Write README.md of a model directory.

    Args:
        model: the directory.
        evaluations: folders to look for evaluations and contamination checks in, besides the one of the model's run.
        licence: the hub's name of it, such as apache-2.0; unknown where absent.

    Returns:
        The file.

    Raises:
        InputError: no model is there, or README.md was written by somebody else.
    """
    config = read_config(model)
    card = model / "README.md"
    if card.exists() and MARK not in card.read_text(encoding="utf-8"):
        raise InputError(f"{card} was not written by `puna inspect --card`, so it is left alone. Move it away first.")
    own = Manifest.read(model) if (model / FILE_NAME).exists() else None
    ancestors = [] if own is None else list(_ancestors(model, own))
    roots = [model.resolve().parent.parent, *evaluations] if own is not None else list(evaluations)
    scores = _scores(roots, content_hash(model))
    name = _name(model)
    trainings = [m for m in [*(a.manifest for a in ancestors), own] if m is not None and m.stage in _TRAININGS]
    template = files("puna.pipeline").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=True)
    text = environment.from_string(template).render(
        mark=MARK,
        name=name,
        summary=_summary(config, trainings),
        model=_model(config),
        data=list(_data(ancestors)),
        training=[_training(manifest) for manifest in trainings],
        evaluations=scores,
        limits=_limits(config, trainings, scores),
        licence=_licence(licence, ancestors),
        lineage=[{"path": a.path, "hash": a.hash[:12], "what": _what(a)} for a in ancestors],
    )
    content = f"---\n{_front_matter(name, licence, scores)}\n---\n{text}"
    ModelCard(content)  # raises where the hub would not read it
    write_text(card, content)
    return card


def _name(model: Path) -> str:
    """The directory's name, or that of the run's folder where the directory is only called model."""
    path = model.resolve()
    return f"{path.parent.parent.name}/{path.parent.name}" if path.name == "model" else path.name


def _ancestors(model: Path, manifest: Manifest) -> Iterator[Ancestor]:
    """Everything that a model was made from, the rawest first, each once."""
    found: dict[str, Ancestor] = {}

    def follow(inputs: dict[str, str]) -> None:
        for path, content in inputs.items():
            if path not in found:
                folder = _folder(model, Path(path))
                ancestor = Ancestor(path, content, None if folder is None else Manifest.read(folder))
                if ancestor.manifest is not None:
                    follow(ancestor.manifest.inputs)
                found[path] = ancestor

    follow(manifest.inputs)
    yield from found.values()


def _folder(model: Path, path: Path) -> Path | None:
    """The folder with the manifest of an input: itself, or that which holds it. Paths are those of the run, so they
    count from where it was started: here, or some folder above the model."""
    for start in (Path.cwd(), *model.resolve().parents):
        place = start / path
        if place.exists():
            near = (place, place.parent, place.parent.parent)
            return next((folder for folder in near if (folder / FILE_NAME).exists()), None)
    return None


def _scores(roots: Sequence[Path], model_hash: str) -> list[dict[str, Any]]:
    """A row for each metric that was measured on these weights."""
    folders: dict[Path, Manifest] = {}
    for root in roots:
        for depth in range(_DEPTH):
            for path in sorted(root.glob("*/" * depth + FILE_NAME)):
                folders[path.parent.resolve()] = Manifest.read(path.parent)
    checks = [Contamination.read(folder) for folder, m in folders.items() if m.stage == "contamination"]
    rows = []
    for folder, manifest in folders.items():
        if manifest.stage == "evaluate" and model_hash in manifest.inputs.values():
            rows += list(_rows_of(folder, read_json(folder / "results.json"), checks))
    return rows


def _rows_of(folder: Path, results: dict[str, Any], checks: Sequence[Contamination]) -> Iterator[dict[str, Any]]:
    tasks = results.get("tasks", {})
    samples = read_samples(folder) if tasks else {}
    for task, result in tasks.items():
        for place, (metric, found) in enumerate(result["metrics"].items()):
            check = next((check for check in checks if task in check.clean), None)
            of_questions = place == 0 and metric != "bits_per_byte"
            yield {
                "task": task,
                "kind": result["task"]["kind"],
                "metric": metric,
                "number": found["value"],
                "value": f"{found['value']:,.4g}",
                "interval": "unknown" if found["low"] is None else f"{found['low']:,.4g} to {found['high']:,.4g}",
                "count": f"{found['count']:,}",
                "contamination": contamination_line(check, task, first_values(samples[task])) if of_questions else "",
            }
    f1 = [row["word_f1"] for row in read_jsonl(folder / "answers.jsonl")]
    for metric, value in results.items():
        if isinstance(value, float) and not metric.startswith(("gzip", "generation")) and "gram_" not in metric:
            low, high = estimate(f1).interval if metric == "answer_word_f1" else (-math.inf, math.inf)
            yield {
                "task": folder.name,
                "kind": "held_out",
                "metric": metric,
                "number": value,
                "value": f"{value:,.4g}",
                "interval": "unknown" if math.isinf(low) else f"{low:,.4g} to {high:,.4g}",
                "count": f"{results.get('num_questions', 0):,}" if "answer" in metric else "all held out",
                "contamination": "not checked",
            }


def _front_matter(name: str, licence: str | None, scores: Sequence[dict[str, Any]]) -> str:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["kind"],
            dataset_config=row["task"],
            dataset_name=row["task"],
            metric_type=row["metric"],
            metric_value=row["number"],
            metric_args={"interval": row["interval"], "count": row["count"]},
        )
        for row in scores
        if math.isfinite(row["number"])
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licence or "unknown",
        tags=["llama", "puna"],
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _summary(config: LlamaConfig, trainings: Sequence[Manifest]) -> str:
    made = ", then ".join(f"`puna {manifest.stage}`" for manifest in trainings)
    return (
        f"A language model of the Llama family with {count_parameters(config):,} parameters"
        + (f", made by {made}." if made else "; how it was made is unknown.")
        + " It loads in `transformers` and in Puna."
    )


def _model(config: LlamaConfig) -> list[tuple[str, str]]:
    heads = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"
    return [
        ("parameters", f"{count_parameters(config):,}"),
        ("layers", f"{config.num_layers}, width {config.dim}, feed-forward {config.hidden_dim}"),
        ("attention", heads),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.context_length:,} tokens"),
    ]


def _data(ancestors: Sequence[Ancestor]) -> Iterator[dict[str, str]]:
    """A row for each stage that made data; two of its files are one row."""
    counts = ("num_documents", "num_bytes", "num_tokens", "num_questions", "vocab_size", "num_held_out_documents")
    seen = []
    for ancestor in ancestors:
        manifest = ancestor.manifest
        if manifest is None or manifest.stage in _TRAININGS or manifest in seen:
            continue
        seen.append(manifest)
        known = [(key.removeprefix("num_").replace("_", " "), manifest.results.get(key)) for key in counts]
        sources = manifest.config.get("sources") or []
        named = [str(source["read"].get("path", source["read"]["kind"])) for source in sources]
        if manifest.config.get("source"):
            named.append(str(manifest.config["source"]))
        yield {
            "stage": manifest.stage,
            "path": ancestor.path,
            "contents": ", ".join(f"{value:,} {name}" for name, value in known if value is not None) or "unknown",
            "sources": ", ".join(f"`{name}`" for name in named or manifest.inputs) or "unknown",
        }


def _training(manifest: Manifest) -> dict[str, str]:
    train, results = manifest.config.get("train", {}), manifest.results
    parts = []
    if {"steps", "batch_rows", "row_length"} <= train.keys():
        tokens = train["steps"] * train["batch_rows"] * train["row_length"]
        parts.append(
            f"{train['steps']:,} steps of {train['batch_rows']:,} rows of {train['row_length']:,} tokens "
            f"(at most {tokens:,} tokens)"
        )
    if optimizer := train.get("optimizer"):
        parts.append(f"{optimizer['kind']}, learning rate {optimizer['learning_rate']:g}")
    parts += [f"{key} {train[key]}" for key in ("precision", "seed") if key in train]
    for key, label in (("train_loss", "training loss at the end"), ("validation_loss", "held-out loss at the end")):
        if isinstance(results.get(key), float):
            unit = " nats a token" if manifest.stage == "pretrain" else ""
            parts.append(f"{label} {results[key]:.3f}{unit}")
    if isinstance(results.get("seconds"), float):
        parts.append(f"{results['seconds']:,.0f} s")
    return {
        "stage": manifest.stage,
        "created": manifest.created,
        "code_version": manifest.code_version,
        "machine": manifest.machine,
        "text": "; ".join(parts) + "." if parts else "the manifest holds no more about it.",
    }


def _limits(config: LlamaConfig, trainings: Sequence[Manifest], scores: Sequence[dict[str, Any]]) -> list[str]:
    limits = [f"Texts beyond {config.context_length:,} tokens are beyond what it was meant for."]
    stages = {manifest.stage for manifest in trainings}
    if not stages:
        limits.append("Data, training and purpose are unknown.")
    if stages == {"pretrain"}:
        limits.append("It was trained to continue text only, not to follow instructions or to answer.")
    if not stages & {"align", "reinforce"}:
        limits.append("Nothing on record was done to make its answers safe, true or polite.")
    if not any(row["contamination"].startswith("contamination, against") for row in scores):
        limits.append("Whether evaluation questions stand in its training text was not checked.")
    limits.append("Which languages, people and views its data leave out is not on record, nor is bias measured here.")
    return limits


def _licence(licence: str | None, ancestors: Sequence[Ancestor]) -> str:
    raw = [f"`{a.path}`" for a in ancestors if a.manifest is None]
    said = f"{licence}, as given by whoever wrote this card." if licence else "Unknown: nobody has given one."
    origins = f" The model was made from {', '.join(raw)}, whose licences the manifests do not record." if raw else ""
    return said + (origins or " The licences of its data are not on record.")


def _what(ancestor: Ancestor) -> str:
    return "raw, or its manifest is gone" if ancestor.manifest is None else f"puna {ancestor.manifest.stage}"
