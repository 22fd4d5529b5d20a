"""`puna compress`: a model with weights of 8 or 4 bits, and a report of what that cost.

It stands here, and not in `puna.compress`, because it measures: imports point to earlier rows only.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from puna.compress.apply import choose, fit, linear_names, quantize
from puna.compress.quantization import Quantization
from puna.config import to_plain
from puna.evaluate.variants import Comparison, compare
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.runtime.devices import DeviceName, open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents
from puna.runtime.manifest import FILE_NAME as MANIFEST_FILE
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import progress, say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, resolve, save_model
from puna.weights.names import to_hf

STAGE = "compress"

_OWN_TEXTS = 8
"""How many texts the original writes where no documents are named."""


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Make a model smaller, and measure it beside the original."""

    model: str
    """The original: a model directory, or any checkpoint that `puna convert` reads, with a tokenizer."""
    output: Path
    """Model directory to write. It has to be absent or empty, or hold an earlier result, which is replaced."""
    weights: Quantization = field(default_factory=Quantization)
    """How its weights are stored."""
    documents: Path | None = None
    """Text to measure on: Parquet or JSON Lines with "text", a file or a folder of them. Absent: text that the original
    writes, which shows what changes, but no perplexity to compare with others'."""
    max_tokens: int = 8192
    """Measure on at most so many tokens; 0 measures nothing."""
    window: int = 512
    """Tokens that the models see at once in measuring."""
    device: DeviceName = "auto"
    """Where to measure."""
    num_threads: int = 0
    """CPU threads; 0 is every core that the process may run on."""

    def __post_init__(self) -> None:
        if self.max_tokens < 0 or self.window < 1:
            raise ValueError("max_tokens has to be at least 0, and window at least 1.")


def main(config: CompressConfig) -> None:
    """Quantise, write, read back, measure, and only then put the result at its place.

    Raises:
        InputError: the model cannot be read or quantised so, the output holds something else, or the documents hold
            no text.
    """
    source = resolve(config.model)
    _refuse_output(config.output, source)
    device = open_device(config.device, config.num_threads)
    tokenizer = load_tokenizer(source)
    original = load_model(source, device=device)
    texts = _texts(config, original, tokenizer) if config.max_tokens else []
    variant = load_model(source, device=device) if texts else original
    chosen, uneven = choose(variant, config.weights)
    if uneven:
        say(f"{len(uneven)} maps stay as they are: their inputs are no multiple of group_size. {', '.join(uneven[:8])}")
    num_weights = sum(variant.get_submodule(name).get_parameter("weight").numel() for name in chosen)
    with progress("Quantising (weights)", total=num_weights) as advance:
        quantize(variant, config.weights, lambda amount: advance(amount))

    paths = [Path(source), *([config.documents] if config.documents else [])]
    manifest = Manifest(STAGE, to_plain(config), {str(path): content_hash(path) for path in paths})
    kept = tuple(to_hf(f"{name}.weight").removesuffix(".weight") for name in linear_names(variant))
    with atomic_path(config.output) as fresh:
        save_model(variant, fresh, tokenizer=tokenizer, manifest=manifest, quantization=config.weights.to_config(kept))
        del variant
        if texts:
            read_back = load_model(fresh, device=device, fit=fit)
            comparison = compare(original, read_back, texts, config.window)
            manifest.results.update(asdict(comparison))
            manifest.write(fresh)
    if texts:
        print_comparison(comparison)
    say(f"Done: {config.output}")


def print_comparison(comparison: Comparison) -> None:
    """The two models as a table."""
    c = comparison
    rows = [
        ("", "original", "compressed"),
        ("size of the weights, MB", f"{c.size_bytes_of_original / 1e6:,.1f}", f"{c.size_bytes / 1e6:,.1f}"),
        ("perplexity", f"{c.perplexity_of_original:,.4f}", f"{c.perplexity:,.4f}"),
        ("mean KL from the original, nats", "0", f"{c.mean_kl_nats:.5f}"),
        ("same likeliest token, %", "100", f"{100 * c.greedy_agreement:.2f}"),
    ]
    for what, *values in rows:
        say(f"{what:<36}" + "".join(f"{value:>14}" for value in values))
    say(f"Measured on {c.num_tokens:,} tokens.")


def _texts(config: CompressConfig, original: Transformer, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids to measure on, `max_tokens` at most."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    texts: list[list[int]] = []
    left = config.max_tokens
    if config.documents is None:
        window = min(config.window, original.config.context_length, -(-config.max_tokens // _OWN_TEXTS))
        engine = Engine(original, tokenizer, EngineConfig(max_rows=_OWN_TEXTS, max_context=max(window + 1, 2)))
        first = bos or [tokenizer.pad_id]
        sampling = SamplingParams(max_tokens=window, temperature=1.0, seed=0, ignore_eos=True)
        with progress("The original writes texts to measure on", total=_OWN_TEXTS) as advance:
            written = engine.generate([first] * _OWN_TEXTS, sampling, finished=advance)
        return [[*first, *completion.ids] for completion in written]
    for row in read_documents(config.documents):
        ids = [*bos, *tokenizer.encode(row["text"])][: left + 1]
        if len(ids) > 1:
            texts.append(ids)
            left -= len(ids) - 1
        if left < 1:
            break
    if not texts:
        raise InputError(f"{config.documents} holds no text.")
    return texts


def _refuse_output(output: Path, source: Path) -> None:
    if source.resolve().is_relative_to(output.resolve()):
        raise InputError(f"The output {output} holds the model {source}, which would be lost.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST_FILE).exists() or Manifest.read(output).stage != STAGE:
        raise InputError(f"{output} exists and is not an earlier result of this stage. Choose another, or remove it.")
