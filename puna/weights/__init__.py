"""Weights between Puna, Hugging Face, Meta and llama2.c: names, readers, writers, parity check."""
