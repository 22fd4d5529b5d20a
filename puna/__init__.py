"""Puna raises language models of the Llama family: from raw text to a served assistant."""

__version__ = "0.1.0"
