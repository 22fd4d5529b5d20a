"""What can be set about an engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puna.model.config import LlamaConfig
from puna.runtime.devices import DeviceName
from puna.runtime.errors import InputError

_DEFAULT_MAX_CONTEXT = 4096

_INVARIANT_CHUNK_BLOCKS = 4
"""Blocks in a piece of a prompt in batch-invariant mode."""


@dataclass(frozen=True)
class SpeculationConfig:
    """How the next tokens of a text are guessed, so that several can be computed at once. What is generated stays the
    same: greedy answers and seeded ones token by token (but for rounding), others in distribution."""

    kind: Literal["none", "lookup", "model", "layers"] = "none"
    """lookup: what followed when the last tokens occurred before, good where answers quote their prompts; model: a
    smaller model; layers: the first layers of the model itself, good where it was trained for that (LayerSkip)."""
    tokens: int = 5
    """Most guesses for a text in one step. Where few are right, fewer are made."""
    longest_match: int | None = None
    """lookup: how many last tokens are looked for first, 4 where absent; then fewer, down to shortest_match."""
    shortest_match: int | None = None
    """lookup: the fewest tokens that are looked for; 2 where absent."""
    model: Path | None = None
    """model: the smaller model's directory. Its tokenizer has to be the same."""
    layers: int | None = None
    """layers: how many layers guess."""

    def __post_init__(self) -> None:
        owners = {"longest_match": "lookup", "shortest_match": "lookup", "model": "model", "layers": "layers"}
        for name, kind in owners.items():
            if getattr(self, name) is not None and kind != self.kind:
                raise InputError(f'speculation.{name} is for kind = "{kind}", but kind is "{self.kind}".')
        if self.kind in ("model", "layers") and getattr(self, self.kind) is None:
            raise InputError(f'speculation.kind = "{self.kind}" needs speculation.{self.kind}, to say which guess.')
        if self.tokens < 1:
            raise InputError(f"speculation.tokens is {self.tokens}; it has to be at least 1.")
        if not 1 <= self.match_sizes[0] <= self.match_sizes[1]:
            raise InputError(
                f"speculation.shortest_match is {self.match_sizes[0]} and longest_match {self.match_sizes[1]}; the one "
                "has to be at least 1, and the other no less."
            )

    @property
    def match_sizes(self) -> tuple[int, int]:
        """Shortest and longest run of tokens that is looked for."""
        shortest, longest = self.shortest_match, self.longest_match
        if shortest is None:
            shortest = 2 if longest is None else min(2, longest)
        return shortest, max(4, shortest) if longest is None else longest


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and in what precision a model computes, how much at once, and how much room its cache takes."""

    device: DeviceName = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and activations; auto is the one in which the weights are stored. With auto, 4-bit integers
    of a GGUF file (Q4_0) stay such on a CPU, and activations are rounded to 8 bits before they are multiplied."""
    weights: Literal["memory", "disk"] = "memory"
    """disk leaves a model that is larger than the memory on the disk, from where every step reads each layer while the
    one before it computes. Slow, so best with many texts at once."""
    tensor_parallel: int = 1
    """Processes that share each layer, heads and channels, for a model that fits into no single one. They are started
    on this machine; on GPUs each takes one."""
    pipeline_parallel: int = 1
    """Groups of layers, each in processes of its own; long prompts go through them in pieces, side by side."""
    num_threads: int = 0
    """CPU threads of each process; 0 shares out every core that this one may run on."""
    max_rows: int = 8
    """How many texts are generated at once; further ones wait."""
    max_context: int | None = None
    """Longest prompt and answer together, in tokens; absent is the model's own context, but at most 4096, as few who
    load a model meant for 131,072 tokens have the memory for it."""
    step_tokens: int = 512
    """Most tokens computed in one step. Longer prompts are computed in pieces, between which the others go on."""
    block_size: int = 16
    """Tokens in a block of the cache. Only full blocks are shared between texts that begin alike."""
    cache_tokens: int | None = None
    """Tokens that the cache holds in all; absent is max_rows times max_context."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "float8"] = "auto"
    """Precision of the cache; auto is that of the activations. int8 and float8 (e4m3) have a scale for each token and
    head and take about half the memory of bfloat16; where there is enough memory, they save no time."""
    overcommit: float = 1.0
    """How many times the cache is given away, counting each text at its longest. Above 1 more texts run at once, but
    one may have to be computed again."""
    prefix_cache: bool = True
    """Whether a prompt that begins like an earlier text takes over what was computed for that."""
    batch_invariant: bool = False
    """Whether a text's tokens and log-probabilities are the same, to the last bit, whatever runs beside it. Slower:
    every prompt is computed by itself."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """LoRA adapters to serve beside each other, and beside the bare model: name -> adapter directory, as PEFT writes
    it."""
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    """Guesses at the next tokens, checked several at a time."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "step_tokens", "block_size", "tensor_parallel", "pipeline_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; the engine needs at least 1.")
        if self.overcommit < 1:
            raise InputError(f"overcommit is {self.overcommit}; at 1 the cache is given away once, less is no use.")
        if self.num_processes > 1 and (self.adapters or self.weights == "disk" or self.speculation.kind == "layers"):
            raise InputError(
                "tensor_parallel and pipeline_parallel go neither with adapters (merge one into the model) nor with "
                'weights = "disk" nor with speculation by layers. Leave one of them out.'
            )
        if self.weights == "disk" and self.adapters:
            raise InputError(
                'weights = "disk" does not go with adapters: there is no layer in memory to put them on. Merge one '
                "into the model, and use that."
            )
        if self.weights == "disk" and self.speculation.kind == "layers":
            raise InputError(
                'weights = "disk" does not go with speculation by layers, which would read the first of them twice. '
                'Use speculation.kind = "model", with a small model that is in memory.'
            )
        if self.batch_invariant and self.speculation.kind != "none":
            raise InputError(
                "batch_invariant does not go with speculation: how many guesses are checked at once depends on what "
                "runs beside a text, and rounding on that. Leave one of them out."
            )

    @property
    def num_processes(self) -> int:
        """Processes that compute the model."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def chunk(self) -> int | None:
        """Tokens in a piece of a prompt, where that is fixed."""
        return _INVARIANT_CHUNK_BLOCKS * self.block_size if self.batch_invariant else None

    def context_of(self, model: LlamaConfig) -> int:
        """Longest prompt and answer together for a model.

        Raises:
            InputError: `max_context` is longer than the model is meant for, or too short for anything.
        """
        longest = model.context_length
        max_context = min(longest, _DEFAULT_MAX_CONTEXT) if self.max_context is None else self.max_context
        if not 2 <= max_context <= longest:
            raise InputError(
                f"max_context is {max_context}, but it has to be at least 2 and at most the {longest} tokens that the "
                "model is meant for."
            )
        return max_context

    def num_blocks(self, max_context: int) -> int:
        """Blocks of the cache; a text's last one may be partly empty.

        Raises:
            InputError: `cache_tokens` is too small for a single text of `max_context` tokens.
        """
        if self.cache_tokens is None:
            return -(-self.max_rows * max_context // self.block_size) + self.max_rows
        if self.cache_tokens < max_context:
            raise InputError(
                f"cache_tokens is {self.cache_tokens}, but one text alone may take {max_context} (max_context). Raise "
                "the one, or lower the other."
            )
        return -(-self.cache_tokens // self.block_size) + 1
