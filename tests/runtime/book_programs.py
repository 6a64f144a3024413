"""Programs of nine more systems, for `real_programs`: each runs on 1 to 4 ranks."""

from functools import partial

import numpy as np

from toolkit.model_parallel import _experts, _gates, _layers, _model, _schedule, fs_moe, gnn_pipe, megatron
from toolkit.model_parallel import _gnn_pipe_graph as graphs
from toolkit.model_parallel import _zero as zero
from toolkit.model_parallel import frontier_partitioning as partitioning
from toolkit.model_parallel import ladder_residual as ladder
from toolkit.model_parallel import vocabulary_parallel as vocabulary
from toolkit.model_parallel._gnn_pipe_layers import first_weights, layers_of
from toolkit.model_parallel._mesh import Grid
from toolkit.model_parallel._partition_model import Model
from toolkit.runtime import shard
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import lasp2, light_seq, ulysses

HEAD_DIM, VOCABULARY, WORDS, BATCH = 4, 24, 8, 12


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def arrays(value):
    """The arrays of nested tuples, lists and dicts, as a tuple."""
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if isinstance(value, (tuple, list)):
        return tuple(array for part in value for array in arrays(part))
    return () if value is None else (np.asarray(value),)


def flattened(program):
    """The program, returning its arrays alone."""

    def run(comm, *args, **options):
        return arrays(program(comm, *args, **options))

    return run


# ---- sequence parallelism --------------------------------------------------------------------------------------------


def both_ways(comm, q, k, v, grad_out, *, system):
    out, lse = system.attention(comm, q, k, v, causal=True, return_lse=True)
    return out, lse, system.attention_backward(comm, q, k, v, out, lse, grad_out, causal=True)


def linear_both_ways(comm, q, k, v, grad_out):
    out, saved = lasp2.attention(comm, q, k, v, return_saved=True)
    return out, lasp2.attention_backward(comm, q, k, v, saved, grad_out)


def sequences(program):
    return program, [shard(numbers(12, 48, 8, seed=seed), 1) for seed in range(4)], {}


# ---- model parallelism -----------------------------------------------------------------------------------------------


def language_model(layers, heads=4):
    random = np.random.default_rng(0)
    params = blocks.model_weights(random, VOCABULARY, layers, 4 * heads, heads, heads, HEAD_DIM, 24)
    text = random.integers(0, VOCABULARY, (BATCH, WORDS + 1))
    return params, text[:, :-1].copy(), text[:, 1:].copy()


def megatrons(size):
    p, t, d = {1: (1, 1, 1), 2: (2, 1, 1), 3: (3, 1, 1), 4: (2, 2, 1)}[size]
    params, *text = language_model(12)
    options = {"p": p, "t": t, "d": d, "microbatches": 4, "head_dim": HEAD_DIM}
    return partial(megatron.train, batches=[text] * 2), [params], options


def sharded_states(comm, params, tokens, targets, stage):
    grid, order = Grid(comm, dp=comm.size), _schedule.gpipe(1, 1)
    chunks = _model.cut(params, grid, order, HEAD_DIM)
    shapes = {name: a.shape for name, a in chunks[0]["layers"][0].items()}
    setting = _layers.Setting(grid.tp, grid.cp, blocks.one_device(causal=True), HEAD_DIM, np.arange(WORDS))
    plan = _model.Plan(grid, order, setting, False, zero.layer(grid.dp, stage, shapes), across=zero.across(stage))
    text = [_model.share_of(grid, part, 1, setting.where) for part in (tokens, targets)]
    chunks, states = zero.begin(grid.dp, chunks, stage)
    loss, grads, _ = _model.loss_and_gradients(plan, chunks, *text, BATCH * WORDS)
    return loss, zero.update(grid.dp, stage, chunks, states, grads, 0.01)


def ladders(comm, params, tokens):
    shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
    logits, saved = ladder.forward(comm, shards, tokens, head_dim=HEAD_DIM, arch="ladder")
    return logits, ladder.backward(comm, shards, saved, np.ones_like(logits))


def output_layers(comm, x, table, targets, method):
    cut = vocabulary.VocabShard(comm.rank, comm.size, len(table))
    mine = x if comm.rank == comm.size - 1 else None
    return vocabulary.output_layer(comm, method, cut, cut.of(table), mine, targets, 1 / len(targets))


def graph_networks(size):
    graph, layers = graphs.community_graph(60, 3, width=6), layers_of("gcn", 12, 6, 8, 3)
    chunk, part = gnn_pipe.cut(graph.adjacency, 2, 1)
    share = gnn_pipe.placed(gnn_pipe.shares(graph, chunk, part), size)
    return partial(graph_network, layers=layers), [share, first_weights(layers, 1)], {}


def graph_network(comm, share, weights, layers):
    return gnn_pipe.train(comm, share, weights, layers=layers, group=1, epochs=2, period=2, rate=0.1)


def mixtures(comm, layer, whole, x, grad):
    grid = Grid(comm, tp=2, ep=2) if comm.size == 4 else Grid(comm, ep=comm.size)
    mine = _experts.cut_experts(whole, grid.ep, grid.tp)
    y, saved, _ = fs_moe.forward(layer, grid, mine, x, None)
    dx, grads, _ = fs_moe.backward(layer, grid, mine, saved, grad, None)
    return y, dx, grads


def partitioned(comm, model, weights, tokens, targets):
    ranks = 2 if comm.size == 3 else comm.size  # a node of Frontier cannot be cut in three
    if comm.rank >= ranks:
        return None
    scheme = partitioning.zero(3, ranks)
    losses, kept = partitioning.program(comm.group(range(ranks)), scheme, model, weights, tokens, targets, rate=0.01)
    return losses, [bucket.weights for bucket in kept]


def programs(size):
    """{name: (program, args, options)}"""
    gate, model = _gates.sigmoid(2), Model(layers=2, h=8, heads=2, vocabulary=11)
    buckets = model.weights(np.random.default_rng(0), "float64")
    words = np.random.default_rng(0).integers(0, 11, (2, 12, 7))
    text = [shard(part.copy(), 1) for part in (words[:, :, :-1], words[:, :, 1:])]
    x, grad = (shard(numbers(48, 16, seed=seed), 0) for seed in (1, 2))
    whole = _experts.expert_weights(np.random.default_rng(3), gate, 16, 24, 12)
    head = numbers(10, 16, seed=4), numbers(48, 16, seed=5), np.random.default_rng(6).integers(0, 48, 10)
    found = {
        "Ulysses": sequences(partial(both_ways, system=ulysses)),
        "LightSeq": sequences(partial(both_ways, system=light_seq)),
        "LASP-2": sequences(linear_both_ways),
        "Megatron-LM": megatrons(size),
        "ladder residual": (ladders, [*language_model(3, heads=12)[:2]], {}),
        "GNNPipe": graph_networks(size),
        "FSMoE": (mixtures, [fs_moe.FSMoELayer(gate, 2.4), whole, x, grad], {}),
        "three-level partitioning": (partitioned, [model, buckets, *text], {}),
    }
    for method in ("naive", "vocab-1", "vocab-2", "interlaced"):
        found[f"vocabulary, {method}"] = output_layers, head, {"method": method}
    for stage in (1, 2, 3):
        found[f"ZeRO-{stage}"] = sharded_states, language_model(2), {"stage": stage}
    return {name: (flattened(program), args, options) for name, (program, args, options) in found.items()}
