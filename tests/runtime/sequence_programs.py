"""Programs of attention and of sequence parallelism, for `book_programs`."""

from functools import partial
from types import SimpleNamespace

import numpy as np

from toolkit.attention import _flash_attention_baselines as flash_rivals
from toolkit.attention import _trans_mla_decode as decoding
from toolkit.attention import _trans_mla_layers as latent
from toolkit.attention import flash_attention
from toolkit.runtime import positions, shard
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _byte_scale_execute as packed
from toolkit.sequence_parallel import _gathered as gathered
from toolkit.sequence_parallel import _lasp2_rings as linear_rings
from toolkit.sequence_parallel import _light_seq_rsa as rows_of_scores
from toolkit.sequence_parallel import _megatron_sp as tensor_parallel
from toolkit.sequence_parallel import _methods as methods
from toolkit.sequence_parallel import _zero3 as zero3
from toolkit.sequence_parallel import byte_scale, lasp2, light_seq, ring_attention, ulysses

HEAD_DIM, VOCABULARY = 4, 24


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ---- attention -------------------------------------------------------------------------------------------------------


def token_by_token(comm, layer, x, step):
    mine = decoding.shares(layer, comm.size)[comm.rank]
    cache = decoding.empty_cache(mine, len(x), x.shape[1])
    return [step(comm, mine, x[:, t].copy(), cache, t) for t in range(x.shape[1])]


def attentions():
    hidden, heads, rank, rope, turning = 16, 12, 6, 2, np.array([0.1])
    q, o = numbers(heads, hidden, 4), numbers(heads, 4, hidden, seed=1)
    gqa = latent.GQA(q, *(numbers(heads, hidden, 4, seed=seed) for seed in (2, 3)), o, np.array([0.1, 0.2]))
    narrow = numbers(heads, hidden, rope, seed=4), numbers(hidden, rope, seed=5), numbers(hidden, rank, seed=6)
    mla = latent.MLA(q, *narrow, *(numbers(heads, rank, 4, seed=seed) for seed in (7, 8)), o, turning)
    x, qkv, blocking = numbers(2, 5, hidden, seed=9), numbers(3, 4, 40, 8), {"rows": 16, "keys": 16, "causal": True}
    return {
        "TransMLA, latents": (token_by_token, [mla, x, decoding.latent_step], {}),
        "TransMLA, groups": (token_by_token, [gqa, x, decoding.grouped_step], {}),
        "FlashAttention on cores": (flash_attention.on_cores, qkv, blocking),
        "FlashAttention, heads on cores": (flash_rivals.heads_on_cores, qkv, blocking),
    }


# ---- sequence parallelism --------------------------------------------------------------------------------------------


def both_ways(comm, q, k, v, grad_out, *, attention):
    out, saved = attention.forward(comm, q, k, v)
    return out, tuple(attention.backward(comm, saved, grad_out))


def with_lse(comm, q, k, v, grad_out, *, system):
    out, lse = system.attention(comm, q, k, v, causal=True, return_lse=True)
    return out, lse, system.attention_backward(comm, q, k, v, out, lse, grad_out, causal=True)


def sequences(attention, layout="contiguous", kv_heads=12):
    """An Attention, on 48 tokens."""
    shards = [shard(numbers(h, 48, 8, seed=seed), 1, layout) for seed, h in enumerate((12, kv_heads, kv_heads, 12))]
    return partial(both_ways, attention=attention), shards, {}


def linear(forward, backward, saves=True, **options):
    """Linear attention as an Attention. saves: forward keeps something for backward."""

    def ahead(comm, q, k, v):
        out = forward(comm, q, k, v, **options, **({"return_saved": True} if saves else {}))
        return (out[0], (q, k, v, out[1])) if saves else (out, (q, k, v))

    return blocks.Attention(ahead, lambda comm, saved, grad_out: backward(comm, *saved, grad_out, **options))


