"""How the engine runs when it evaluates: many short texts at once, most of which begin alike."""

from dataclasses import dataclass, replace

from puna.infer.config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationEngineConfig(EngineConfig):
    """The engine's settings with defaults for evaluation."""

    max_rows: int = 64
    """How many texts are computed at once."""
    step_tokens: int = 2048
    """Most tokens computed in one step."""
    block_size: int = 4
    """Tokens in a block of the cache. Only full blocks are shared between texts that begin alike: small ones let the
    answers to a question share nearly all of it."""
    cache_tokens: int | None = None
    """Tokens that the cache holds in all; absent is 8 times max_context. Texts that find no room wait."""

    def num_blocks(self, max_context: int) -> int:
        """Blocks of the cache; see `EngineConfig`."""
        if self.cache_tokens is None:
            return replace(self, cache_tokens=8 * max_context).num_blocks(max_context)
        return super().num_blocks(max_context)
