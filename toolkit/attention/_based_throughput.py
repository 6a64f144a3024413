"""What a step of decoding and a prefill cost: bytes read and written, on one described device.

A decode step reads all weights once for the whole batch, and the state of every sequence. Attention's state grows with
the context; BASED's is read and written back, and keeps its size. One fused launch a step: the best case for both.
Source: Arora et al. 2024, arXiv 2402.18668. Chapter: attention/based.
"""

from dataclasses import dataclass

import numpy as np

from toolkit.kernels.linear_attention import check, normalised, with_ones
from toolkit.runtime import Cluster, Cost, hardware, kernel, like, topology

from . import based

# ---- decoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A stack by numbers. Layers that are neither attention, linear nor windows are gated convolutions (width 3)."""

    name: str
    parameters: float
    channels: int
    layers: int
    attention: int = 0
    linear: int = 0
    windows: int = 0
    heads: int = 16
    feature_dim: int = 16
    window: int = 64

    def fixed(self):
        """Numbers of one sequence's state that are there whatever the context."""
        features = 1 + self.feature_dim + self.feature_dim**2
        convolutions = self.layers - self.attention - self.linear - self.windows
        per_layer = features * (self.channels + self.heads), 2 * self.window * self.channels, 2 * self.channels
        return sum(n * size for n, size in zip((self.linear, self.windows, convolutions), per_layer, strict=True))

    def per_token(self):
        """Numbers that every token adds: keys and values of the attention layers."""
        return 2 * self.attention * self.channels


# 1.3 billion: 12 D² a layer and a vocabulary of 50 257. One layer in five linear and one a window, as in the released
# 360M stack (5 and 5 of 27 layers); both models are given the same weights to read.
TRANSFORMER = Model("softmax attention", 1.31e9, 2048, 24, attention=24)
BASED = Model("BASED", 1.31e9, 2048, 24, linear=5, windows=5)


@kernel(cost=lambda template: Cost(), out=like)
def reserve(template):
    """Memory, without work."""
    return np.zeros(template.shape, template.dtype)


def _decode_cost(weights, state, batch, read, written):
    return Cost(2 * batch * (weights.size + read), weights.nbytes + batch * (read + written) * state.itemsize)


@kernel(cost=_decode_cost, out=lambda weights, state, batch, read, written: like((batch,), "int64"))
def decode_step(weights, state, batch, read, written):
    """One token for each of `batch` sequences; `read` and `written` count numbers of one sequence's state."""


def generate(comm, model, batch, prompt, tokens):
    """Decode `tokens` tokens for `batch` sequences after a prompt; shape-only, in 16 bits.

    raises   OutOfDeviceMemory  weights and states do not fit
    """
    weights = reserve(like((int(model.parameters),), "float16"))
    numbers = model.fixed() + model.per_token() * (prompt + tokens)
    state = reserve(like((batch, int(numbers)), "float16"))
    for context in range(prompt, prompt + tokens):
        read = model.fixed() + model.per_token() * context
        decode_step(weights, state, batch, read, model.fixed() + model.per_token())


def tokens_per_second(model, batch, prompt=1024, tokens=1024, device=hardware.H100):
    """Throughput of `generate`, in virtual time. Raises OutOfDeviceMemory."""
    run = Cluster(topology.ring(1, hardware.NVLINK4), device).run(generate, model, batch, prompt, tokens)
    return batch * tokens / run.makespan


def largest_batch(model, prompt=1024, tokens=1024, device=hardware.H100):
    """How many sequences fit beside the weights."""
    one = 2 * (model.fixed() + model.per_token() * (prompt + tokens))
    return int((device.memory_capacity - 2 * int(model.parameters)) // one)


# ---- prefill ---------------------------------------------------------------------------------------------------------


def _features_cost(x):
    return Cost(x.size * x.shape[-1], x.nbytes + _features_out(x).nbytes)


def _features_out(x):
    return like((*x.shape[:-1], 1 + x.shape[-1] + x.shape[-1] ** 2), x.dtype)


@kernel(cost=_features_cost, out=_features_out)
def write_features(x):
    """φ(x), written to memory."""
    return based.taylor_features(x)


def _causal_cost(phi_q, phi_k, v):
    return Cost(4 * phi_q.size * (v.shape[-1] + 1), phi_q.nbytes + phi_k.nbytes + 2 * v.nbytes)


@kernel(cost=_causal_cost, out=lambda phi_q, phi_k, v: like(v))
def causal_product(phi_q, phi_k, v):
    """Causal linear attention from features that lie in memory."""
    check(phi_q, phi_k, v)
    weights = np.tril(phi_q @ np.swapaxes(phi_k, -1, -2))
    return normalised(weights @ with_ones(v))


def unfused_prefill(comm, q, k, v):
    """The prefill that writes features out and reads them back."""
    return causal_product(write_features(q), write_features(k), v)


def fused_prefill(comm, q, k, v):
    """BASED's prefill: q, k and v are read once, the output is written once, and the state at the end."""
    return based.chunked(q, k, v)[0]


def prefill_bytes(program, q, k, v):
    """Bytes to and from memory that a prefill is charged. Arrays or shapes."""
    run = Cluster(topology.ring(1, hardware.NVLINK4), hardware.H100).run(program, q, k, v)
    return sum(event.bytes for event in run.trace if event.kind == "compute")