def attentions_over_ranks(size):
    nodes, causal = 2 if size % 2 == 0 else 1, {"causal": True}
    zigzag = causal | {"layout": "zigzag"}
    lasp1, lasp = (lasp2.lasp1_attention, lasp2.lasp1_attention_backward), (lasp2.attention, lasp2.attention_backward)
    softmax = SimpleNamespace(attention=lasp2.softmax_attention, attention_backward=lasp2.softmax_attention_backward)
    direct = partial(lasp2.gathered, gather=lasp2.direct_all_gather)
    few = {1: 1, 2: 1, 3: 4, 4: 2}[size]  # key heads: sent to several ranks, or more on some than on others
    found = {
        "Ulysses, pipelined": sequences(ulysses.pair(overlap="qkv_pipeline", **causal)),
        "Ulysses, few key heads": sequences(ulysses.pair(replicate_kv=True, uneven=True, **causal), kv_heads=few),
        "Ulysses, hybrid": sequences(ulysses.hybrid_pair(nodes=nodes, **causal)),
        "LightSeq, unbalanced": sequences(light_seq.pair(balanced=False, mode="sync")),
        "ring self-attention": sequences(rows_of_scores.pair()),
        "bidirectional, backward": sequences(methods.both_ways(**zigzag), "zigzag"),
        "all-gather, backward": sequences(blocks.exact(gathered, **zigzag), "zigzag"),
        "blocking ring": sequences(blocks.exact(SimpleNamespace(
            attention=ring_attention.blocking_ring_attention, attention_backward=ring_attention.attention_backward
        ), **zigzag), "zigzag"),
        "TokenRing, hybrid backward": sequences(methods.token_ring_on_nodes(nodes, **zigzag), "zigzag"),
        "LASP-2": sequences(linear(*lasp, chunks_per_rank=2)),
        "LASP-2, no mask": sequences(linear(*lasp, causal=False, feature_map="elu", normalise=True)),
        "LASP-2, one step": sequences(linear(*lasp, exchange=direct)),
        "LASP-1": sequences(linear(*lasp1)),
        "LASP-1, no mask": sequences(linear(*lasp1, causal=False)),
        "LASP-2H": sequences(blocks.exact(softmax, **causal)),
        "linear ring": sequences(linear(linear_rings.attention, linear_rings.attention_backward, saves=False)),
    }  # fmt: skip
    for name, system in (("Ulysses", ulysses), ("LightSeq", light_seq)):
        found[name] = partial(with_lse, system=system), sequences(None)[1], {}
    return found


def sequence_layers():
    """Whole layers, and a model, on 48 tokens."""
    random, sizes = np.random.default_rng(0), (24, 12, 12, HEAD_DIM, 48)
    weights = [blocks.block_weights(random, *sizes) for _ in range(2)]
    text = shard(numbers(48, 24)), shard(numbers(48, 24, seed=1))
    return {
        "ZeRO-3, Ulysses": (gathered_layers, [weights, *text, blocks.shapes(*sizes)], {}),
        "Megatron-LM, sequence parallel": (sharded_layer, [weights[0], *text], {}),
        "LightSeq, layers": (checkpointed_layers, [weights, *text], {}),
    }


def place(comm, x):
    return positions("contiguous", comm.rank, comm.size, comm.size * len(x))


def gathered_layers(comm, weights, x, grad, shapes):
    ways, where = ulysses.pair(causal=True), place(comm, x)
    mine = [zero3.pieces(w, comm.size)[comm.rank] for w in weights]
    y, saved = zero3.forward(comm, mine, shapes, x, lambda w, x: blocks.block(comm, w, x, where, ways, HEAD_DIM))
    back = lambda w, kept, grad: blocks.block_backward(comm, w, kept, grad, ways, HEAD_DIM)  # noqa: E731
    return y, zero3.backward(comm, mine, shapes, saved, grad, back)


def sharded_layer(comm, weights, x, grad):
    mine = tensor_parallel.shard_weights(weights, comm.rank, comm.size, HEAD_DIM)
    inside, where = blocks.one_device(causal=True), np.arange(comm.size * len(x))
    y, saved = tensor_parallel.block(comm, mine, x, where, inside, HEAD_DIM)
    return y, tensor_parallel.block_backward(comm, mine, saved, grad, inside, HEAD_DIM)


def checkpointed_layers(comm, weights, x, target):
    def loss(y):
        return ((y - target) ** 2).sum(keepdims=True), 2 * (y - target)

    losses, dx, grads = light_seq.run_layers(comm, x, weights, loss, where=place(comm, x), head_dim=HEAD_DIM)
    return losses, dx, blocks.sum_gradients(comm, grads)


def byte_scales(size):
    """Sequences on one rank, on some and on all of them; and all round one ring against the ranks' order."""
    lengths, cost = (48, 5, 17, 30, 3, 41, 9, 12), byte_scale.llama_7b()
    room, random = 48 // size, np.random.default_rng(1)
    model = packed.Model(blocks.model_weights(random, VOCABULARY, 2, 16, 4, 2, HEAD_DIM, 24), HEAD_DIM)
    text = [random.integers(0, VOCABULARY, s + 1) for s in lengths]
    backwards = byte_scale.MicroBatch(tuple(range(size))[::-1], tuple(enumerate(lengths)))
    plans = {
        "balanced": byte_scale.plan_balanced(lengths, room, size, cost, offload=False),
        "static": byte_scale.plan_static(lengths, room, size, cost),
        "one ring": byte_scale.Plan([backwards], size, cost),
    }
    return {f"ByteScale, {name}": (byte_scale.execute, [plan, model, text], {}) for name, plan in plans.items()}


def programs(size):
    """{name: (program, args, options)}"""
    return attentions() | attentions_over_ranks(size) | sequence_layers() | byte_scales(size)
