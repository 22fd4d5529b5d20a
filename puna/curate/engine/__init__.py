"""Runs a recipe of sources and steps: in parallel, in bounded memory, and on from where it was killed."""
