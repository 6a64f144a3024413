"""Where experts should live so that a token's next expert is near: a balanced partition, layer by layer.

    minimise  Σ_j Σ_ab N_j[a, b] · w(π_j(a), π_{j+1}(b)),   E/G experts of each layer on each GPU

N_j counts tokens that go from expert a of layer j to b of layer j + 1; w is 0 on one GPU, 1 in one node, 2 between
nodes. The authors solve an integer program with Gurobi. With the layers on both sides fixed, though, a layer is an
assignment of E experts to E slots, which the Hungarian algorithm solves exactly; `descent` repeats that.
Source: Yao et al. 2024, arXiv 2401.08383, and solve_affinity.py of its code. Chapter: model_parallel/ex_flow.
"""

from functools import partial
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

from toolkit.runtime.errors import ShapeError

RESTARTS, MOST_STATES = 10, 3_000

# ---- what is minimised -----------------------------------------------------------------------------------------------


def transition_counts(trace, experts):
    """Tokens that go from expert a of a layer to expert b of the next: (layers - 1, E, E).

    trace    (tokens, layers) integers: the expert of each token in each layer (top-1)
    raises   ShapeError  no token or no pair of layers; ValueError  an expert out of range
    """
    trace = np.asarray(trace)
    if trace.ndim != 2 or trace.shape[0] == 0 or trace.shape[1] < 2:
        raise ShapeError(f"a trace of shape {trace.shape}: give (tokens, layers), one token and two layers or more")
    if trace.min() < 0 or trace.max() >= experts:
        raise ValueError(f"the trace names experts {trace.min()} to {trace.max()}; {experts} are 0 to {experts - 1}")
    pairs = trace[:, :-1].astype(np.int64) * experts + trace[:, 1:]
    return np.stack([np.bincount(p, minlength=experts**2).reshape(experts, experts) for p in pairs.T])


def distance(gpus, nodes=1):
    """w, (G, G): 0 on one GPU, 1 in one node, 2 between nodes."""
    node = np.arange(gpus) // _ratio("GPUs", gpus, "nodes", nodes)
    return (1 - np.eye(gpus)) + (node[:, None] != node)


def placement_cost(counts, placement, w):
    """Mean cost of a token's way through the layers. With one node: how often it changes its GPU.

    Its way to the first expert is not counted, as in the authors' tool.
    placement   (layers, E), each expert's GPU      w   (G, G), see `distance`
    """
    pairs = zip(counts, placement[:-1], placement[1:], strict=True)
    return sum((n * w[here[:, None], there]).sum() for n, here, there in pairs) / counts[0].sum()


def affinity(counts, k=1):
    """Share of tokens whose next expert is among the k likeliest after their last one: no k experts could keep more.

    The paper averages rows of the conditional probabilities; here each weighs as much as it occurs, which makes this an
    upper bound of what any placement with k = E/G keeps.
    """
    return float(np.sort(counts, axis=2)[:, :, -k:].sum() / counts.sum())


def information(counts):
    """Mutual information of consecutive experts, in bits, mean over layers: 0 if the next is independent."""
    joint = counts / counts.sum(axis=(1, 2), keepdims=True)
    apart = joint.sum(axis=2, keepdims=True) * joint.sum(axis=1, keepdims=True)
    return float((joint * np.log2(np.where(joint > 0, joint / np.where(apart > 0, apart, 1), 1))).sum() / len(counts))


# ---- placements that need no optimiser -------------------------------------------------------------------------------


