"""Text to ids and back: SentencePiece, tiktoken, tokenizer.json; training a vocabulary; chat rendering."""
