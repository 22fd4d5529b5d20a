"""A vocabulary with more tokens than it had; the old ids stay what they are."""

import json
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer as AnyTokenizer
from puna.tokenizer.tokenizer_json import JsonTokenizer


def extend_tokenizer(
    tokenizer: AnyTokenizer, tokens: Sequence[str] = (), special_tokens: Sequence[str] = ()
) -> JsonTokenizer:
    """`tokenizer` with new tokens, numbered on from its `vocab_size` in the order given.

    A vocabulary of SentencePiece that puts a blank before every piece of text (Llama 1 and 2) puts it before the first
    only once it has new ordinary tokens: the text after one would begin with a second blank otherwise. This is what
    `transformers` calls `legacy=False`; text after a special token, too, then begins without one, and text that begins
    with a blank gets no other.

    Args:
        tokenizer: of any kind; the result is always saved as tokenizer.json.
        tokens: ordinary vocabulary, recognised wherever it stands in a text. A blank that belongs to a word in this
            text, as in " guanaco", has to be given with it.
        special_tokens: only code may produce these.

    Raises:
        InputError: a token is empty, given twice, or in the vocabulary already; or the vocabulary's ids have gaps.
    """
    fresh = [*tokens, *special_tokens]
    for number, token in enumerate(fresh):
        if not token or token in fresh[:number]:
            raise InputError(f"The new token {token!r} is {'given twice' if token else 'empty'}.")
        if len(tokenizer.encode(token, allowed_special="all", continuation=True)) == 1:
            raise InputError(f"The token {token!r} is in the vocabulary already; leave it out.")
    content = tokenizer.to_library().to_str()
    library = Tokenizer.from_str(_blank_before_first(content) if tokens and tokenizer.prefix == "always" else content)
    library.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    library.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    names = tokenizer.special_names()
    extended = JsonTokenizer(
        library.to_str(), bos=names.get("bos_token"), eos=names.get("eos_token"), pad=names.get("pad_token")
    )
    if any(library.token_to_id(token) != tokenizer.vocab_size + number for number, token in enumerate(fresh)):
        raise InputError("The ids of this vocabulary have gaps, so that new tokens cannot be numbered on from its end.")
    extended.chat_template = tokenizer.chat_template
    extended.stop_ids |= tokenizer.stop_ids
    return extended


def _blank_before_first(content: str) -> str:
    """A tokenizer.json that prepends a blank to every piece of text, as one that does so at the beginning only."""
    parts = json.loads(content)
    parts["normalizer"] = None
    parts["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return json.dumps(parts)
