"""GNNPipe: a device has some layers of the whole graph; chunks of vertices flow through, old values fill the gaps.

Vertices cut among devices exchange the neighbours' rows in every layer. Layers cut among devices exchange one table a
border, however deep the network is. But a graph has no independent microbatches: when chunk c passes a layer, its
neighbours in chunks still to come have no fresh values, so the layer reads *historical* ones, kept from `period` epochs
ago. The backward pass takes the chunks in reverse; gradients through historical values are zero, so it is the exact
gradient of what was computed. Weights wait for the end of the epoch: nothing else is stale.

One program is four schemes. Ranks = stages × group:
    stages, group 1, K chunks    GNNPipe            stages, group 1, 1 chunk     layer parallelism, exact, mostly idle
    1 stage, a group, 1 chunk    graph parallelism  stages × group, K chunks     the hybrid of both
With one chunk nothing is historical and every scheme is exact.

Bytes an epoch, e a value, rho = average number of other parts that need a vertex:
    between stages   2 (p-1) N h e, for GCNII 4 (p-1) N h e: its first hidden state rides along
    inside groups    2 (L-1) rho N h e, for GCNII 2 L rho N h e
Ours: features never change, so graph parallelism exchanges their rows once, before the first epoch; in every epoch it
would be rho N d0 e more (`volume_graph` has both). Chunks arrive in stage 0's order, which every rank derives from the
seed: their numbers need no message. No layer has dropout.
Source: Chen, Chen and Qian 2023, arXiv 2308.10087, and the code it publishes (REVERSE_PERIOD, backward order).
Chapter: model_parallel/gnn_pipe.
"""

import numpy as np

from toolkit.kernels.elementwise import accumulate
from toolkit.runtime import per_rank
from toolkit.runtime.algorithms import concatenate
from toolkit.runtime.errors import ShapeError

from . import _gnn_pipe_layers as kernels
from ._gnn_pipe_graph import chunk_adjacency, cut, needed, partition_vertices
from ._gnn_pipe_share import shares
from ._gnn_pipe_wire import wire
from ._mesh import Grid
from ._pipeline import run
from ._schedule import Pass, Schedule

__all__ = ["chunk_adjacency", "cut", "needed", "partition_vertices", "predict", "shares", "train"]


