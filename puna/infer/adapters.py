"""LoRA adapters served beside each other on one model: a batch mixes texts of all of them.

The model is left as it is. A hook on each linear map that some adapter targets adds to every token's result the update
of the adapter that its text asks for.

Shapes: M tokens, N outputs, K inputs, S ranks of all adapters of a map side by side.
"""

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from puna.model.transformer import Transformer
from puna.peft.files import read_adapter
from puna.peft.lora import LoRAConfig
from puna.runtime.errors import InputError

_MOST_MASKED_RANKS = 256
"""Up to so many ranks in all, steps that only decode compute the updates by all adapters and keep the right ones."""


@dataclass(frozen=True)
class Selection:
    """Which tokens of a forward belong to which adapter."""

    owners_M: Tensor
    """Number of each token's adapter, 0 for none."""
    groups: tuple[tuple[int, Tensor], ...]
    """(number of an adapter, the tokens that are its)."""
    decodes: bool
    """Each text has a single token in this forward."""
    alone: bool
    """The results may not depend on which texts run beside each other."""


class Updates:
    """The updates of one linear map by all adapters that have one for it."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._parts)

    def put(self, number: int, a_RK: Tensor, b_NR: Tensor) -> None:
        """Take in the update b a of the adapter `number`."""
        self._parts[number] = (a_RK, b_NR)
        self._stack()

    def drop(self, number: int) -> None:
        """Forget the adapter `number`."""
        del self._parts[number]
        if self._parts:
            self._stack()

    def _stack(self) -> None:
        self._a_SK = torch.cat([a_RK for a_RK, _ in self._parts.values()])
        self._b_NS = torch.cat([b_NR for _, b_NR in self._parts.values()], dim=1)
        ranks = [len(a_RK) for a_RK, _ in self._parts.values()]
        numbers = torch.tensor(list(self._parts), device=self._a_SK.device)
        self._owners_S = numbers.repeat_interleave(torch.tensor(ranks, device=self._a_SK.device))
        ends = torch.tensor(ranks).cumsum(0).tolist()
        spans = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
        self._spans = dict(zip(self._parts, spans, strict=True))
        # The stacks are all that is kept.
        self._parts = {n: (self._a_SK[span], self._b_NS[:, span]) for n, span in self._spans.items()}

    def add(self, x_MK: Tensor, y_MN: Tensor, selection: Selection) -> None:
        """Add each token's update to `y_MN`, in place."""
        if selection.decodes and (selection.alone or len(self._owners_S) <= _MOST_MASKED_RANKS):
            self.add_masked(x_MK, y_MN, selection)
        else:
            self.add_grouped(x_MK, y_MN, selection)

    def add_grouped(self, x_MK: Tensor, y_MN: Tensor, selection: Selection) -> None:
        """Adapter by adapter: no needless product. The readable twin."""
        for number, tokens in selection.groups:
            if number in self._parts:
                a_RK, b_NR = self._parts[number]
                y_MN.index_add_(0, tokens, F.linear(F.linear(x_MK[tokens], a_RK), b_NR))

    def add_masked(self, x_MK: Tensor, y_MN: Tensor, selection: Selection) -> None:
        """All adapters in two products, with zeros where a token meets another's: few calls, always of one shape."""
        h_MS = F.linear(x_MK, self._a_SK)
        h_MS.masked_fill_(self._owners_S != selection.owners_M[:, None], 0)
        y_MN += F.linear(h_MS, self._b_NS)


