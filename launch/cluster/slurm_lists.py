"""SLURM's short notations: host lists and tasks per node."""

import re


def first_host(nodes: str) -> str:
    """The first host of a list: "gpu[003-007,9],login1" begins with "gpu003".

    Raises:
        ValueError: the list begins with no host.
    """
    match = re.match(r"(?P<head>[^\s\[\],]*)(?:\[(?P<first>[0-9]+)[^\]]*\])?(?P<tail>[^\s\[\],]*)", nodes)
    host = match["head"] + (match["first"] or "") + match["tail"] if match else ""
    if not host or (match and "[" in nodes[match.end() :].split(",")[0]):
        raise ValueError(
            f"cannot read the first host of SLURM's list {nodes!r}: set MASTER_ADDR to the machine of rank 0"
        )
    return host


def tasks_of_node(per_node: str, node: int) -> int:
    """Tasks of the node number `node` in a list like "8(x3),4": 8 on the nodes 0 to 2, 4 on node 3.

    Raises:
        ValueError: another notation, or no such node.
    """
    counts: list[int] = []
    for part in per_node.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must look like 8(x3),4, not {per_node!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise ValueError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE {per_node!r} has {len(counts)} nodes")
    return counts[node]
