"""Inference over several processes, for models that fit into no single one.

The first process has the engine, the embedding and the output projection; to it the layers look like one module that
takes long. The others follow it: they compute their part of the layers whenever it does, and keep their part of the
cache. Only integers, and the hidden states between stages, travel.

Shapes: N tokens of a forward, D model dimension.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from puna.compress.apply import fit
from puna.infer.cache import KVPool, PagedAttend
from puna.infer.parallel_weights import BY_INPUTS, Place, load_part
from puna.model.attend import Attend
from puna.model.rope import Rotation, frequencies, rotation
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError

_MICRO_BATCH_TOKENS = 64
"""With fewer tokens than that a stage is as slow as its weights are read, so that halving a batch saves nothing."""

_FOREVER = timedelta(days=365)
"""A follower waits for as long as nobody asks anything. Where a process dies the others notice at once."""


class Piece(NamedTuple):
    """New tokens of a forward, as `PagedAttend` takes them."""

    tables: NDArray[np.int64]
    starts: list[int]
    counts: list[int]
    num_padding: int
    alone: bool

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return sum(self.counts) + self.num_padding


def split(whole: Piece, num_pieces: int) -> list[Piece]:
    """Cut a forward into pieces of about equally many tokens, each at least one, to be computed in order.

    A sequence may go on in the next piece.
    """
    num_tokens = sum(whole.counts)
    pieces = []
    for number in range(num_pieces):
        first, last = num_tokens * number // num_pieces, num_tokens * (number + 1) // num_pieces
        rows, starts, counts = [], [], []
        end = 0
        for row, (start, count) in enumerate(zip(whole.starts, whole.counts, strict=True)):
            begin, end = end, end + count
            low, high = max(begin, first), min(end, last)
            if low < high:
                rows.append(row)
                starts.append(start + low - begin)
                counts.append(high - low)
        pieces.append(Piece(whole.tables[rows], starts, counts, 0, whole.alone))
    return pieces


class Stage:
    """What one process computes.

    Args:
        model: its part, see `load_part`.
        place: where that is.
        group: the processes of this stage, where there are several.
    """

    def __init__(self, model: Transformer, place: Place, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.layers, self.config, self.place = model.layers, model.config, place
        self.pool: KVPool | None = None  # this process's part of the cache, once it is open
        self._group, self._device, self._rank = group, device, dist.get_rank()
        if group is not None:
            for layer in self.layers:
                for name in BY_INPUTS:
                    layer.get_submodule(name).register_forward_hook(self._add_up)

    def _add_up(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        dist.all_reduce(output, group=self._group)

    @torch.inference_mode()
    def compute(self, pieces: list[Piece], dtype: torch.dtype, x_1ND: Tensor | None = None) -> Tensor | None:
        """Take this process's part in a forward.

        Args:
            x_1ND: what goes into the first layer, for the first process.

        Returns:
            What comes out of the last one, to the first process.
        """
        assert self.pool is not None
        place = self.place
        sizes = [piece.num_tokens for piece in pieces]
        inputs = (
            [self._empty(size, dtype) for size in sizes] if x_1ND is None else list(torch.split(x_1ND, sizes, dim=1))
        )
        outputs: list[Tensor] = []
        arriving: list[Any] = []
        if x_1ND is not None and place.num_stages > 1:
            outputs = [self._empty(size, dtype) for size in sizes]
            last = place.num_parts * (place.num_stages - 1)
            arriving = [dist.irecv(output, last, tag=number) for number, output in enumerate(outputs)]
        awaited: list[Any] = []
        if place.stage > 0:
            awaited = [dist.irecv(x, self._rank - place.num_parts, tag=number) for number, x in enumerate(inputs)]
        leaving: list[Any] = []
        for number, piece in enumerate(pieces):
            if place.stage == 0 and self._group is not None:
                inputs[number] = inputs[number].contiguous()
                dist.broadcast(inputs[number], 0, group=self._group)
            if awaited:
                awaited[number].wait()
            output = self._through(piece, inputs[number])
            if place.stage < place.num_stages - 1:
                leaving.append((dist.isend(output, self._rank + place.num_parts, tag=number), output))
            elif place.num_stages > 1 and place.part == 0:
                leaving.append((dist.isend(output, 0, tag=number), output))
            elif place.num_stages == 1:
                outputs.append(output)
        for work in (*arriving, *(sent for sent, _ in leaving)):
            work.wait()
        return torch.cat(outputs, dim=1) if x_1ND is not None else None

    def _empty(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(1, num_tokens, self.config.dim, dtype=dtype, device=self._device)

    def _through(self, piece: Piece, x_1ND: Tensor) -> Tensor:
        assert self.pool is not None
        attend = PagedAttend(
            self.pool, piece.tables, piece.starts, piece.counts, num_padding=piece.num_padding, alone=piece.alone
        )
        turn = rotation(attend.positions_1N, frequencies(self.config, self._device), x_1ND.dtype)
        for layer in self.layers:
            x_1ND = layer(x_1ND, turn, attend)
        return x_1ND.contiguous()


class ParallelLayers(nn.Module):
    """Stands for all layers of a model in the first process, and has all processes compute them."""

    def __init__(self, team: "Team", stage: Stage) -> None:
        super().__init__()
        self._team = team
        self._stage = stage

    def open_cache(self, pool: KVPool) -> None:
        """Have all processes make room for their part of the cache.

        Raises:
            InputError: one has not enough memory.
        """
        self._stage.pool = pool
        self._team.ask("open_cache", pool.num_blocks, pool.block_size, pool.dtype, pool.activations)

    def forward(self, x_1ND: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        if not isinstance(attend, PagedAttend) or attend.pool is not self._stage.pool:
            raise InputError("A model over several processes generates and scores texts; it does nothing else.")
        whole = Piece(attend.tables, list(attend.starts), list(attend.counts), attend.num_padding, attend.alone)
        num_pieces = 1
        if self._stage.place.num_stages > 1 and not whole.alone:
            num_pieces = min(2 * self._stage.place.num_stages, max(1, whole.num_tokens // _MICRO_BATCH_TOKENS))
        pieces = [whole] if num_pieces == 1 else split(whole, num_pieces)
        with self._team.unbroken():
            self._team.tell("compute", pieces, x_1ND.dtype)
            output_1ND = self._stage.compute(pieces, x_1ND.dtype, x_1ND)
        assert output_1ND is not None
        return output_1ND


class Follower:
    """A process that does what the first one says, until that ends."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._stage: Stage | None = None
        self._model: Transformer | None = None

    def follow(self) -> None:
        """Obey until told to stop."""
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, 0)
            if message[0] is None:
                return
            name, arguments = message[0]
            getattr(self, name)(*arguments)

    def load(self, path: Path, num_parts: int, num_stages: int, dtype: torch.dtype | None) -> None:
        """Load this process's part of a model."""
        with _reported():
            self._stage = open_stage(path, num_parts, num_stages, dtype, self._device)[1]

    def open_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype, activations: torch.dtype) -> None:
        """Make room for this process's part of the cache."""
        assert self._stage is not None
        with _reported():
            self._stage.pool = KVPool(
                self._stage.config,
                num_blocks=num_blocks,
                block_size=block_size,
                device=self._device,
                dtype=dtype,
                activations=activations,
            )

    def compute(self, pieces: list[Piece], dtype: torch.dtype) -> None:
        """Take part in a forward."""
        assert self._stage is not None
        self._stage.compute(pieces, dtype)