def contiguous(layers, experts, gpus):
    """The usual one: expert e of every layer on GPU e // (E/G)."""
    return np.tile(np.arange(experts) // _ratio("experts", experts, "GPUs", gpus), (layers, 1))


def shuffled(random, layers, experts, gpus):
    """A random balanced one."""
    return random.permuted(contiguous(layers, experts, gpus), axis=1)


def by_load(counts, gpus):
    """Equal work and nothing else: the busiest expert first, to the GPU with least work that has room."""
    loads = np.concatenate((counts.sum(axis=2), counts[-1:].sum(axis=1)))
    room, placement = _ratio("experts", loads.shape[1], "GPUs", gpus), np.empty(loads.shape, int)
    for load, where in zip(loads, placement, strict=True):
        work, held = np.zeros(gpus), np.zeros(gpus, int)
        for e in np.argsort(-load, kind="stable"):
            where[e] = np.where(held < room, work, np.inf).argmin()
            work[where[e]] += load[e]
            held[where[e]] += 1
    return placement


# ---- solvers ---------------------------------------------------------------------------------------------------------


def solve_placement(counts, gpus, nodes=1, method="hungarian", seed=0):
    """A balanced placement of low cost.

    counts    (layers - 1, E, E), see `transition_counts`; gpus = nodes · GPUs of a node
    method    "hungarian": descent from ten starts        "dp": exact, small layers only
              "matching": exact, E = G on one node        "bipart": halves, then halves of halves, as the authors'
              "nodes first": nodes, then GPUs of a node   "anneal": random swaps, then descent
    returns   (layers, E) integers, each expert's GPU
    raises    ShapeError  E does not divide; ValueError  a method that does not suit, or unknown
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose from {', '.join(METHODS)}")
    _ratio("experts", counts.shape[1], "GPUs", gpus)
    w = distance(gpus, nodes)
    return METHODS[method](counts, w, nodes, np.random.default_rng(seed))


def descent(counts, placement, w):
    """Solve one layer after the other exactly, its neighbours fixed, until none changes. The cost never rises."""
    placement, slots = placement.copy(), np.sort(placement[0])
    improved = True
    while improved:
        improved = False
        for j in range(len(placement)):
            cost = _cost_of_layer(counts, placement, w, j)
            before = cost[np.arange(len(slots)), placement[j]].sum()
            _, slot = linear_sum_assignment(cost[:, slots])
            if cost[np.arange(len(slots)), slots[slot]].sum() < before - 1e-9 * (1 + before):
                placement[j], improved = slots[slot], True
    return placement


def _cost_of_layer(counts, placement, w, j):
    """(E, G): what each expert of layer j would cost on each GPU."""
    cost = np.zeros((placement.shape[1], len(w)))
    if j > 0:
        cost += counts[j - 1].T @ w[placement[j - 1]]
    if j < len(counts):
        cost += counts[j] @ w[placement[j + 1]]
    return cost


def _hungarian(counts, w, _nodes, random):
    layers, experts, gpus = len(counts) + 1, counts.shape[1], len(w)
    plain = contiguous(layers, experts, gpus)
    starts = [plain, _chain(counts, plain[0], w)]
    while len(starts) < RESTARTS:
        first = random.permutation(plain[0])
        starts.append(_chain(counts, first, w) if len(starts) % 2 else shuffled(random, layers, experts, gpus))
    found = [descent(counts, start, w) for start in starts]
    return min(found, key=partial(placement_cost, counts, w=w))


def _chain(counts, first, w):
    """Greedy: each layer as suits the one before."""
    placement, slots = [first], np.sort(first)
    for n in counts:
        cost = n.T @ w[placement[-1]]
        placement.append(slots[linear_sum_assignment(cost[:, slots])[1]])
    return np.array(placement)


def _matching(counts, w, nodes, _random):
    """E = G: GPUs are names, so what b of the next layer shares a GPU with is decided for each pair of layers alone."""
    experts = counts.shape[1]
    if experts != len(w) or nodes > 1:
        raise ValueError(f"'matching' needs as many GPUs as experts, on one node; got {len(w)} and {experts}, {nodes}")
    placement = [np.arange(experts)]
    for n in counts:
        a, b = linear_sum_assignment(n, maximize=True)
        after = np.empty(experts, int)
        after[b] = placement[-1][a]
        placement.append(after)
    return np.array(placement)


def _dp(counts, w, _nodes, _random):
    """The shortest path through all balanced layers."""
    states = np.array(list(_balanced(counts.shape[1], len(w))))
    best, choices = np.zeros(len(states)), []
    for n in counts:
        total = best[:, None] + np.stack([(n.T @ w[a])[np.arange(len(n)), states].sum(axis=1) for a in states])
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    way = [int(best.argmin())]
    for choice in reversed(choices):
        way.append(int(choice[way[-1]]))
    return states[way[::-1]]


def _balanced(experts, gpus):
    """All ways to give each GPU E/G experts; ValueError if they are too many."""
    ways, room = 1, experts // gpus
    for g in range(gpus):
        ways *= len(list(combinations(range(experts - g * room), room))) if ways <= MOST_STATES else 1
    if ways > MOST_STATES:
        raise ValueError(f"'dp' for {experts} experts on {gpus} GPUs: over {MOST_STATES} layers; take 'hungarian'")

    def fill(gpu, left, where):
        if not left:
            yield where
            return
        for chosen in combinations(left, room):
            rest = [e for e in left if e not in chosen]
            yield from fill(gpu + 1, rest, where | dict.fromkeys(chosen, gpu))

    return ([where[e] for e in range(experts)] for where in fill(0, list(range(experts)), {}))


def _in_stages(counts, parts, random):
    """Divide experts among the first of `parts`, then each share among the next, as if the rest did not exist."""
    if not parts:
        return np.zeros((len(counts) + 1, counts.shape[1]), int)
    coarse, below = _hungarian(counts, distance(parts[0]), 1, random), int(np.prod(parts[1:]))
    placement = coarse * below
    for part in range(parts[0]):
        inside = [np.flatnonzero(layer == part) for layer in coarse]
        own = np.stack([n[np.ix_(a, b)] for n, a, b in zip(counts, inside[:-1], inside[1:], strict=True)])
        for layer, experts, fine in zip(placement, inside, _in_stages(own, parts[1:], random), strict=True):
            layer[experts] += fine
    return placement


def _bipart(counts, w, _nodes, random):
    levels = len(w).bit_length() - 1
    if 2**levels != len(w):
        raise ValueError(f"'bipart' halves: {len(w)} GPUs are no power of two")
    return _in_stages(counts, [2] * levels, random)


def _anneal(counts, w, _nodes, random, steps=4_000):
    """Swap two experts of a layer; accept a worse one with probability exp(-Δ / temperature); it cools down."""
    layers, experts = len(counts) + 1, counts.shape[1]
    placement = _chain(counts, contiguous(1, experts, len(w))[0], w)
    hot = counts.sum() / (layers * experts) / 4
    for step in range(steps):
        j, (a, b) = random.integers(layers), random.choice(experts, 2, replace=False)
        cost, here = _cost_of_layer(counts, placement, w, j), placement[j]
        rise = cost[a, here[b]] + cost[b, here[a]] - cost[a, here[a]] - cost[b, here[b]]
        if rise <= 0 or random.random() < np.exp(-rise / (hot * (1 - step / steps) ** 2 + 1e-12)):
            here[a], here[b] = here[b], here[a]
    return descent(counts, placement, w)


METHODS = {
    "hungarian": _hungarian,
    "dp": _dp,
    "matching": _matching,
    "bipart": _bipart,
    "nodes first": lambda counts, w, nodes, random: _in_stages(counts, [nodes, len(w) // nodes], random),
    "anneal": _anneal,
}


def _ratio(many, n, few, k):
    if k < 1 or n % k:
        raise ShapeError(f"{n} {many} on {k} {few}: the number must divide, so that each gets as many")
    return n // k
