"""Against over-fitting and forgetting: what is wrapped around a loss, or chosen beside it."""
