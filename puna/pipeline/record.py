"""What a run remembers of each stage."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageRecord:
    """What became of a stage."""

    name: str
    """Within the run; the output's folder name too."""
    command: str
    """Such as "pretrain"."""
    fingerprint: str
    """Hash over configuration, inputs and code: equal means nothing to do."""
    seconds: float
    """Wall time that it took."""
    done: bool
    """False while it runs, and if it was interrupted."""
