"""The Llama decoder (Touvron et al. 2023, arXiv:2302.13971, section 2; Llama 3, arXiv:2407.21783, section 3.2).

The same module pretrains, fine-tunes and serves. What differs between those is passed in as `attend`.

Shapes: B batch, T tokens, D model dimension, H query heads, G key/value heads, K head dimension, F feed-forward
dimension, V vocabulary.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.attend import Attend, causal
from puna.model.config import LlamaConfig
from puna.model.rope import Rotation, frequencies, rotate, rotation

Result = TypeVar("Result")


class Linear(nn.Linear):
    """A linear map computed in the activations' dtype.

    Parameters can so be kept in float32 (where small updates are not lost, and gradients of several micro-batches
    add up exactly) while the multiplication runs in bfloat16. Where both agree, as in serving, nothing is cast.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def project(x: Tensor, *maps: nn.Module) -> tuple[Tensor, ...]:
    """Several maps of the same input: in training as one product, which is faster where each of them is small.

    One by one where a weight is sharded, hooked or of another class, such as an adapter's; and where nothing is
    trained, because every step would copy the weights.
    """
    joined = torch.is_grad_enabled() and are_plain(*maps)
    if not joined or len({part.bias is None for part in maps}) > 1:
        return tuple(part(x) for part in maps)
    linears = cast(tuple[Linear, ...], maps)
    weight = torch.cat(tuple(part.weight for part in linears)).to(x.dtype)
    biases = tuple(part.bias for part in linears if part.bias is not None)
    bias = torch.cat(biases).to(x.dtype) if biases else None
    return torch.split(F.linear(x, weight, bias), [part.out_features for part in linears], dim=-1)


def are_plain(*maps: nn.Module) -> bool:
    """Whether a product with the weights is all that calling each of them does."""
    return all(
        type(part) is Linear
        and type(part.weight) is nn.Parameter
        and not (part._forward_hooks or part._forward_pre_hooks)
        for part in maps
    )


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4); the mean is in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = Linear(config.dim, query_dim, bias=config.qkv_bias)
        self.key = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.value = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.output = Linear(query_dim, config.dim, bias=False)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = (
            part.unflatten(-1, (-1, self.head_dim))  # type: ignore[no-untyped-call]
            for part in project(x_BTD, self.query, self.key, self.value)
        )
        q_BTHK = self.rotate(self.query_norm(q_BTHK), rotation)
        k_BTGK = self.rotate(self.key_norm(k_BTGK), rotation)
        o_BTHK = attend(self.layer, q_BTHK, k_BTGK, v_BTGK)
        return self.output(o_BTHK.flatten(-2))  # type: ignore[no-any-return]

    def rotate(self, x_BTHK: Tensor, rotation: Rotation) -> Tensor:
        """`puna.model.rope.rotate`; here so that a faster one can take its place."""
        return rotate(x_BTHK, rotation)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.hidden_dim, bias=False)
        self.up = Linear(config.dim, config.hidden_dim, bias=False)
        self.down = Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = project(x_BTD, self.gate, self.up)
        return self.down(F.silu(gate_BTF) * up_BTF)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm residual layer: attention, then feed-forward."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, attend)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Token ids to next-token logits.

    Parameters come uninitialised: call `puna.model.initialize.initialize`, or load weights. Build under
    `torch.device("meta")` to get the shapes without the memory.

    Attributes:
        compute_dtype: the dtype of the activations; None means the parameters' own. Training in "bf16" keeps
            float32 parameters and sets this to bfloat16.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        # Uninitialised, for torch's own initialisation loads its compiler.
        embedding = torch.empty(config.vocab_size, config.dim)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(embedding, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        attend: Attend = causal,
        head: Callable[[Tensor, Linear], Result] | None = None,
    ) -> Tensor | Result:
        """Logits of the token after each token, shape [B, T, V].

        Args:
            ids_BT: token ids.
            positions_BT: position of each token within its document; 0, 1, 2, ... when absent.
            attend: the attention context.
            head: called as head(h_BTD, output) in place of output(h_BTD), with the normalised hidden states and
                the output projection; forward returns what it returns. It is here, inside forward, that a loss
                which never materialises all logits belongs, or a classifier, or an embedding.
        """
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        x_BTD = self.embedding(ids_BT)
        if self.compute_dtype is not None:
            x_BTD = x_BTD.to(self.compute_dtype)
        turn = rotation(positions_BT, frequencies(self.config, ids_BT.device), x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, turn, attend)
        h_BTD = self.norm(x_BTD)
        return self.output(h_BTD) if head is None else head(h_BTD, self.output)
