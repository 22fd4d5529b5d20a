"""`puna finetune`: teach a pretrained model to answer, or to classify, tag and find."""

import torch.distributed as dist

from puna.finetune.config import FinetuneConfig
from puna.finetune.instructions import tune
from puna.finetune.tasks.head import tune_task
from puna.parallel.mesh import joined_processes
from puna.runtime.errors import InputError

__all__ = ["FinetuneConfig", "main"]


def main(config: FinetuneConfig) -> None:
    """Check the data, train, and write the model directory."""
    with joined_processes(config.train.device):
        _refuse_several_processes(config)
        if config.task is None:
            tune(config)
        else:
            tune_task(config, config.task)


def _refuse_several_processes(config: FinetuneConfig) -> None:
    names = [name for name in ("task", "peft", "selection") if getattr(config, name) is not None]
    names += ["sample_prompts"] * bool(config.sample_prompts) + ["neftune_alpha"] * bool(config.neftune_alpha)
    if names and dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError(f"{' and '.join(names)} work on one process; start the command without torchrun.")