def open_stage(
    path: Path, num_parts: int, num_stages: int, dtype: torch.dtype | None, device: torch.device
) -> tuple[Transformer, Stage]:
    """Load this process's part of a model; all processes have to call it.

    Raises:
        InputError: see `load_part`.
    """
    groups = [dist.new_group(list(range(s * num_parts, (s + 1) * num_parts)), _FOREVER) for s in range(num_stages)]
    place = Place.of(dist.get_rank(), num_parts, num_stages)
    model = load_part(path, place, device=device, dtype=dtype, fit=fit)
    return model, Stage(model, place, groups[place.stage] if num_parts > 1 else None, device)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Tell all processes whether what is done in here has failed.

    Raises:
        InputError: it has, in any of them.
    """
    own = ""
    try:
        yield
    except InputError as error:
        own = str(error)
    errors = [""] * dist.get_world_size()
    dist.all_gather_object(errors, own)
    if dist.get_rank() == 0 and (first := next(filter(None, errors), None)):
        raise InputError(first)


class Team:
    """The first process's hold on the others, which it starts on this machine and which end with it.

    Args:
        num_processes: the first included.
        device: cpu; or cuda, where each process takes a GPU of its own.
        num_threads: CPU threads of each.

    Raises:
        InputError: there are fewer GPUs than processes, or processes work together here already.
    """

    def __init__(self, num_processes: int, device: torch.device, num_threads: int) -> None:
        if dist.is_initialized():
            raise InputError(
                "This process works together with others already, and can be part of one team only. End the other "
                "engine first, or give it the command without torchrun."
            )
        if device.type == "cuda" and torch.cuda.device_count() < num_processes:
            raise InputError(f"{num_processes} processes need a GPU each, but there are {torch.cuda.device_count()}.")
        self._broken = False
        store = TCPStore("127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False)
        command = [sys.executable, "-m", "puna.infer.parallel_worker", str(store.port), str(num_processes)]
        # In a session of their own an interrupt from the terminal does not reach them; they end with the first process.
        self._processes = [
            subprocess.Popen([*command, str(rank), device.type, str(num_threads)], start_new_session=True)
            for rank in range(1, num_processes)
        ]
        self.device = join(store, 0, num_processes, device.type)

    def load(self, path: Path, *, num_parts: int, num_stages: int, dtype: torch.dtype | None) -> Transformer:
        """A model whose layers all processes compute. What was loaded before cannot be used any more.

        Raises:
            InputError: see `load_part`.
        """
        self.tell("load", path, num_parts, num_stages, dtype)
        with _reported():
            model, stage = open_stage(path, num_parts, num_stages, dtype, self.device)
        model.layers = nn.ModuleList([ParallelLayers(self, stage)])
        return model

    def tell(self, name: str, *arguments: Any) -> None:
        """Have every follower call its method `name`."""
        dist.broadcast_object_list([(name, arguments)], 0)

    def ask(self, name: str, *arguments: Any) -> None:
        """The same, for what can fail.

        Raises:
            InputError: it has failed in one of them.
        """
        self.tell(name, *arguments)
        with _reported():
            pass

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """For what all processes have to finish together: after a failure none of them knows where the others are."""
        if self._broken:
            raise RuntimeError("The processes of this model have lost each other; start again.")
        self._broken = True
        yield
        self._broken = False

    def close(self) -> None:
        """End the followers; has to be called."""
        if not self._processes:
            return
        processes, self._processes = self._processes, []
        if self._broken:
            for process in processes:
                process.terminate()
        else:
            dist.broadcast_object_list([None], 0)
        for process in processes:
            process.wait()
        dist.destroy_process_group()


def join(store: TCPStore, rank: int, num_processes: int, kind: str) -> torch.device:
    """Become one of a team's processes; returns the device of this one."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_processes, timeout=_FOREVER)
    return device
