"""Bytes and memory of a partition scheme, by closed forms: what the counted runs must equal.

With G(x) = (x - 1)/x, Ψ parameters, a = N/8 nodes, without scales, a rank sends in a step of γ microbatches

    ZeRO-3       γ · 3 · G(N) · 2Ψ
    ZeRO++       γ · [G(N) · Ψ, G(8) · 2Ψ in the node, G(8) · Ψ/2 in the node, G(a) · Ψ/16 between nodes]
    3-level, 8   γ · [Ψ/2 in the pair, G(8) · Ψ in the node, G(8) · Ψ/2 in the node]
                 + 2 · G(a) · Ψ/4 between nodes + 3/4 · Ψ in the node

Those are bytes that a rank sends. Of a collective over all ranks a node needs each part once, so little of it leaves a
node (`between_nodes`): charged by link, a step of three levels costs more than one microbatch of ZeRO++.
Chapter: model_parallel/frontier_partitioning.
"""

from ._partition_blocks import packet_bytes
from ._partition_layout import NODE, PAIR, degrees, spans


def group_of(inner, outer):
    """Where a collective over that digit runs: "pair", "node", "inter" (one rank a node), or "flat"."""
    return "inter" if inner >= NODE else "flat" if outer > NODE else "pair" if outer == PAIR else "node"


def step_bytes(scheme, psi, n, gamma=1):
    """Bytes that a rank sends in a step, {(phase, group): bytes}; rings and direct exchanges, 2-byte values.

    phases   "forward", "backward", "gradient" (gamma times each), "step", "refresh"
    groups   see `group_of`; of a "flat" collective `between_nodes` tells what leaves the node
    """
    found = {}
    for phase, span, count in sent(scheme, psi, n, gamma):
        key = phase, group_of(*span)
        found[key] = found.get(key, 0) + count
    return found


def between_nodes(scheme, psi, n, gamma=1):
    """Bytes of a step that leave a node, for each of its ranks. A flat collective brings a part into each node once."""
    return sum(count * share_that_leaves(*span) for _, span, count in sent(scheme, psi, n, gamma))


def share_that_leaves(inner, outer):
    """Share of a collective's bytes that leaves the node: of the other parts, one from each other node."""
    return (outer // NODE - 1) / (outer // inner - 1) if inner < NODE < outer else float(inner >= NODE)


def sent(scheme, psi, n, gamma):
    """(phase, (inner, outer), bytes that a rank sends) of every collective of a step."""
    digits = spans(scheme, n)
    again, bits = (digits["second"], scheme.q2) if scheme.s_w2 else (digits["forward"], scheme.qw)
    plan = [  # phase, its collectives, bits, times
        ("forward", digits["forward"], scheme.qw, gamma),
        ("backward", again, bits, gamma),
        ("gradient", digits["micro"], scheme.qg, gamma),
        ("step", digits["step"], None, 1),
        ("step", digits["replicas"], None, 2),  # an all-reduce: the piece goes round twice
        ("refresh", digits["refresh"], None, 1),
    ]
    for phase, some, bits, times in plan:
        for inner, outer in some:
            size = outer // inner
            values = psi // scheme.s_o // size if inner >= scheme.s_o else psi // outer
            yield phase, (inner, outer), times * (size - 1) * packet_bytes(values, bits, scheme.block)


def memory(scheme, psi, n):
    """Bytes of model states on a rank, {name: bytes}: weights, second copy, gradients, Adam's states.

    Scales of blocks count; the paper's figures are those with block=inf.
    """
    degrees(scheme, n)
    second = packet_bytes(psi // scheme.s_w2, scheme.q2, scheme.block) if scheme.s_w2 else 0
    return {"weights": 2 * psi / scheme.s_w, "second": second, "gradients": 2 * psi / scheme.s_g,
            "states": 12 * psi / scheme.s_o}  # fmt: skip
