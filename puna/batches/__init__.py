"""From documents to batches: token shards, packing, conversations; every row addressed by its number."""
