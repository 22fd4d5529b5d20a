"""Smaller models: weights as 8-bit or 4-bit integers, put into a model from outside, by name."""
