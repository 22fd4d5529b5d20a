"""Deduplication of every kind, and decontamination."""
