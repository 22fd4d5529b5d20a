"""`python -m puna.infer.parallel_worker PORT NUM_PROCESSES RANK DEVICE NUM_THREADS`: a follower of `Team`."""

import sys

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from puna.infer.parallel import Follower, join


def main() -> None:
    """Join the team and obey; end without a word when the first process is gone."""
    port, num_processes, rank = map(int, sys.argv[1:4])
    torch.set_num_threads(int(sys.argv[5]))
    device = join(TCPStore("127.0.0.1", port, num_processes), rank, num_processes, sys.argv[4])
    follower = Follower(rank, device)
    try:
        follower.follow()
    except (dist.DistBackendError, dist.DistNetworkError, RuntimeError) as error:
        if "closed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