class Adapters:
    """The adapters that are loaded on a model, by name.

    Args:
        model: gets a hook on each map that an adapter targets; nothing else of it changes.

    Attributes:
        names: of those that can be asked for.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._numbers: dict[str, int] = {}
        self._last_number = 0
        self._num_users: Counter[int] = Counter()
        self._updates: dict[str, Updates] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._selection: Selection | None = None

    @property
    def names(self) -> list[str]:
        """In the order of loading."""
        return list(self._numbers)

    def check(self, name: str) -> None:
        """See whether an adapter is loaded.

        Raises:
            InputError: it is not.
        """
        if name not in self._numbers:
            has = f"There are: {', '.join(self._numbers)}." if self._numbers else "There are none."
            raise InputError(f"There is no adapter {name!r}. {has}")

    def load(self, name: str, directory: Path) -> None:
        """Read an adapter directory in PEFT's form.

        Raises:
            InputError: the name is taken, or the directory cannot be read, or it does not fit the model, or it adapts
                the projection to the vocabulary. Nothing has changed then.
        """
        if name in self._numbers:
            raise InputError(f"There is an adapter {name!r} already; unload it first, or choose another name.")
        stored = read_adapter(directory)
        method = stored.method
        if not isinstance(method, LoRAConfig) or method.weight_decomposed or stored.whole:
            raise InputError(
                f"{directory} is no plain LoRA; of the adapters only these can be served beside each other. Merge it "
                "into its model where its method can be merged, and serve that."
            )
        if "output" in stored.tensors:
            raise InputError(
                f"{directory} adapts the projection to the vocabulary, which cannot be done text by text. Merge it "
                "into its model, and serve that."
            )
        stored.check(self._model)
        self._last_number += 1
        number = self._numbers[name] = self._last_number
        norm = self._model.norm.weight
        dtype = self._model.compute_dtype or norm.dtype
        for map_name, own in stored.tensors.items():
            a_RK, b_NR = own["lora_a"], own["lora_b"].float() * method.scale_of(map_name)
            updates = self._updates.setdefault(map_name, Updates())
            if not updates:
                hook = partial(self._add_update, updates)
                self._hooks[map_name] = self._model.get_submodule(map_name).register_forward_hook(hook)
            updates.put(number, a_RK.to(norm.device, dtype), b_NR.to(norm.device, dtype))

    def unload(self, name: str) -> None:
        """Let an adapter go. Texts that are being generated with it are finished.

        Raises:
            InputError: there is none of this name.
        """
        self.check(name)
        number = self._numbers.pop(name)
        if not self._num_users[number]:
            self._drop(number)

    def acquire(self, name: str | None) -> int:
        """The number of an adapter, for a text that needs it until `release`; 0 for no name.

        Numbers are never used twice, so that they say what a cache holds, whatever is loaded under the name later.

        Raises:
            InputError: there is none of this name.
        """
        if name is None:
            return 0
        self.check(name)
        number = self._numbers[name]
        self._num_users[number] += 1
        return number

    def release(self, number: int) -> None:
        """Undo an `acquire`."""
        if number:
            self._num_users[number] -= 1
            if not self._num_users[number] and number not in self._numbers.values():
                self._drop(number)

    def _drop(self, number: int) -> None:
        del self._num_users[number]
        for map_name, updates in list(self._updates.items()):
            updates.drop(number)
            if not updates:
                self._hooks.pop(map_name).remove()
                del self._updates[map_name]

    @contextmanager
    def selected(
        self, numbers: SequenceOf[int], counts: SequenceOf[int], *, num_padding: int = 0, alone: bool = False
    ) -> Iterator[None]:
        """Forwards of the model in here are of texts with these adapters.

        Args:
            numbers: what `acquire` gave for each text, whose tokens lie side by side in one row.
            counts: how many tokens of each.
            num_padding: tokens after those, which mean nothing.
            alone: whether no text's result may depend on the others.
        """
        if any(numbers):
            self._selection = _select(numbers, counts, num_padding, alone, self._model.norm.weight.device)
        try:
            yield
        finally:
            self._selection = None

    def _add_update(self, updates: Updates, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self._selection is not None:
            updates.add(inputs[0][0], output[0], self._selection)


def _select(
    numbers: SequenceOf[int], counts: SequenceOf[int], num_padding: int, alone: bool, device: torch.device
) -> Selection:
    decodes = max(counts) == 1
    if alone and not decodes:
        counts, num_padding = [counts[0] + num_padding], 0  # of one shape, however much of it is padding
    owners = torch.tensor([*numbers, 0]).repeat_interleave(torch.tensor([*counts, num_padding]))
    groups = tuple((number, (owners == number).nonzero()[:, 0].to(device)) for number in sorted(set(numbers) - {0}))
    return Selection(owners.to(device), groups, decodes=decodes, alone=alone)
