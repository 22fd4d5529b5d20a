"""Which layout to train a model in on a cluster: memory, communication, bubble, step time, MFU."""
