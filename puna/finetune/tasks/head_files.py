"""Model directories with a head in place of the projection to the vocabulary, as `transformers` loads them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from puna.finetune.tasks.task import Attention, HeadSpec
from puna.model.transformer import Transformer
from puna.runtime.files import atomic_path, write_json
from puna.runtime.manifest import Manifest
from puna.tokenizer.base import Tokenizer
from puna.weights.huggingface import CONFIG_FILE, SINGLE_FILE, hf_config
from puna.weights.load import check_vocabulary, write_tokenizer
from puna.weights.names import to_hf


def save_head_model(
    model: Transformer,
    spec: HeadSpec,
    attention: Attention,
    tokenizer: Tokenizer,
    directory: Path,
    dtype: torch.dtype,
    manifest: Manifest,
) -> None:
    """Write trunk, head and tokenizer; whole or not at all.

    `LlamaForSequenceClassification.from_pretrained(directory)` and its like compute the same logits from the same ids.
    A trunk that looks both ways is one for them too (`is_causal` in config.json, from transformers 5 on).

    Raises:
        InputError: the tokenizer has more ids than the model, or the model has no Hugging Face form.
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    check_vocabulary(model.config, tokenizer)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    values = hf_config(model.config, dtype, **ids)
    family = values["architectures"][0].removesuffix("ForCausalLM")
    values |= {
        "architectures": [family + spec.architecture],
        "id2label": {str(number): label for number, label in enumerate(spec.labels)},
        "label2id": {label: number for number, label in enumerate(spec.labels)},
        "is_causal": attention == "causal",
        "use_cache": False,
        **spec.config,
    }
    # What transformers calls the trunk in its classes for span extraction.
    trunk = "transformer." if spec.architecture == "ForQuestionAnswering" else "model."
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{spec.module}."):
            stored = name
        elif name == "output.weight":
            continue
        else:
            stored = trunk + to_hf(name).removeprefix("model.")
        tensors[stored] = parameter.detach().to("cpu", dtype).contiguous()
    with atomic_path(directory) as fresh:
        fresh.mkdir()
        save_file(tensors, fresh / SINGLE_FILE, metadata={"format": "pt"})
        write_json(fresh / CONFIG_FILE, values)
        write_tokenizer(tokenizer, fresh)
        manifest.write(fresh)
