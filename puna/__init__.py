"""Puna raises language models of the Llama family: from raw text to a served assistant."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna.infer.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM"]


def __getattr__(name: str) -> Any:
    """`puna.LLM`, imported when it is asked for, so that importing puna costs nothing."""
    if name == "LLM":
        from puna.infer.llm import LLM

        return LLM
    raise AttributeError(f"module 'puna' has no attribute {name!r}")
