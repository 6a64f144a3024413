"""What a micro-batch takes: the paper's profiled cost model, and what a ring of D ranks adds to it.

One layer, forward, on one rank: T(s) = α₁ s² + β₁ s + γ seconds and Act(s) = α₂ s + β₂ bytes that stay for the backward
pass. Backward computes twice as long and sends twice as much (keys, values, and their gradients). In a ring of D ranks
a hop hides behind the attention of one block, α₁ s²/D², as far as that is longer.
Chapter: sequence_parallel/byte_scale.
"""

from dataclasses import dataclass

import numpy as np

K = 1024
# Milliseconds of attention and MLP, one layer, 4K … 128K tokens: read off a figure of the paper, hardware undisclosed.
# Attention grows less than quadratically from 8K on: x² + x with x = s/8K would be 2.6 times too long for it at 128K.
MEASURED = {4: (0.8, 0.9), 8: (1.8, 1.8), 16: (4.8, 3.6), 32: (14.1, 7.5), 64: (48.2, 15.1), 128: (175.5, 28.2)}


@dataclass(frozen=True)
class Cost:
    """One layer on one rank, and what the rank is joined by.

    square, linear, fixed   α₁ (s/token²), β₁ (s/token), γ (s): T(s), forward
    act_token, act_fixed    α₂ (bytes/token), β₂ (bytes): Act(s)
    kv_token                bytes of keys and values a token
    network, host           bytes/s to another rank; bytes/s to host memory and back, the slower of the two
    layers                  l, layers of the model
    """

    square: float
    linear: float
    fixed: float
    act_token: float
    act_fixed: float
    kv_token: float
    network: float
    host: float
    layers: int

    def seconds(self, s):
        """T(s): one layer, forward, on one rank. s: tokens, a number or an array."""
        return self.square * s * s + self.linear * s + self.fixed

    def act(self, s):
        """Act(s): bytes that one layer keeps for the backward pass."""
        return self.act_token * s + self.act_fixed

    def work(self, s):
        """Seconds that a sequence takes on one rank: all layers, forward and backward, without γ."""
        return 3 * self.layers * (self.seconds(s) - self.fixed)

    def passes(self, lengths, ranks, r=0.0):
        """One layer of a micro-batch on each of its ranks.

        lengths   tokens of its sequences, each spread over all `ranks`
        r         share of the activations that goes to the host during the forward pass and comes back
        returns   (compute, exposed): seconds, each a pair (forward, backward); exposed: what is waited for
        """
        tokens = sum(lengths)
        block = self.square * sum(s * s for s in lengths) / ranks**2
        compute = self.linear * tokens / ranks + self.fixed + ranks * block
        hop = tokens / ranks * self.kv_token / self.network
        late = (ranks - 1) * max(0.0, hop - block)
        home = hop if ranks > 1 else 0.0  # gradients make one hop more than keys, and nothing hides it
        copy = r * self.act(tokens) / ranks / self.host
        waits = (max(late, copy - compute), max(2 * late + home, copy - 2 * compute))
        return (compute, 2 * compute), waits

    def micro_batch(self, lengths, ranks, r=0.0):
        """(compute, exposed) seconds of a micro-batch on each of its ranks: all layers, forward and backward."""
        compute, exposed = self.passes(lengths, ranks, r)
        return self.layers * sum(compute), self.layers * sum(exposed)

    def resident(self, tokens, r=0.0):
        """Bytes of activations at their peak on a rank with so many tokens: two layers whole, 1 - r of the others."""
        return (2 + (1 - r) * (self.layers - 2)) * self.act(tokens)


def fit(tokens, seconds):
    """(α₁, β₁, γ) ≥ 0 of measured times, by least squares of the relative error."""
    from scipy.optimize import nnls

    s, t = np.asarray(tokens, float), np.asarray(seconds, float)
    unit = s.max()  # so that the columns are of one size
    columns = np.stack([(s / unit) ** 2, s / unit, np.ones_like(s)], axis=1)
    square, linear, fixed = nnls(columns / t[:, None], np.ones_like(t))[0]
    return float(square / unit**2), float(linear / unit), float(fixed)


def llama_7b(network=8 * 25e9, host=8 * 25e9, layers=32):
    """LLaMA-7B with the paper's measured times. A rank is eight GPUs with one tensor-parallel copy of each layer.

    Ours, because the paper names no hardware: eight GPUs a rank (then its times mean 153 TFLOP/s a GPU), a 200 Gb/s
    NIC and a PCIe 4 ×16 port (25 GB/s of payload) for each, activations of 34 bytes a token and channel
    (Korthikanti et al. 2022), keys and values in 16 bits.
    """
    square, linear, fixed = fit([k * K for k in MEASURED], [1e-3 * sum(pair) for pair in MEASURED.values()])
    return Cost(square, linear, fixed, 34 * 4096, 0.0, 2 * 4096 * 2, network, host, layers)
