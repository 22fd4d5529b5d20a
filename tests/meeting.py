"""Where the ranks of a test's processes meet; imported by the servers that fork them, not by tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def meeting_place() -> Iterator[dict[str, str]]:
    """The environment by which ranks find a store, as torchrun sets it, while a process of its own holds that.

    As with torchrun, no port is chosen before somebody listens on it. And the process that forks ranks has no thread
    beside: a fork while another thread is in the C library can leave one of its locks taken for ever in the child.
    """
    told, tell = os.pipe()
    over, until = os.pipe()
    process = os.fork()
    if not process:
        os.close(until)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(tell, f"{store.port}\n".encode())
        os.read(over, 1)  # nothing is ever written: it ends when all who could have are gone
        os._exit(0)
    os.close(tell)
    os.close(over)
    with os.fdopen(told) as pipe:
        port = pipe.readline().strip()
    try:
        yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    finally:
        os.close(until)
        os.waitpid(process, 0)
