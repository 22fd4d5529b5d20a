"""What a cluster is made of, and how much of its nominal speed a training step gets."""

from dataclasses import dataclass
from typing import Literal

GpuName = Literal["h100", "h200", "a100", "custom"]


@dataclass(frozen=True)
class Gpu:
    """Nominal figures of one accelerator and of its links, from the maker's data sheet."""

    memory_gib: float = 80.0
    """Memory, in GiB."""
    bf16_flops: float = 989.4e12
    """Dense bfloat16 FLOP/s of the tensor cores."""
    float8_flops: float = 1978.9e12
    """Dense float8 FLOP/s; 0 where there is none."""
    memory_bandwidth: float = 3.35e12
    """Bytes per second between the chip and its memory."""
    link_bandwidth: float = 450e9
    """Bytes per second, in one direction, between two GPUs of a node."""

    def __post_init__(self) -> None:
        for name in ("memory_gib", "bf16_flops", "memory_bandwidth", "link_bandwidth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be positive.")


GPUS: dict[str, Gpu] = {
    "h100": Gpu(),
    "h200": Gpu(memory_gib=141.0, memory_bandwidth=4.8e12),
    "a100": Gpu(bf16_flops=312e12, float8_flops=0.0, memory_bandwidth=2.04e12, link_bandwidth=300e9),
}
"""The SXM models with 80 GB (H100, A100) and 141 GB (H200), from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the nominal figures that a training step reaches: one set for every model, layout and size.

    Fitted to the published runs in `puna.pretrain.planner.published`; docs/scaling.md has the table. Software moves
    them: attention's are those of FlashAttention-2, which all of these runs used.
    """

    matmul: float = 0.57
    """Of the bfloat16 peak, in products of large matrices."""
    matmul_float8: float = 0.56
    """Of the float8 peak, with the scaling around it."""
    attention: float = 0.22
    """Of the bfloat16 peak, in fused attention."""
    memory: float = 0.44
    """Of the memory bandwidth, in element-wise operations."""
    link: float = 0.80
    """Of the bandwidth within a node, in collectives."""
    network: float = 0.80
    """Of the bandwidth between nodes, in collectives. Assumed, as is `overlap`: the published runs hardly tell."""
    overlap: float = 0.90
    """Share of the computing time behind which parameters' and gradients' collectives hide."""
    async_tensor: float = 0.80
    """Share of tensor parallelism's collectives that stays visible when they are pipelined with products."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1 or (value == 0 and name not in ("overlap", "async_tensor")):
                raise ValueError(f"efficiency.{name} is {value}; it is a share, above 0 and at most 1.")


@dataclass(frozen=True)
class Cluster:
    """GPUs, and the network between the machines that hold them."""

    gpu: GpuName = "h100"
    """`h100`, `h200` and `a100` are the SXM models; `custom` takes the figures in `custom`."""
    custom: Gpu | None = None
    """Figures of another accelerator; needs gpu = "custom"."""
    num_gpus: int = 8
    """All of them together."""
    gpus_per_node: int = 8
    """Behind one fast link."""
    network_bandwidth: float = 50e9
    """Bytes per second and GPU, in one direction, between nodes: 50e9 is 400 Gb/s."""
    latency_seconds: float = 10e-6
    """Of one hop between nodes in a ring collective."""
    usable_memory: float = 0.92
    """Share of the memory that a plan may fill: the rest is for the driver, the communication library, fragments."""

    def __post_init__(self) -> None:
        if (self.gpu == "custom") != (self.custom is not None):
            raise ValueError('The figures in cluster.custom and gpu = "custom" belong together: set both or neither.')
        for name in ("num_gpus", "gpus_per_node", "network_bandwidth", "latency_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be positive.")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ValueError(
                f"num_gpus ({self.num_gpus}) has to be a multiple of gpus_per_node ({self.gpus_per_node}): every node "
                "is filled."
            )
        if not 0 < self.usable_memory <= 1:
            raise ValueError(f"usable_memory is {self.usable_memory}; it is a share, above 0 and at most 1.")

    @property
    def figures(self) -> Gpu:
        """Of one GPU."""
        return self.custom if self.custom is not None else GPUS[self.gpu]

    def bandwidth(self, group_size: int, stride: int, efficiency: Efficiency) -> float:
        """Bytes per second and GPU that a ring collective reaches in a group of ranks that are `stride` apart.

        A ring that leaves a node does so once for each of the group's ranks there, on a network card of its own, so
        that several ranks of one node share the load.
        """
        link = self.figures.link_bandwidth * efficiency.link
        if self.within_node(group_size, stride):
            return link
        ranks_per_node = max(1, self.gpus_per_node // stride)
        return min(link, ranks_per_node * self.network_bandwidth * efficiency.network)

    def within_node(self, group_size: int, stride: int) -> bool:
        """Whether such a group stays inside a node."""
        return (group_size - 1) * stride < self.gpus_per_node
