"""Tasks whose answer is a text: translation, summaries, dialogue, code, text with wanted properties."""
