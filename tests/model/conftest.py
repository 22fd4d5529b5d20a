"""A random tiny model of ours, and the same model in `transformers`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer


@pytest.fixture(scope="session")
def make_model() -> Callable[[LlamaConfig], Transformer]:
    """A model in which no weight has a value that could hide a mistake (norms are not 1, biases not 0)."""

    def make(config: LlamaConfig, seed: int = 0) -> Transformer:
        model = Transformer(config)
        initialize(model, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture(scope="session")
def make_twins(make_model: Any) -> Callable[..., tuple[Transformer, Any]]:
    """The same weights in our model and in that of `transformers`."""
    import transformers

    from puna.weights.huggingface import hf_config
    from puna.weights.names import to_hf

    def make(config: LlamaConfig, seed: int = 0) -> tuple[Transformer, Any]:
        ours = make_model(config, seed)
        values = hf_config(config, torch.float32)
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**values), attn_implementation="eager"
        )
        weights = {to_hf(name): parameter.detach().clone() for name, parameter in ours.named_parameters()}
        missing, unexpected = theirs.load_state_dict(weights, strict=False)
        assert not unexpected
        assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
        theirs.tie_weights()
        return ours.eval(), theirs.eval()

    return make
