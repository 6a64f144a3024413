"""Red-blue pebble game: the fewest transfers of a small computation, by exhaustive search.

A red pebble is a word in fast memory, a blue one a word in slow memory. Inputs start blue, outputs must end blue, at
most `red` red pebbles lie at once. Reading (blue to red) and writing (red to blue) cost one; computing a node whose
operands are red is free, and may move the pebble of an operand, as an operation in place does; so is taking one away.
Any node may be computed again. Source: Hong and Kung 1981. Chapter: attention/io_complexity.
"""

from heapq import heappop, heappush
from typing import NamedTuple

from toolkit.runtime.errors import RuntimeFault


class SearchTooLarge(RuntimeFault):
    """The search met more states than it may keep."""


class Graph(NamedTuple):
    """A computation. operands: for each node the tuple of nodes it needs (empty: an input). outputs: set of nodes."""

    operands: tuple
    outputs: frozenset


def attention_graph(tokens):
    """Attention with one channel: weights exp(q k), their sums, weighted values, sums of these, quotients."""
    operands, outputs = [()] * (3 * tokens), set()

    def node(*needs):
        operands.append(needs)
        return len(operands) - 1

    for i in range(tokens):
        weights = [node(i, tokens + j) for j in range(tokens)]
        total, out = weights[0], node(weights[0], 2 * tokens)
        for j in range(1, tokens):
            total, out = node(total, weights[j]), node(out, node(weights[j], 2 * tokens + j))
        outputs.add(node(out, total))
    return Graph(tuple(operands), frozenset(outputs))


def fewest_transfers(graph, red, most_states=1_000_000):
    """Length of a shortest game with `red` pebbles, or None. A* over the sets of red and of blue nodes.

    raises  SearchTooLarge
    """
    game = _Game(graph, red)
    paid, state = game.settled(0, 0, 0)
    best, queue = {state: paid}, [(paid + game.still_to_pay(*state), -paid, state)]
    while queue:
        _, paid, state = heappop(queue)
        if -paid > best[state]:
            continue
        if not game.outputs & ~state[1]:
            return -paid
        for total, after in game.moves(-paid, *state):
            if total < best.get(after, 1 << 30):
                best[after] = total
                heappush(queue, (total + game.still_to_pay(*after), -total, after))
        if len(best) > most_states:
            raise SearchTooLarge(f"more than {most_states:,} states: take a smaller graph or another number of pebbles")
    return None


class _Game:
    """The rules, on sets of nodes kept as bits. Blue leaves out the inputs, which always are."""

    def __init__(self, graph, red):
        self.most, self.nodes = red, [(x, 1 << x) for x in range(len(graph.operands))]
        self.needs = [sum(1 << x for x in operands) for operands in graph.operands]
        self.inputs = sum(bit for x, bit in self.nodes if not self.needs[x])
        self.outputs = sum(1 << x for x in graph.outputs)
        self.needed = {}  # outputs written -> useful nodes
        self.leads_to = [0] * len(self.nodes)  # outputs above a node; operands come before their node
        for x, bit in reversed(self.nodes):
            self.leads_to[x] |= self.outputs & bit
            for operand in graph.operands[x]:
                self.leads_to[operand] |= self.leads_to[x]

    def settled(self, paid, red, blue):
        """(paid, (red, blue)) after all moves that never hurt.

        Write an output, drop what no open output needs, and compute what can be while there is room.
        """
        while True:
            done = red & self.outputs & ~blue
            paid, blue = paid + done.bit_count(), blue | done
            useful = self.useful(blue)
            red &= useful
            ready = next(self.computable(red, useful), None) if red.bit_count() < self.most else None
            if ready is None:
                return paid, (red, blue)
            red |= ready

    def useful(self, blue):
        """Nodes that an output not yet written needs."""
        written = self.outputs & blue
        if written not in self.needed:
            still = self.outputs & ~written
            self.needed[written] = sum(bit for x, bit in self.nodes if self.leads_to[x] & still)
        return self.needed[written]

    def computable(self, red, useful):
        """Nodes without a red pebble whose operands all have one."""
        return (bit for x, bit in self.nodes if self.needs[x] and bit & useful & ~red and not self.needs[x] & ~red)

    def moves(self, paid, red, blue):
        """(paid, state) after each move that places one red pebble; where there is no room, another gives way.

        The one that gives way may be written first. Giving way to a node that it is an operand of is sliding.
        """
        useful = self.useful(blue)
        readable = (blue | self.inputs) & useful & ~red
        full = red.bit_count() == self.most
        placed = [(1, bit) for _, bit in self.nodes if bit & readable]
        placed += [(0, bit) for bit in self.computable(red, useful)]
        for cost, bit in placed:
            for victim in [v for _, v in self.nodes if v & red] if full else [0]:
                yield self.settled(paid + cost, red & ~victim | bit, blue)
                if victim & ~(blue | self.inputs):
                    yield self.settled(paid + cost + 1, red & ~victim | bit, blue | victim)

    def still_to_pay(self, red, blue):
        """No game from here is cheaper: outputs to write, and inputs without which nothing leads to them."""
        pending = self.outputs & ~blue
        cost, ahead = pending.bit_count(), pending
        for x, bit in reversed(self.nodes):
            if ahead & bit & ~red:
                if bit & self.inputs:
                    cost += 1
                elif not bit & blue:
                    ahead |= self.needs[x]
        return cost
