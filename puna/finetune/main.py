"""`puna finetune`: teach a pretrained model to answer, to classify, tag and find, or to write texts of a kind."""

import torch.distributed as dist

from puna.finetune.config import FinetuneConfig
from puna.finetune.instructions import tune
from puna.finetune.selection import Judge
from puna.finetune.tasks.tune import tune_task
from puna.finetune.text.task import TextTask
from puna.finetune.text.tune import tune_text
from puna.parallel.mesh import joined_processes
from puna.runtime.errors import InputError

__all__ = ["FinetuneConfig", "main"]


def main(config: FinetuneConfig, judge: Judge | None = None) -> None:
    """Check the data, train, and write the model directory.

    Args:
        config: what to do.
        judge: asked after each validation whether to end there, where `config.selection` is set.
    """
    with joined_processes(config.train.device):
        _refuse_several_processes(config)
        if isinstance(config.task, TextTask):
            tune_text(config, config.task, judge)
        elif config.task or config.tasks:
            tune_task(config, judge)
        else:
            tune(config, judge)


def _refuse_several_processes(config: FinetuneConfig) -> None:
    alone = ("task", "peft", "selection", "regularization", "earlier")
    names = [name for name in alone if getattr(config, name) is not None]
    names += ["tasks"] * bool(config.tasks)
    names += ["sample_prompts"] * bool(config.sample_prompts) + ["neftune_alpha"] * bool(config.neftune_alpha)
    if names and dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError(f"{' and '.join(names)} work on one process; start the command without torchrun.")
