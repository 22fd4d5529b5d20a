"""`puna inspect`: what an artifact looks like, for people."""

from itertools import islice
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl

_EXAMPLE = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "What does shutil.copytree do?"},
    {"role": "assistant", "content": "Recursively copy a directory tree."},
    {"role": "user", "content": "And <|eot_id|> or </s> in my text?"},
    {"role": "assistant", "content": "Those stay ordinary text."},
]


def show_chat(model: Path, conversations: Path | None, index: int, template: str | None, show_ids: bool) -> None:
    """Print a conversation in colour: special tokens, what is supervised, and the rest.

    Raises:
        InputError: no such conversation, or no chat template.
    """
    from puna.tokenizer.chat import preview, render_chat
    from puna.tokenizer.chat_template import TemplateName, builtin_template
    from puna.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    conversation: dict[str, Any] = {"messages": _EXAMPLE}
    if conversations is not None:
        found = list(islice(read_jsonl(conversations), index, index + 1)) if index >= 0 else []
        if not found:
            raise InputError(f"{conversations} has no conversation number {index} (they count from 0).")
        conversation = found[0]
    source = None if template is None else builtin_template(cast(TemplateName, template))
    rendered = render_chat(tokenizer, conversation["messages"], tools=conversation.get("tools"), template=source)
    console = Console()
    console.print(preview(rendered, tokenizer, show_ids=show_ids))
    console.print(f"\n{len(rendered.ids):,} tokens, {sum(rendered.mask):,} of them supervised", style="dim")


def show_model(name: str) -> None:
    """Print an architecture and what follows from it, of a checkpoint or a published model.

    Raises:
        InputError: neither a checkpoint nor a published name.
    """
    from puna.model.accounting import count_parameters, forward_flops_per_token, kv_bytes_per_token
    from puna.model.presets import PRESETS, preset
    from puna.weights.load import read_config

    if name in PRESETS or not Path(name).exists():
        try:
            config = preset(name)
        except ValueError as error:
            raise InputError(f"There is no checkpoint at {name}. {error}") from error
    else:
        config = read_config(name)
    table = Table(show_header=False, title=name)
    for key, value in vars(config).items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    table.add_section()
    context = (config.context_length + 1) / 2
    parameters = count_parameters(config)
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("weights in bfloat16", _bytes(2 * parameters))
    table.add_row("forward FLOPs per token, full context", f"{forward_flops_per_token(config, context):,.0f}")
    table.add_row("KV cache per token, bfloat16", _bytes(kv_bytes_per_token(config)))
    table.add_row("KV cache of a full context, bfloat16", _bytes(kv_bytes_per_token(config) * config.context_length))
    Console().print(table)


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
