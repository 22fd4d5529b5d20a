"""Processes, and the axes along which they share the work."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store

from puna.parallel.config import ParallelConfig
from puna.runtime.devices import DeviceName, available_cores
from puna.runtime.errors import InputError
from puna.runtime.progress import console


@contextmanager
def joined_processes(device: DeviceName) -> Iterator[None]:
    """Join the processes that `torchrun` started, for as long as the block runs; alone, do nothing.

    Only the first process tells the user about progress. Each takes the GPU of its number on its machine.

    Raises:
        InputError: more processes on this machine than it has GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started more processes on this machine than it has GPUs ({torch.cuda.device_count()}). "
                "Lower --nproc-per-node."
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    # torch warns that two exchanges of one number at the end of a step, and those of an export, could be one each.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dist.init_process_group(
        backend, store=_store(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    loud, console.quiet = console.quiet, dist.get_rank() > 0
    try:
        yield
    finally:
        console.quiet = loud
        dist.destroy_process_group()


def _store() -> Store:
    """Where the processes find each other: at the address that they were started with.

    torchrun's own store outlives a restart, with the addresses of processes that are dead; so each start has its own
    part of it.
    """
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not held_by_torchrun and os.environ["RANK"] == "0",
    )
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def is_first_process() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def threads_of_each_process() -> int:
    """CPU threads for each process of this machine, so that together they use every core once."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Mesh:
    """All processes, seen in two ways; both are absent where there is only one.

    Their order is the same in both: neighbours talk most, so `tensor` is innermost and `pipeline` outermost.
    """

    parameters: DeviceMesh | None = None
    """By how parameters lie: pipeline, replicate, shard, tensor. Processes of `context` hold parts of the same row, but
    to a parameter this is just more data: they are part of shard where it is used, of replicate otherwise."""
    batch: DeviceMesh | None = None
    """By how a batch lies: pipeline, rows, context, tensor."""

    def size(self, axis: str) -> int:
        """Number of processes along an axis of either view."""
        view = self._view(axis)
        return 1 if view is None else view[axis].size()

    def rank(self, axis: str) -> int:
        """This process's place along an axis of either view, from 0."""
        view = self._view(axis)
        return 0 if view is None else view[axis].get_local_rank()

    def axis(self, axis: str) -> DeviceMesh:
        """The processes that differ from this one only along an axis."""
        view = self._view(axis)
        assert view is not None, "one process has no axes"
        return view[axis]

    @property
    def num_processes(self) -> int:
        """All of them."""
        return 1 if self.parameters is None else self.parameters.size()

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, in place."""
        if self.batch is not None:
            dist.all_reduce(values)
        return values

    def _view(self, axis: str) -> DeviceMesh | None:
        return self.batch if axis in ("rows", "context") else self.parameters


def build_mesh(config: ParallelConfig, device: torch.device) -> Mesh:
    """Lay the processes out along the axes of `config`.

    Raises:
        InputError: their number is not the product of the degrees.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    fixed = config.shard * config.tensor * config.context * config.pipeline
    data = config.data or max(1, world // fixed)
    if data * fixed != world:
        degrees = ", ".join(f"{name} {getattr(config, name)}" for name in ("shard", "tensor", "context", "pipeline"))
        wanted = f"data {data} x {fixed}" if config.data else f"a multiple of {fixed}"
        raise InputError(
            f"There are {world} processes, but train.parallel ({degrees}) is for {wanted}: "
            "start another number with torchrun --nproc-per-node, or change a degree."
        )
    if world == 1:
        return Mesh()
    # Which axis the parameters' view gives the processes of `context` to.
    replicate, shard = (data * config.context, 1) if config.shard == 1 else (data, config.shard * config.context)
    return Mesh(
        init_device_mesh(
            device.type,
            (config.pipeline, replicate, shard, config.tensor),
            mesh_dim_names=("pipeline", "replicate", "shard", "tensor"),
        ),
        init_device_mesh(
            device.type,
            (config.pipeline, data * config.shard, config.context, config.tensor),
            mesh_dim_names=("pipeline", "rows", "context", "tensor"),
        ),
    )
