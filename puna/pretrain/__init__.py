"""Training from nothing, on raw text."""
