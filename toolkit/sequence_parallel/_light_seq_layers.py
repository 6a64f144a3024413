"""Checkpoints of transformer layers: what is kept of each, and what is computed again.

"layer" is the usual one (Chen et al. 2016, arXiv 1604.06174). "remat_aware" also keeps attention's own output and lse.
Attention's backward pass recomputes scores from q, k, v and lse anyway, so its forward pass need not run again: the
layer is, with an attention that knows its answer.
Source: Li, Shao et al. 2023, arXiv 2310.03294, section 3.3. Chapter: sequence_parallel/light_seq.
"""

from dataclasses import replace

from ._block import block, block_backward


def layer(comm, weights, x, where, attention, head_dim, checkpoint):
    """A transformer block and what is kept of it for `layer_backward`.

    checkpoint   "none": all that the backward pass uses. "layer": the input. "remat_aware": the input, and out and lse
                 of an Attention that saves (q, k, v, out, lse)
    returns      (y, kept)
    raises       ValueError  "remat_aware" with an Attention that saves something else
    """
    y, saved = block(comm, weights, x, where, attention, head_dim)
    if checkpoint == "none":
        return y, saved
    if checkpoint == "layer":
        return y, (x,)
    of_attention = saved[0][-1]
    if len(of_attention) != 5:
        raise ValueError(
            f"remat_aware: this attention saves {len(of_attention)} things, not (q, k, v, out, lse) as LightSeq and "
            "rings do: use checkpoint='layer'"
        )
    return y, (x, *of_attention[3:])


def layer_backward(comm, weights, kept, where, grad, attention, head_dim, checkpoint):
    """Gradients (dx, grads) of `layer`. What was not kept is computed again by the same kernels in the same order."""
    saved = kept
    if checkpoint != "none":
        x, *known = kept
        again = remembered(attention, *known) if known else attention
        _, saved = block(comm, weights, x, where, again, head_dim)
    return block_backward(comm, weights, saved, grad, attention, head_dim)


def remembered(attention, out, lse):
    """The Attention whose answer is known already: its forward pass computes nothing and sends nothing."""
    return replace(attention, forward=lambda _comm, q, k, v: (out, (q, k, v, out, lse)))
