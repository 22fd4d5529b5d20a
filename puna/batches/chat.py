"""Conversations to token shards in which only the assistant's tokens are targets."""

from collections.abc import Iterable
from pathlib import Path

from puna.batches.conversations import Conversation
from puna.batches.shards import ShardWriter
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path
from puna.runtime.manifest import Manifest
from puna.runtime.progress import progress
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat


def write_chat_shards(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, destination: Path, row_length: int
) -> None:
    """Render, check and store conversations.

    Args:
        conversations: what was said.
        tokenizer: with its chat template.
        destination: shard folder to write.
        row_length: the longest conversation, in tokens, that training will see whole.

    Raises:
        InputError: a conversation cannot be rendered; or what came out cannot be trained on: nothing is supervised,
            everything is, an answer's end is not, or BOS stands twice. Names the line.
    """
    problems: dict[str, list[str]] = {}
    count = too_long = 0
    with atomic_path(destination) as folder, progress("Rendering conversations", total=None) as advance:
        folder.mkdir()
        with ShardWriter(folder, tokenizer.vocab_size) as writer:
            for count, conversation in enumerate(conversations, start=1):
                try:
                    rendered = render_chat(tokenizer, conversation.messages, tools=conversation.tools)
                except InputError as error:
                    raise InputError(f"{conversation.where}: {error}") from error
                for problem in _problems(rendered.ids, rendered.mask, tokenizer):
                    problems.setdefault(problem, []).append(conversation.where)
                too_long += len(rendered.ids) > row_length
                num_bytes = sum(len(str(message.get("content") or "").encode()) for message in conversation.messages)
                writer.add(rendered.ids, conversation.id or str(count), num_bytes, rendered.mask)
                advance()
        if not count:
            raise InputError("There is no conversation to train on.")
        if problems:
            listed = "; ".join(
                f"{problem} ({len(where):,} of {count:,}, the first is {where[0]})"
                for problem, where in problems.items()
            )
            raise InputError(f"These conversations cannot be trained on: {listed}. Is the chat template the right one?")
        if too_long == count:
            raise InputError(f"Every conversation is longer than a row of {row_length:,} tokens; raise row_length.")
        results = writer.results(tokenizer.hash) | {"num_cut": too_long}
        Manifest("finetune", {}, {}, results).write(folder)


def _problems(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> list[str]:
    found = []
    if not any(mask):
        found.append("no token is supervised")
    elif all(mask):
        found.append("every token is supervised, also the user's")
    else:
        ends = [at for at, target in enumerate(mask) if target and (at + 1 == len(mask) or not mask[at + 1])]
        if any(ids[end] not in tokenizer.stop_ids for end in ends):
            found.append("the end of an answer is not supervised, so the model would not learn to stop")
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        found.append("the BOS token stands twice")
    return found
