"""Every way to share a sequence, as a layer of training calls it, so that all can stand side by side.

A method is an Attention of a block (`_block`) and the tokens that each rank holds for it. Weights lie in pieces that
are gathered layer by layer (`_zero3`); Megatron cuts them into shards instead.

Here because no module has it: the backward pass of the bidirectional ring, which is the ring's own (out and lse do not
tell which way keys came), and that of TokenRing on nodes.
Chapter: sequence_parallel/which_sequence_parallelism.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from toolkit.runtime import like, positions
from toolkit.runtime.errors import ShapeError

from . import _block as blocks
from . import _gathered as gathered
from . import _megatron_sp as megatron
from . import lasp2, light_seq, ring_attention, token_ring, ulysses
from ._two_level import all_gather, reduce_scatter
from ._zero3 import views

CHUNK = 256  # tokens within which LASP-2 multiplies pairs out


@dataclass(frozen=True)
class Method:
    """One way to share a sequence.

    attention   Attention of a block; for weights in shards, the Attention of one device
    where       (rank, ranks, tokens) -> global positions of the tokens that a rank holds
    in_shards   weights are cut, as Megatron's are, and not gathered
    softmax     False: linear attention, another function
    """

    name: str
    attention: blocks.Attention
    where: Callable
    in_shards: bool = False
    softmax: bool = True


def methods(nodes=1, causal=True):
    """[Method, …] for ranks on so many nodes. A model, a length or a number of ranks may still refuse some."""
    layout = "zigzag" if causal else "contiguous"
    both = {"causal": causal, "layout": layout}
    found = [
        _flat("ring" + causal * ", zigzag", blocks.exact(ring_attention, **both), layout),
        _flat("ring, both ways", both_ways(**both), layout),
        _flat("all-gather", blocks.exact(gathered, **both), layout),
        _flat("TokenRing", blocks.exact(token_ring, **both), layout),
        _flat("Ulysses", ulysses.pair(causal=causal, overlap="qkv_pipeline", replicate_kv=True)),
        Method("Megatron", blocks.one_device(causal), partial(positions, "contiguous"), in_shards=True),
        Method("LASP-2", linear(causal, nodes), partial(positions, "contiguous"), softmax=False),
    ]
    if causal:
        found += [
            _flat("ring, striped", blocks.exact(ring_attention, causal=True, layout="striped"), "striped"),
            _flat("ring, contiguous", blocks.exact(ring_attention, causal=True)),
            _flat("LightSeq", light_seq.pair()),
        ]
    if nodes > 1:
        where = partial(_mesh_positions, layout, nodes)
        found += [
            Method("Ulysses × ring", ulysses.hybrid_pair(nodes=nodes, replicate_kv=True, **both), where),
            _flat("TokenRing × ring", token_ring_on_nodes(nodes, **both), layout),
        ]
    return found


def _flat(name, attention, layout="contiguous"):
    return Method(name, attention, partial(positions, layout))


def _mesh_positions(layout, nodes, rank, size, n):
    return ulysses.hybrid_positions(layout, rank, nodes, size, n)


# ---- one layer of training -------------------------------------------------------------------------------------------


def layer(comm, method, weights, shapes, piece, x, where, head_dim, training=True):
    """One layer in the middle of many. Training keeps its input only: it runs forward, forward again, and backward.

    weights    (n,)          of the block, whole and just gathered; in shards, this rank's
    shapes     of these weights by name, as `_zero3.views` takes them
    piece      (n / P,)      this rank's piece of the next layer's weights: they are gathered, and the last layer's
                             gradients scattered, while this one computes. None: weights in shards need not travel
    x          (tokens, h)   this rank's tokens, and the gradient of the layer's output
    where      (tokens,)     their global positions; in shards those of all tokens
    returns    the layer's output or, training, the gradient of x
    """
    way = megatron if method.in_shards else blocks
    arguments = views(weights, shapes), x, where, method.attention, head_dim
    y = beside(comm, piece, partial(_ahead, way, comm, *arguments))
    if not training:
        return y
    del y
    return beside(comm, piece, partial(_both, way, comm, *arguments), leaving=True)


def _ahead(way, comm, *arguments):
    return way.block(comm, *arguments)[0]


def _both(way, comm, weights, x, where, attention, head_dim):
    _, saved = way.block(comm, weights, x, where, attention, head_dim)
    return way.block_backward(comm, weights, saved, x, attention, head_dim)[0]


def beside(comm, piece, compute, leaving=False):
    """`compute()`, while a layer's weights arrive and, if `leaving`, another's gradients go where they are kept."""
    if piece is None:
        return compute()
    gathers, scatters = comm.split(0), comm.split(0)
    travelling = [gathers.spawn(all_gather, gathers, piece)]
    if leaving:
        gradients = like(comm.size * piece.size, piece.dtype)
        travelling.append(scatters.spawn(reduce_scatter, scatters, gradients))
    result = compute()
    for request in travelling:
        request.wait()
    return result


# ---- pairs that no module has ----------------------------------------------------------------------------------------


def both_ways(*, causal, layout):
    """Half of the keys one way round the ring and half the other; back as in the ring."""

    def forward(comm, q, k, v):
        out, lse = ring_attention.bidirectional_attention(comm, q, k, v, causal=causal, layout=layout, return_lse=True)
        return out, (q, k, v, out, lse)

    return blocks.Attention(forward, blocks.exact(ring_attention, causal=causal, layout=layout).backward)


def linear(causal, nodes):
    """LASP-2's linear attention; its states are gathered through all NICs of a node."""
    exchange = partial(lasp2.gathered, gather=all_gather) if nodes > 1 else lasp2.gathered

    def options(q):
        chunks = q.shape[1] // CHUNK if q.shape[1] % CHUNK == 0 else 1
        return {"causal": causal, "chunks_per_rank": chunks, "exchange": exchange}

    def forward(comm, q, k, v):
        out, saved = lasp2.attention(comm, q, k, v, return_saved=True, **options(q))
        return out, (q, k, v, saved)

    def backward(comm, saved, grad_out):
        return lasp2.attention_backward(comm, *saved, grad_out, **options(grad_out))

    return blocks.Attention(forward, backward)


