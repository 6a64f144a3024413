"""TransMLA's claims: the exact ones on any layer, quality on a tiny model, speed on described machines.

Chapter: attention/trans_mla.
"""

from functools import cache
from math import exp

import numpy as np

from toolkit.attention import _trans_mla_decode as decoding
from toolkit.attention import _trans_mla_layers as layers
from toolkit.attention import _trans_mla_model as tiny
from toolkit.attention import _trans_mla_strict as strict
from toolkit.attention import trans_mla
from toolkit.attention._trans_mla_layers import GQA
from toolkit.claims import claim
from toolkit.runtime import Cluster, hardware, like, per_rank, topology

RTX_4090 = hardware.Device(  # Ada whitepaper 2022: FP16 with FP32 accumulation, dense
    "RTX 4090", {"float16": 165.2e12, "float32": 82.6e12}, 1.008e12, 24e9, 5e-6
)
DEVICES = {device.name: device for device in (RTX_4090, hardware.A100, hardware.H100)}

# ---- what is exact ---------------------------------------------------------------------------------------------------


def random_layer(kv_heads=2, heads=8, hidden=64, head_dim=8, rope=True, seed=0):
    """A GQA with normal weights, scaled so that activations keep their size."""
    random = np.random.default_rng(seed)

    def weights(*shape):
        return random.standard_normal(shape) / np.sqrt(shape[-2])

    theta = layers.frequencies(head_dim) if rope else np.zeros(head_dim // 2)
    keys = weights(kv_heads, hidden, head_dim), weights(kv_heads, hidden, head_dim)
    return GQA(weights(heads, hidden, head_dim), *keys, weights(heads, head_dim, hidden), theta)


@claim(
    says="Any GQA layer is an MLA layer with the same cache: largest difference of the outputs",
    holds=lambda error: error < 1e-10,
    direction="below 1e-10",
    where="abstract",
    paper="trans_mla",
)
def difference():
    gqa, x = random_layer(), np.random.default_rng(1).standard_normal((100, 64))
    return np.abs(layers.factored_attention(trans_mla.exact(gqa), x) - layers.grouped_attention(gqa, x)).max()


def fits(kv_heads, rope, starts=20):
    """Relative residuals of grouped layers fitted to the scores of a latent layer whose heads have their own keys."""
    latent = trans_mla.exact(random_layer(kv_heads, 4, 12, 4, rope))
    latent = latent._replace(up_k=np.random.default_rng(1).standard_normal(latent.up_k.shape))
    offsets = (0, 1, 2, 5) if rope else (0,)
    maps = strict.score_maps(latent, offsets)
    found = [strict.fit_grouped(maps, latent.theta, offsets, kv_heads, seed, 60)[0] for seed in range(starts)]
    return np.array(found) / np.linalg.norm(maps)


@claim(
    says="The converse does not hold: what the best of 20 fits leaves over (4 heads on 2 key heads, RoPE)",
    holds=lambda left: left > 0.1,
    direction="above 0",
    where="abstract",
    paper="trans_mla",
)
def converse():
    return fits(2, rope=True).min()


@claim(
    says="The converse does not hold: the same with 1 key head and without RoPE, a case of our own",
    holds=lambda left: left > 0.1,
    direction="above 0",
    where="abstract",
    why="keys differ from head to head, but queries and outputs absorb the difference: the function is a GQA layer's",
    paper="trans_mla",
)
def converse_of_one_head():
    return fits(1, rope=False).min()


# ---- bytes and time --------------------------------------------------------------------------------------------------


def words(model):
    """Numbers that the first layer of `decoding.llama_2_7b` caches for one token, counted on its arrays."""
    made = decoding.empty_cache(model[0][0][0], 1, 1, "float16", like)
    return sum(a.size for a in made) if isinstance(made, tuple) else made.size


@claim(
    says="512 + 64 numbers instead of LLaMA-2-7B's keys and values: share of the cache saved",
    value=93,
    unit="%",
    where="abstract",
    tolerance=0.005,
    paper="trans_mla",
)
def saved():
    return 100 * (1 - words(decoding.llama_2_7b(512)) / words(decoding.llama_2_7b()))


@cache
def largest(rank, device="RTX 4090", context=8192):
    """(batch, run) of the most sequences that fit; rank None is LLaMA-2-7B as released."""
    return decoding.largest_batch(one(device), decoding.llama_2_7b(rank), context)


@cache
def at_batch(rank, batch, device="RTX 4090", context=8192):
    """Seconds of one decoding step."""
    return decoding.decode_run(one(device), decoding.llama_2_7b(rank), batch, context).makespan


def one(device):
    """A cluster of one of DEVICES, by name."""
    return Cluster(topology.ring(1, hardware.PCIE4), DEVICES[device])


def tokens_per_second(rank, device="RTX 4090"):
    """With as many sequences as fit."""
    batch, run = largest(rank, device)
    return batch / run.makespan


@claim(
    says="10.6 times as fast at 8K: decoding with as many sequences as fit into 24 GB",
    value=10.6,
    unit="×",
    where="abstract, LLaMA-2-7B at 512 + 64; the machine is ours",
    tolerance=0.2,
    same_side_of=1.0,
    why="a roofline has no scheduler, no prefill and no kernel below its peak, and fills memory to the last byte",
    paper="trans_mla",
)
def throughput():
    return tokens_per_second(512) / tokens_per_second(None)


@claim(
    says="10.6 times as fast at 8K: one sequence",
    value=10.6,
    unit="×",
    where="abstract, LLaMA-2-7B at 512 + 64; the machine is ours",
    tolerance=0.2,
    same_side_of=1.0,
    why="reading the weights takes most of a step; a smaller cache cannot shorten that",
    paper="trans_mla",
)
def latency():
    return at_batch(None, 1) / at_batch(512, 1)


def cached_words(layer, ranks, context=1000):
    """Numbers a token that each rank caches, from peak memory with and without `context` tokens; float16, one layer."""
    step = decoding.grouped_step if isinstance(layer, GQA) else decoding.latent_step
    machine = topology.switch(ranks, hardware.NVLINK4) if ranks > 1 else topology.ring(1, hardware.NVLINK4)

    def peak(capacity):
        dealt = decoding.shares(layer, ranks)
        caches = [decoding.empty_cache(share, 1, capacity, "float16", like) for share in dealt]
        x = like((1, layer.w_q.shape[1]), "float16")
        return max(Cluster(machine, hardware.H100).run(step, per_rank(dealt), x, per_rank(caches), 0).peak_memory)

    return (peak(context + 1) - peak(1)) / (2 * context)


# ---- quality, on the tiny model --------------------------------------------------------------------------------------

LIKE_QWEN = {"rope_dims": 4, "fold": 2}  # half of a head, as 64 of Qwen2.5-7B's 128
RANK = 14  # 14 + 4 of 32 words: 56 %, as 512 + 64 of 1024


@cache
def damage():
    """Perplexity on unseen sentences: as trained, after partial RoPE, after joint PCA."""
    model = tiny.pretrained()
    full = tiny.without_most_rope(model, **LIKE_QWEN)
    return tuple(exp(tiny.evaluate(m)) for m in (model, full, tiny.compressed(full, RANK)))


@claim(
    says="Before any training, dropping RoPE on half of each head multiplies perplexity (Qwen2.5-7B: 6.85 to 7.84)",
    value=7.8448 / 6.8480,
    unit="×",
    where="authors' README, Qwen2.5-7B, 512 + 64",
    tolerance=0.15,
    same_side_of=1.0,
    why="two layers on generated data: the numbers cannot agree, only the order",
    paper="trans_mla",
)
def damage_of_position():
    before, partial, _ = damage()
    return partial / before


@claim(
    says="Then compressing to 56 % multiplies it again (Qwen2.5-7B: 7.84 to 8.41)",
    value=8.4124 / 7.8448,
    unit="×",
    where="authors' README, Qwen2.5-7B, 512 + 64",
    tolerance=0.15,
    same_side_of=1.0,
    why="two layers on generated data: the numbers cannot agree, only the order",
    paper="trans_mla",
)
def damage_of_rank():
    _, partial, converted = damage()
    return converted / partial


@claim(
    says="RoRoPE is why this works: perplexity without mixing the heads, over that with, 8 + 8 of 32 words",
    holds=lambda ratio: ratio > 1,
    direction="above 1",
    where="method: RoRoPE",
    paper="trans_mla",
)
def mixing():
    model = tiny.pretrained()
    plain, mixed = tiny.without_most_rope(model, 8, mixture=tiny.unmixed), tiny.without_most_rope(model, 8)
    return exp(tiny.evaluate(tiny.compressed(plain, 8)) - tiny.evaluate(tiny.compressed(mixed, 8)))


def without_balance(scale):
    """Perplexity without balance over that with it, 8 + 8 of 32 words; keys times `scale`, queries divided by it."""

    def louder(layer):
        return layer._replace(w_q=layer.w_q / scale, w_k=layer.w_k * scale)

    model = tiny.pretrained()
    full = tiny.without_most_rope(tiny.with_layers(model, [louder(layer) for layer in tiny.mixers(model)]), 8)
    return exp(tiny.evaluate(tiny.compressed(full, 8, balance=False)) - tiny.evaluate(tiny.compressed(full, 8)))


@claim(
    says="Balancing keys and values helps joint PCA: perplexity without, over that with; the model as it was trained",
    holds=lambda ratio: ratio > 1,
    direction="above 1",
    where="method: balanced PCA",
    why="our keys are hardly larger than the values, so there is little to balance",
    paper="trans_mla",
)
def balance():
    return without_balance(1)


@claim(
    says="Balancing helps where keys are ten times as large (the same function: queries are divided by ten)",
    holds=lambda ratio: ratio > 1,
    direction="above 1",
    where="method: balanced PCA",
    paper="trans_mla",
)
def balance_of_large_keys():
    return without_balance(10)


def continued(arm, rival):
    """Loss of a rival arm minus that of an arm after the same training, unseen sentences, mean over seeds; nats."""
    found = tiny.stored()
    loss = dict(zip(found["arms"], found["held_out"][:, :-1], strict=True))  # the last column: before training
    return float(np.mean(loss[rival] - loss[arm]))


@claim(
    says="Trained on after the exact conversion, the latent layer reaches a lower loss than GQA with the same cache",
    holds=lambda gain: gain > 0,
    direction="above 0",
    unit="nats",
    where="abstract",
    paper="trans_mla",
)
def boost():
    return continued("MLA", "GQA")


@claim(
    says="… and than GQA with as many more parameters in its MLPs, a control of our own",
    holds=lambda gain: gain > 0,
    direction="above 0",
    unit="nats",
    where="abstract",
    paper="trans_mla",
)
def boost_over_control():
    return continued("MLA", "GQA, wider MLP")


@claim(
    says="Short training restores a converted model (56 % of the cache): share of the lost nats that comes back",
    holds=lambda share: share > 0.5,
    direction="above one half",
    where="abstract: 6 billion tokens for LLaMA-2-7B",
    paper="trans_mla",
)
def recovery():
    found = tiny.stored()
    before, after = found["recovered"][0]
    return float((before - after) / (before - found["held_out"][0, -1]))
