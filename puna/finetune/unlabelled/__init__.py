"""Texts without labels: those that a model labels itself and learns from, and those that a person should label."""
