"""What a model answers while it is being tuned, greedily.

Shapes: B prompts, T tokens, D model dimension, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.batches.packing import PADDING
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.attend import DocumentAttend
from puna.model.transformer import Transformer
from puna.peft.apply import virtual_tokens
from puna.runtime.progress import progress
from puna.tokenizer.base import Tokenizer

_ANSWERED_AT_ONCE = 32


@dataclass(frozen=True)
class Answer:
    """What followed a prompt."""

    text: str
    """Without the token that ended it."""
    is_whole: bool
    """Whether it ended by itself."""


def answer(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_tokens: int, max_context: int
) -> list[Answer]:
    """Answer prompts given by their ids, by the inference engine; a model with virtual tokens, without a cache.

    Args:
        max_tokens: the most tokens in an answer.
        max_context: in a prompt and its answer together.
    """
    with progress("Answering", total=len(prompts)) as advance:
        if virtual_tokens(model) is None:
            engine = Engine(model, tokenizer, EngineConfig(max_rows=_ANSWERED_AT_ONCE, max_context=max_context))
            greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
            completions = engine.generate(prompts, greedy, finished=advance)
            return [Answer(each.text, each.finish_reason == "stop") for each in completions]
        answers = []
        for start in range(0, len(prompts), _ANSWERED_AT_ONCE):
            chosen = prompts[start : start + _ANSWERED_AT_ONCE]
            for ids in greedy_without_cache(model, chosen, max_tokens, max_context, tokenizer.stop_ids):
                is_whole = bool(ids) and ids[-1] in tokenizer.stop_ids
                answers.append(Answer(tokenizer.decode(ids[:-1] if is_whole else ids), is_whole))
                advance(1)
        return answers


@torch.no_grad()
def greedy_without_cache(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    max_context: int,
    stop_ids: Collection[int],
) -> list[list[int]]:
    """The most probable continuation of each prompt, its end included, each token by a pass over all before it."""
    device = model.embedding.weight.device
    texts = [list(prompt) for prompt in prompts]
    limits = [min(len(prompt) + max_tokens, max_context) for prompt in prompts]

    def runs(n: int) -> bool:
        return len(texts[n]) < limits[n] and (len(texts[n]) == len(prompts[n]) or texts[n][-1] not in stop_ids)

    while running := [n for n in range(len(texts)) if runs(n)]:
        lengths_B = torch.tensor([len(texts[n]) for n in running])
        steps_T = torch.arange(int(lengths_B.max()))
        ids_BT = torch.zeros(len(running), len(steps_T), dtype=torch.long)
        for row, n in enumerate(running):
            ids_BT[row, : len(texts[n])] = torch.tensor(texts[n])
        documents_BT = torch.where(steps_T < lengths_B[:, None], 0, PADDING).to(device)
        last_BT = torch.stack((torch.arange(len(running)), lengths_B - 1)).to(device)

        def at_the_last(h_BTD: Tensor, output: torch.nn.Module, last_BT: Tensor = last_BT) -> Tensor:
            logits_BV: Tensor = output(h_BTD[last_BT[0], last_BT[1]])
            return logits_BV

        attend = DocumentAttend(documents_BT)
        positions_BT = steps_T.expand_as(ids_BT).to(device)
        logits_BV = model(ids_BT.to(device), positions_BT, attend, at_the_last)
        for n, token in zip(running, logits_BV.argmax(-1).tolist(), strict=True):
            texts[n].append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
