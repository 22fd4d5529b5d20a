"""Scaling laws: fitted to training runs, to say what a larger budget will buy and how best to spend it."""
