"""A language model as buckets: what is gathered, used and given back as one vector.

The embedding, each layer, and norm and head are a bucket each. A bucket's forward and backward are those of the part
(`_layers`), on one rank. Chapter: model_parallel/frontier_partitioning.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toolkit.runtime import Cost, kernel, like
from toolkit.sequence_parallel._block import model_weights, one_device

from . import _layers as layers
from ._vocabulary import embed_rows, embed_rows_backward


@dataclass(frozen=True)
class Bucket:
    """forward (weights, x) -> (y, saved); backward (weights, saved, grad) -> (dx, grads of the same names)."""

    forward: Callable
    backward: Callable


@dataclass(frozen=True)
class Model:
    """GPT with the project's block. recompute: a layer keeps its input only, and runs forward again."""

    layers: int
    h: int
    heads: int
    vocabulary: int
    recompute: bool = False

    def weights(self, random=None, dtype="float16"):
        """The buckets' weights, [{name: array}, …]; shape-only without a generator."""
        head_dim, hidden = self.h // self.heads, 4 * self.h
        whole = model_weights(
            random, self.vocabulary, self.layers, self.h, self.heads, self.heads, head_dim, hidden, dtype
        )
        ends = {name: whole[name] for name in ("norm", "head")}
        return [{"embedding": whole["embedding"]}, *whole["layers"], ends]

    def buckets(self, comm, tokens, targets, scale):
        """The Buckets for one microbatch: the first takes no x, the last returns the loss.

        tokens, targets   (sequences, n) integers of this rank
        scale             what the sum of the tokens' losses is multiplied with
        """
        alone = comm.group([comm.rank])
        positions = np.arange(tokens.shape[1])
        setting = layers.Setting(alone, alone, one_device(causal=True), self.h // self.heads, positions)
        text, wanted = tokens.reshape(-1), targets.reshape(-1)

        def embed(weights, _x):
            return embed_rows(weights["embedding"], text, 0), None

        def embed_backward(weights, _saved, grad):
            return None, {"embedding": embed_rows_backward(weights["embedding"], text, 0, grad)}

        def head(weights, x):
            losses, saved = layers.head(setting, weights["norm"], weights["head"], x, wanted)
            return scaled_sum(losses, scale), (losses, saved)

        def head_backward(weights, saved, _grad):
            each = evenly(saved[0], scale)
            dx, d_norm, d_head = layers.head_backward(setting, weights["norm"], weights["head"], saved[1], wanted, each)
            return dx, {"norm": d_norm, "head": d_head}

        forward = layers.recomputed if self.recompute else layers.block
        backward = layers.recomputed_backward if self.recompute else layers.block_backward
        layer = Bucket(
            lambda weights, x: forward(setting, weights, x),
            lambda weights, saved, grad: backward(setting, weights, saved, grad),
        )
        return [Bucket(embed, embed_backward), *[layer] * self.layers, Bucket(head, head_backward)]


@kernel(cost=lambda x, scale: Cost(0, x.nbytes), out=lambda x, scale: like((), x.dtype))
def scaled_sum(x, scale):
    """scale · sum(x)."""
    return np.asarray(x.sum() * scale)


@kernel(cost=lambda x, value: Cost(0, x.nbytes), out=lambda x, value: like(x))
def evenly(x, value):
    """`value` in the shape of x."""
    return np.full_like(x, value)
