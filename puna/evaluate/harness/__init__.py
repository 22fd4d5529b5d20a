"""The harness: asks a model a task's questions through the engine, and makes numbers of the answers."""
