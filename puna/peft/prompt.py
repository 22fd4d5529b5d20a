"""Trained vectors in the place of tokens before every document (Lester et al. 2021, arXiv:2104.08691, section 2).

Shapes: B batch, T tokens, P virtual tokens, U tokens with the virtual ones between, D model dimension, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.attend import DocumentAttend
from puna.model.config import LlamaConfig
from puna.model.transformer import Linear, Transformer
from puna.peft.method import VirtualMethod, VirtualTokens
from puna.peft.virtual import check_number, documents_of, forward_arguments, read_number


@dataclass(frozen=True)
class PromptConfig(VirtualMethod):
    """Prompt tuning: trained embeddings of virtual tokens at the beginning of every document."""

    PEFT_TYPE: ClassVar[str] = "PROMPT_TUNING"

    kind: Literal["prompt"] = "prompt"
    """The method."""
    num_virtual_tokens: int = 20
    """Virtual tokens before each document; they begin as the embeddings of tokens drawn at random."""
    whole: tuple[str, ...] = ()
    """Parameters of the model to train beside them, by name with wildcards: "output", "*norm"."""

    def __post_init__(self) -> None:
        check_number(self.num_virtual_tokens)

    def width(self, config: LlamaConfig) -> int:
        """See `VirtualMethod.width`."""
        return config.dim

    def put_on(self, model: Transformer, generator: torch.Generator) -> None:
        """See `VirtualMethod.put_on`."""
        ids = torch.randint(model.config.vocab_size, (self.num_virtual_tokens,), generator=generator)
        Prompt(model, model.embedding.weight.detach()[ids.to(model.embedding.weight.device)].float())

    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """See `Method.to_peft`."""
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": config.dim,
            "num_transformer_submodules": 1,
            "num_attention_heads": config.num_heads,
            "num_layers": config.num_layers,
            "prompt_tuning_init": "RANDOM",
        }

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str
    ) -> "PromptConfig":
        """See `Method.from_peft`."""
        return cls(num_virtual_tokens=read_number(values, where), whole=whole)


class Prompt(VirtualTokens):
    """Takes the place of a model's embedding and gives the ids V, V + 1, ... to the virtual tokens.

    A hook puts these before every document of a batch; the results at them are left out.

    Attributes:
        base: the model's embedding.
        vectors: [P, D], in float32.
    """

    def __init__(self, model: Transformer, vectors: Tensor) -> None:
        super().__init__()
        self.base, self.vectors = model.embedding, nn.Parameter(vectors)
        model.embedding = self  # type: ignore[assignment]
        self.hook = model.register_forward_pre_hook(self._prepend, with_kwargs=True)

    @property
    def weight(self) -> Tensor:
        """The table of the real tokens."""
        return self.base.weight

    def take_off(self, model: Transformer) -> None:
        """See `VirtualTokens.take_off`."""
        self.hook.remove()
        model.embedding = self.base

    def forward(self, ids_BU: Tensor) -> Tensor:
        first = self.base.num_embeddings
        real_BUD = self.base(ids_BU.clamp(max=first - 1))
        virtual_BUD = F.embedding((ids_BU - first).clamp(min=0), self.vectors).to(real_BUD.dtype)
        return torch.where((ids_BU >= first)[:, :, None], virtual_BUD, real_BUD)

    def _prepend(
        self, model: Transformer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids_BT, positions_BT, attend, head = forward_arguments(*args, **kwargs)
        documents_BT, is_causal = documents_of(attend, ids_BT)
        number, first = len(self.vectors), self.base.num_embeddings
        starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
        starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        ordinals_BT = starts_BT.cumsum(1)
        # Where each real token goes; the virtual ones of its document stand right before a start.
        home_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) + number * ordinals_BT
        length = ids_BT.shape[1] + number * int(ordinals_BT.max())
        steps_P = torch.arange(number, device=ids_BT.device)
        rows, columns = starts_BT.nonzero(as_tuple=True)
        virtual = (rows[:, None], home_BT[rows, columns][:, None] - number + steps_P)

        def spread(real_BT: Tensor, virtual_NP: Tensor, filler: Tensor | int) -> Tensor:
            wide_BU = torch.full((len(real_BT), length), 0, dtype=real_BT.dtype, device=real_BT.device) + filler
            return wide_BU.scatter(1, home_BT, real_BT).index_put(virtual, virtual_NP.to(real_BT.dtype))

        # Rows with fewer documents are filled up with one more.
        filler = documents_BT.max() + 1
        documents_BU = spread(documents_BT, documents_BT[rows, columns][:, None].expand(-1, number), filler)
        ids_BU = spread(ids_BT, (first + steps_P).expand(len(rows), -1), 0)
        positions_BU = spread(positions_BT + number, positions_BT[rows, columns][:, None] + steps_P, 0)

        def real_only(h_BUD: Tensor, output: Linear) -> Any:
            h_BTD = h_BUD.gather(1, home_BT[:, :, None].expand(-1, -1, h_BUD.shape[2]))
            return output(h_BTD) if head is None else head(h_BTD, output)

        return (), {
            "ids_BT": ids_BU,
            "positions_BT": positions_BU,
            "attend": DocumentAttend(documents_BU, causal=is_causal),
            "head": real_only,
        }