def token_ring_on_nodes(nodes, *, causal, layout):
    """TokenRing inside nodes, a ring of keys between them, as the Attention of a block."""

    def forward(comm, q, k, v):
        options = {"nodes": nodes, "causal": causal, "layout": layout}
        out, lse = token_ring.hybrid_attention(comm, q, k, v, return_lse=True, **options)
        return out, (q, k, v, out, lse)

    def backward(comm, saved, grad_out):
        return token_ring_on_nodes_backward(comm, *saved, grad_out, nodes=nodes, causal=causal, layout=layout)

    return blocks.Attention(forward, backward)


def token_ring_on_nodes_backward(comm, q, k, v, out, lse, grad_out, *, nodes, causal, layout):
    """`ring_attention.attention_backward` with nodes for ranks: a block of two nodes is TokenRing's backward pass.

    Of two nodes, one has all its early chunks before the other's, and all its late ones after: what is visible between
    nodes is what is visible between ranks.
    returns   (dq, dk, dv), in float64 for float64 input and else float32
    sends     between nodes as the ring of `nodes` ranks does; inside, `nodes` times what TokenRing does
    raises    ShapeError  a striped causal layout
    """
    if causal and layout == "striped":
        raise ShapeError("TokenRing on nodes goes backward in contiguous and zigzag layouts")
    per_node = comm.size // nodes
    node, place = divmod(comm.rank, per_node)
    inside = comm.group(range(node * per_node, (node + 1) * per_node))
    across = comm.group(range(place, comm.size, per_node))
    travelling = None
    for step in range(nodes):
        incoming = across.ishift((k, v), by=1, tag="keys and values") if step < nodes - 1 else None
        part = ring_attention.visible(layout, causal, node, (node - step) % nodes, q)
        block = None
        if part is not None:
            rows, columns, masked = part
            given = (q[:, rows], k[:, columns], v[:, columns], out[:, rows], lse[:, rows], grad_out[:, rows])
            block = token_ring.attention_backward(inside, *given, causal=masked, layout=layout)
        if step == 0:
            dq, *grads = block
        else:
            grads = travelling.wait()
            ring_attention.add_gradients(dq, grads, block, part)
        if nodes > 1:
            travelling = across.ishift(tuple(grads), by=1, tag="gradients")
        if incoming:
            k, v = incoming.wait()
    return (dq, *(travelling.wait() if travelling else grads))