def train(comm, share, weights, *, layers, epochs, group=1, period=20, rate=0.01, seed=0, shuffle=True, reverse=True,
          compress=False):  # fmt: skip
    """Train a network, each rank its layers on its vertices; ranks of one stage are neighbours in number.

    share      Share of this rank's part of the graph, cut into K chunks: see `placed`
    weights    tuple of arrays, one a layer, the whole network's
    layers     tuple of Layer          group   ranks a stage          epochs   one step of Adam each
    period     epochs between refreshes of the historical values, 20 in the authors' code; 1: those of the last epoch
    shuffle    chunks in a new order each epoch        reverse   False: the wrong backward order, to see what it does
    compress   send zeros of activations as a bit each (numeric runs only; lossless)
    returns    (this stage's weights, loss of each epoch: this rank's part of the sum, 0 but in the last stage)
    raises     ShapeError  ranks do not divide into groups, or more stages than layers
    """
    if group < 1 or comm.size % group:
        raise ShapeError(f"{comm.size} ranks do not divide into groups of {group}")
    grid = Grid(comm, dp=group, pp=comm.size // group)
    stage = GNNPipeStage(share, layers, weights, grid.pp.rank, grid.pp.size, grid.dp)
    plan = schedule(grid.pp.size, len(share.chunks), reverse)
    for epoch in range(epochs):
        if epoch % period:
            stage.recall()
        one_epoch(grid.pp, stage, plan, permutation(seed if shuffle else None, epoch, len(share.chunks)), compress)
        stage.step(rate)
        comm.barrier()
        if (epoch + 1) % period == 0:
            stage.remember()
    return stage.weights, stage.losses


def one_epoch(pp, stage, plan, order, compress=False):
    """Every chunk forward, then every chunk backward in reverse order; gradients add up in the stage."""
    run(
        pp,
        plan,
        forward=lambda _, k, message: stage.forward(order[k], message),
        backward=lambda _, k, saved, message: stage.backward(order[k], saved, message),
        **(wire(stage) if compress else {}),
    )


def schedule(stages, chunks, reverse=True):
    """GPipe's fill and drain, but the last chunk turns back first: 2 (K + p - 1) slots. Pass.microbatch is a place in
    the order of chunks."""
    back = range(chunks)[::-1] if reverse else range(chunks)
    order = (*(Pass("F", i) for i in range(chunks)), *(Pass("B", i) for i in back))
    return Schedule("GNNPipe", chunks, (order,) * stages, tuple((rank,) for rank in range(stages)))


def permutation(seed, epoch, chunks):
    """The order of chunks in an epoch, the same on every rank and engine; seed None: always 0, 1, 2, …"""
    if seed is None:
        return list(range(chunks))
    return np.random.default_rng((seed, epoch)).permutation(chunks).tolist()


class GNNPipeStage:
    """Some layers, and for each a table of its input for the *whole* graph: fresh rows and historical ones.

    tables     {layer: (own, halo)}: rows of own vertices, and of those that others of the group send
    history    the same, of the last refresh; zeros at first, and empty with one chunk, which needs none
    sums       {layer: (own, halo)}: gradients of neighbour sums; zero for chunks whose backward pass is to come
    """

    def __init__(self, share, layers, weights, rank=0, stages=1, group=None):
        self.share, self.group = share, group if group is not None and group.size > 1 else None
        first, end = stage_layers(layers, stages, rank)
        self.layers, self.places = layers, range(first, end)
        self.last = end == len(layers)
        self.weights = {i: weights[i] for i in self.places}
        self.grads, self.means, self.squares = (
            {i: kernels.new_table(w, *w.shape) for i, w in self.weights.items()} for _ in range(3)
        )
        self.losses, self.loss = [], kernels.new_table(share.features, 1, 1)
        looking = [i for i in self.places if layers[i].kind != "dense"]
        self.inner = [i for i in looking if i > 0]  # their inputs are computed, so they can be historical
        self.tables, self.sums = self._empty(share.forward), self._empty(share.backward)
        self.history = self._empty(share.forward) if len(share.chunks) > 1 else {}
        if 0 in looking:
            self.tables[0] = share.features, self._features_of_others()

    def forward(self, c, message):
        """Chunk c through this stage's layers. message: x, or (x, x0) of GCNII; None in the first stage."""
        x, x0 = opened(message) if message is not None else (self.share.features[self.share.chunks[c]], None)
        saved = []
        for i in self.places:
            layer, mixed = self.layers[i], x
            if layer.kind != "dense":
                around = self._around(self.share.forward, self.tables[i], c, x if i > 0 else None)
                mixed = kernels.mix(layer.kind, around, x, x0)
            x = kernels.transform(mixed, self.weights[i], layer.beta, layer.relu)
            saved.append((mixed, x))  # the sum itself: rows of neighbours will change
            if layer.kind == "dense" and i == 0:
                x0 = x
        return (x if x0 is None or self.last else (x, x0)), saved

    def backward(self, c, saved, message):
        """Chunk c back through the layers. message: gradient of what `forward` returned; None in the last stage."""
        grad, grad0 = opened(message) if message is not None else (self._loss(c, saved[-1][1]), None)
        for i in reversed(self.places):
            layer, (mixed, y) = self.layers[i], saved.pop()
            if layer.kind == "dense" and i == 0:
                grad = accumulate(grad, grad0)  # x0 is where both ways begin
            dz = kernels.weight_gradient(self.grads[i], mixed, y, grad, layer.beta, layer.relu)
            if i == 0:
                return None
            grad = kernels.input_gradient(dz, self.weights[i], layer.beta)
            if layer.kind != "dense":
                around, own, more = kernels.mix_backward(layer.kind, grad)
                grad = self._around(self.share.backward, self.sums[i], c, around)
                grad = grad if own is None else accumulate(grad, own)
                grad0 = more if grad0 is None or more is None else accumulate(grad0, more)
        return grad if grad0 is None else (grad, grad0)

    def _around(self, side, table, c, x):
        """Matrix rows of chunk c times the table, once the rows of c are x: here, and where the group needs them.

        What others send is awaited after the product with own rows.
        """
        own, halo = table
        arriving = None
        if x is not None:
            kernels.write(own, self.share.chunks[c], x)
            if self.group:
                arriving = self._exchange(side.gives[c], own)
        total = kernels.neighbour_sum(side.own[c], own)
        if arriving:
            kernels.write(halo, side.takes[c], concatenate(arriving.wait()))
        return kernels.add_neighbour_sum(total, side.halo[c], halo) if self.group else total

    def _exchange(self, gives, table):
        """Start sending the rows that each rank of the group needs."""
        return self.group.iall_to_all(tuple(kernels.pick(table, rows) for rows in gives), algorithm="direct")

    def _loss(self, c, logits):
        rows = self.share.chunks[c]
        loss, grad = kernels.cross_entropy(logits, self.share.labels[rows], self.share.weight[rows])
        accumulate(self.loss, loss)
        return grad

    def step(self, rate):
        """The end of an epoch: sum gradients over the group, move the weights, clear what was added up."""
        for i, w in self.weights.items():
            grad = self.group.all_reduce(self.grads[i]) if self.group else self.grads[i]
            kernels.adam_step(w, grad, self.means[i], self.squares[i], len(self.losses) + 1, rate)
            kernels.clear(self.grads[i])
        for part in (part for i in self.history for part in self.sums[i]):  # a single chunk leaves nothing to clear
            kernels.clear(part)
        self.losses.append(float(self.loss[0, 0]))
        kernels.clear(self.loss)

    def recall(self):
        """Historical values into the tables."""
        self._copy(self.history, self.tables)

    def remember(self):
        """The tables become the historical values."""
        self._copy(self.tables, self.history)

    def _copy(self, source, target):
        for i in self.history:
            for values, table in zip(source[i], target[i], strict=True):
                kernels.write(table, slice(None), values)

    def _empty(self, side):
        """Tables of zeros, one a layer. A single chunk overwrites all rows at once: there one serves all layers."""
        rows = len(self.share.vertices), side.halo_rows

        def table(i):
            return tuple(kernels.new_table(self.share.features, n, self.layers[i].fan_in) for n in rows)

        if len(self.share.chunks) == 1 and self.inner:
            return dict.fromkeys(self.inner, table(self.inner[0]))
        return {i: table(i) for i in self.inner}

    def _features_of_others(self):
        """Rows of features that the group's ranks need of each other: they never change and travel once."""
        side, features = self.share.forward, self.share.features
        halo = kernels.new_table(features, side.halo_rows, features.shape[1])
        for gives, takes in zip(side.gives, side.takes, strict=True) if self.group else ():
            arrived = self._exchange(gives, features).wait()
            kernels.write(halo, takes, concatenate(arrived))
        return halo


def stage_layers(layers, stages, rank):
    """(first, end) of a stage: layers that look at neighbours are dealt evenly; the dense ends go to the end stages."""
    looking = [i for i, layer in enumerate(layers) if layer.kind != "dense"]
    if stages > len(looking):
        raise ShapeError(f"{len(looking)} layers do not fill {stages} stages: use fewer stages or a deeper network")
    cuts = [0, *(looking[len(looking) * k // stages] for k in range(1, stages)), len(layers)]
    return cuts[rank], cuts[rank + 1]


def opened(message):
    """(x, x0) of a message that may be x alone."""
    return message if isinstance(message, tuple) else (message, None)


# ---- around training -------------------------------------------------------------------------------------------------


def placed(parts, stages):
    """The argument `share` of `train`: parts (a list of Share, one a rank of a group) for each of so many stages."""
    return per_rank(list(parts) * stages)


def predict(graph, layers, weights):
    """Logits (n, classes) of exact inference on one device: no chunk, nothing historical.

    weights   tuple, or dict layer -> array; the stages' dicts of a run may be merged with `|`
    """
    share = shares(graph, np.zeros(len(graph.labels), np.int64))[0]
    logits, _ = GNNPipeStage(share, layers, weights).forward(0, None)
    return logits[np.argsort(share.vertices)]


def trained(finished):
    """(weights of the whole network {layer: array}, loss of each epoch (epochs,)) of a run of `train`."""
    weights = {}
    for own, _ in finished.outputs:
        weights |= own
    return weights, np.sum([losses for _, losses in finished.outputs], axis=0)


# ---- counted before anything runs ------------------------------------------------------------------------------------


def volume_pipe(vertices, hidden, stages, gcnii=False, itemsize=4):
    """Bytes an epoch between stages, all borders, both ways: no depth in it, and no graph."""
    return (4 if gcnii else 2) * (stages - 1) * vertices * hidden * itemsize


def volume_graph(adjacency, part, depth, hidden, width=None, gcnii=False, itemsize=4):
    """Bytes an epoch of graph parallelism, or inside the groups of a hybrid: rows forward, their gradients back.

    part    of each vertex        width   of features that are sent again each epoch; None: they were sent once, before
    """
    there, back = (int(needed(a, part).sum()) for a in (adjacency, adjacency.T))
    computed = depth if gcnii else depth - 1
    return itemsize * (computed * hidden * (there + back) + (0 if gcnii or width is None else width * there))


def stale_pairs(order, adjacency):
    """{(source chunk, target chunk)} whose values are historical in the forward pass.

    order       chunks in the order of the epoch       adjacency   [target, source] bool, see `chunk_adjacency`
    """
    place = {c: i for i, c in enumerate(order)}
    targets, sources = np.nonzero(adjacency)
    pairs = zip(sources.tolist(), targets.tolist(), strict=True)
    return {(source, target) for source, target in pairs if place[source] > place[target]}
