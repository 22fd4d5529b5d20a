"""Many processes that compute as one: layouts applied to the model from outside."""
