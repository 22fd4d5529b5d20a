"""People, or a model in their place, say which of two answers is better; what follows from it."""
