"""What can be set about an engine."""

from dataclasses import dataclass
from typing import Literal

from puna.runtime.devices import DeviceName
from puna.runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and in what precision a model computes, how much at once, and how much room its cache takes."""

    device: DeviceName = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights, activations and cache; auto is the one in which the weights are stored."""
    num_threads: int = 0
    """CPU threads; 0 is every core that the process may run on."""
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
    overcommit: float = 1.0
    """How many times the cache is given away, counting each text at its longest. Above 1 more texts run at once, but
    one may have to be computed again."""
    prefix_cache: bool = True
    """Whether a prompt that begins like an earlier text takes over what was computed for that."""
    batch_invariant: bool = False
    """Whether a text's tokens and log-probabilities are the same, to the last bit, whatever runs beside it. Slower:
    every prompt is computed by itself."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "step_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; the engine needs at least 1.")
        if self.overcommit < 1:
            raise InputError(f"overcommit is {self.overcommit}; at 1 the cache is given away once, less is no use.")
