"""Tensors in files, whatever their format, and the one loop that copies them into a model."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.progress import Advance, progress

LISTED = 8
"""How many names of a kind an error spells out."""

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StoredTensors:
    """What a checkpoint holds, without having read it."""

    where: str
    """The checkpoint's path, for errors."""
    shapes: Mapping[str, Sequence[int]]
    """Name in the file -> shape of the whole tensor, shards joined."""
    dtypes: Mapping[str, torch.dtype]
    """Name in the file -> dtype."""
    read: Callable[[str], Tensor]
    """Reads one tensor by its name in the file, in Puna's layout."""
    file_name: Callable[[str], str]
    """A parameter's name in `Transformer` -> its name in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that holds every floating-point tensor exactly; the tensors' own where they agree."""
        return reduce(torch.promote_types, set(self.dtypes.values()) & set(FLOAT_DTYPES) or {torch.float32})


@torch.no_grad()
def copy_weights(model: Transformer, stored: StoredTensors, *, leave: Collection[str] = ()) -> None:
    """Fill every parameter and buffer of `model`, one tensor at a time, converting dtype and device.

    Everything is compared before the first byte is copied.

    Args:
        leave: names in `model` that are not filled.

    Raises:
        InputError: see `check_weights`.
    """
    check_weights(model, stored)
    wanted = {stored.file_name(name): tensor for name, tensor in named_tensors(model) if name not in leave}
    num_bytes = sum(parameter.nbytes for parameter in wanted.values())
    with transfer_progress("Reading weights", num_bytes) as advance:
        for name, parameter in wanted.items():
            parameter.copy_(stored.read(name))
            advance(parameter.nbytes)


def check_weights(model: Transformer, stored: StoredTensors) -> None:
    """See whether a checkpoint holds exactly what `model` needs, which may be on the meta device.

    A model with tied embeddings may find its output projection stored as well, if it is the same as the embedding.

    Raises:
        InputError: tensors are missing, unexpected or of another shape (all are named in one message), are
            quantised, or tied weights differ.
    """
    wanted = {stored.file_name(name): tensor for name, tensor in named_tensors(model)}
    embedding, output = stored.file_name("embedding.weight"), stored.file_name("output.weight")
    tied_twice = model.config.tie_embeddings and output in stored.shapes
    known = wanted.keys() | ({output} if tied_twice else set())

    missing = [name for name in wanted if name not in stored.shapes]
    unexpected = [name for name in stored.shapes if name not in known]
    misshaped = [
        f"{name} ({_shape(stored.shapes[name])}, expected {_shape(parameter.shape)})"
        for name, parameter in wanted.items()
        if name in stored.shapes and tuple(stored.shapes[name]) != tuple(parameter.shape)
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshaped)]
    if any(names for _, names in problems):
        found = "; ".join(f"{len(names)} {kind}: {shorten(names)}" for kind, names in problems if names)
        raise InputError(
            f"The weights in {stored.where} do not fit its configuration. Tensors {found}. The weights and the "
            "configuration beside them belong to different models, or a file is missing."
        )

    def is_odd(stored_dtype: torch.dtype, dtype: torch.dtype) -> bool:
        return stored_dtype not in FLOAT_DTYPES if dtype.is_floating_point else stored_dtype is not dtype

    odd = [f"{n} ({stored.dtypes[n]})" for n, tensor in wanted.items() if is_odd(stored.dtypes[n], tensor.dtype)]
    if odd:
        raise InputError(
            f"{stored.where} holds tensors that are not plain floating point: {shorten(odd)}. Puna reads "
            "checkpoints in float32, bfloat16 or float16, and those that `puna compress` makes; use the unquantised "
            "release of the model."
        )
    if tied_twice and not torch.equal(stored.read(embedding), stored.read(output)):
        raise InputError(
            f"{stored.where}: the configuration ties the output projection to the embedding, but {output} and "
            f"{embedding} differ. Set tie_word_embeddings to false in config.json if the model has both."
        )


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that a checkpoint holds: the parameters, and the integers and scales of quantised maps."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def shorten(names: Iterable[str]) -> str:
    """`names` in a row, the first few only if there are many."""
    names = list(names)
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


@contextlib.contextmanager
def transfer_progress(title: str, num_bytes: int) -> Iterator[Advance]:
    """Progress in bytes; silent below a gigabyte, which takes no time worth showing."""
    if num_bytes >= 1 << 30:
        with progress(f"{title} (bytes)", num_bytes) as advance:
            yield advance
    else:
        yield lambda amount=1, note="": None


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
