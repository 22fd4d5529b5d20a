"""Bias and toxicity by template: sentences in which only the group of people changes, and what that changes."""
