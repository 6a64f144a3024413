"""LASP-2's layers as a block of `_block` calls them, and the hybrid that mixes them.

Chapter: sequence_parallel/lasp2.
"""

from itertools import cycle
from types import SimpleNamespace

from . import _lasp2_rings, lasp2
from ._block import Attention, exact


def linear(**options):
    """Linear attention; options as for `lasp2.attention`, the exchange included."""

    def forward(comm, q, k, v):
        out, saved = lasp2.attention(comm, q, k, v, return_saved=True, **options)
        return out, (q, k, v, saved)

    def backward(comm, saved, grad_out):
        return lasp2.attention_backward(comm, *saved, grad_out, **options)

    return Attention(forward, backward)


def ring(**options):
    """Linear attention by a ring of keys and values; options as for `_lasp2_rings.attention`."""

    def forward(comm, q, k, v):
        return _lasp2_rings.attention(comm, q, k, v, **options), (q, k, v)

    def backward(comm, saved, grad_out):
        return _lasp2_rings.attention_backward(comm, *saved, grad_out, **options)

    return Attention(forward, backward)


def softmax(causal=True):
    """The softmax layer of LASP-2H."""
    functions = {"attention": lasp2.softmax_attention, "attention_backward": lasp2.softmax_attention_backward}
    return exact(SimpleNamespace(**functions), causal=causal)


def in_turn(*layers):
    """One Attention for a stack of blocks: each block takes the next of `layers`, then from the first again.

    It counts the calls of its forward pass, so every rank makes its own, and a pass must take a whole number of turns.
    """
    turn = cycle(layers)

    def forward(comm, q, k, v):
        layer = next(turn)
        out, saved = layer.forward(comm, q, k, v)
        return out, (layer, saved)

    def backward(comm, saved, grad_out):
        layer, kept = saved
        return layer.backward(comm, kept, grad_out)

    return Attention(forward, backward)


def alone(layer):
    """The layer on a rank that has all tokens of its heads, as in Megatron's sequence parallelism: no messages."""

    def forward(comm, q, k, v):
        return layer.forward(comm.group((comm.rank,)), q, k, v)

    def backward(comm, saved, grad_out):
        return layer.backward(comm.group((comm.rank,)), saved, grad_out)

    return Attention(forward, backward)
