"""Tasks: one small file each, holding a data adapter, a prompt and a scorer. `task.py` says how to write one."""
