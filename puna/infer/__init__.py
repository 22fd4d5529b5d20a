"""Text from a model: a key/value cache, sampling, an engine that batches requests, and the commands on top."""
