"""Network level: what a removed filter takes with it.

A *space* is the set of layers that write the same channels (several where residual sums add them up), the batch norms
on the way and the layers that read them. A filter that is removed takes its bias and batch norm along; a channel that
nobody writes, or nobody reads, takes its readers' input columns or its writers' filters along, and so on through the
network (unused-path removal: P-RM, arXiv 1905.00136). torch-pruning traces which layers share channels.

A channel is *dead* when no writer has a weight left for it and it arrives as zero at every reader. A bias, a beta or
a sigmoid on the way that makes a constant of it keeps it alive: dropping a constant would change the outputs.
"""

from lib.channels.cutting import compact
from lib.channels.paths import coupled, follow, residual_groups

__all__ = [
    "compact",
    "coupled",
    "follow",
    "residual_groups",
]
