"""Runs stages on two forked processes, one after the other; see test_processes.py, which calls it."""

import json
import os
import sys
import traceback

import torch
from meeting import meeting_place

from puna.config import load_config
from puna.pipeline.stages import load_stage


def run(commands: list[tuple[str, list[str]]]) -> None:
    """Each command as torchrun would start it."""
    for number, (stage, settings) in enumerate(commands):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # gives each a part of the store
        kind, main = load_stage(stage)
        main(load_config(kind, None, settings))


def main() -> int:
    """The number of processes that failed."""
    torch.set_num_threads(1)
    commands = json.loads(sys.argv[1])
    for stage, _ in commands:
        load_stage(stage)  # imported once, before the processes part
    ranks = []
    with meeting_place() as place:
        for rank in range(2):
            if child := os.fork():
                ranks.append(child)
                continue
            os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            try:
                run(commands)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return sum(os.waitpid(child, 0)[1] != 0 for child in ranks)


if __name__ == "__main__":
    sys.exit(main())
