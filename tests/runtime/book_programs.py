"""Programs of the book's systems, for `real_programs`: each runs on 1 to 4 ranks."""

from functools import partial

import numpy as np

from runtime import sequence_programs
from runtime.sequence_programs import HEAD_DIM, VOCABULARY, numbers
from toolkit.model_parallel import _ex_flow_model as routed
from toolkit.model_parallel import _ex_flow_placement as placements
from toolkit.model_parallel import _experts, _gates, _layers, _model, _schedule, ex_flow, fs_moe, gnn_pipe, megatron, t3
from toolkit.model_parallel import _gnn_pipe_graph as graphs
from toolkit.model_parallel import _zero as zero
from toolkit.model_parallel import frontier_partitioning as partitioning
from toolkit.model_parallel import ladder_residual as ladder
from toolkit.model_parallel import vocabulary_parallel as vocabulary
from toolkit.model_parallel._gnn_pipe_layers import first_weights, layers_of
from toolkit.model_parallel._mesh import Grid
from toolkit.model_parallel._partition_model import Model
from toolkit.model_parallel._vocabulary_schedule import METHODS
from toolkit.runtime import positions, shard
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import ring_attention

WORDS, BATCH = 8, 12


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


# ---- model parallelism -----------------------------------------------------------------------------------------------


def language_model(layers, heads=4):
    random = np.random.default_rng(0)
    params = blocks.model_weights(random, VOCABULARY, layers, 4 * heads, heads, heads, HEAD_DIM, 24)
    text = random.integers(0, VOCABULARY, (BATCH, WORDS + 1))
    return params, text[:, :-1].copy(), text[:, 1:].copy()


def megatrons(size, v=1, **options):
    cut = {1: (1, 1, 1), 2: (2, 1, 1), 3: (3, 1, 1), 4: (2, 2, 1) if v == 1 else (2, 1, 2)}[size]
    params, *text = language_model(12)
    options |= dict(zip(("p", "t", "d"), cut, strict=True)) | {"v": v, "microbatches": 6, "head_dim": HEAD_DIM}
    return partial(megatron.train, batches=[text] * 2), [params], options


def tokens_cut(comm, params, tokens, targets):
    """Context parallelism, and norms on 1/t of the tokens, where the ranks allow it: 8 tokens do not go in three."""
    grid = Grid(comm, **{1: {}, 2: {"cp": 2}, 3: {"dp": 3}, 4: {"tp": 2, "cp": 2}}[comm.size])
    where, order = positions("zigzag", grid.cp.rank, grid.cp.size, WORDS), _schedule.one_f_one_b(1, 4)
    ring = blocks.exact(ring_attention, causal=True, layout="zigzag")
    setting = _layers.Setting(grid.tp, grid.cp, ring, HEAD_DIM, where, _layers.SEQUENCE)
    plan = _model.Plan(grid, order, setting, layer=_model.RECOMPUTE)
    text = [_model.share_of(grid, part, 4, where) for part in (tokens, targets)]
    return _model.loss_and_gradients(plan, _model.cut(params, grid, order, HEAD_DIM), *text, BATCH * WORDS)


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


def ladders(comm, params, tokens, **options):
    shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
    logits, saved = ladder.forward(comm, shards, tokens, head_dim=HEAD_DIM, **options)
    return logits, ladder.backward(comm, shards, saved, np.ones_like(logits))


def halves(comm, params, tokens):
    shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
    return ladder.forward_interleaved(comm, shards, tokens, head_dim=HEAD_DIM)


def continued(comm, params, tokens):
    shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
    return ladder.generate(comm, shards, tokens, 5, arch="ladder", head_dim=HEAD_DIM)[0]


def output_layers(comm, x, table, targets, method):
    cut = vocabulary.VocabShard(comm.rank, comm.size, len(table))
    mine = x if comm.rank == comm.size - 1 else None
    return vocabulary.output_layer(comm, method, cut, cut.of(table), mine, targets, 1 / len(targets))


def pipelines(comm, params, tokens, targets, method):
    return vocabulary.step(comm, params, tokens, targets, method=method, microbatches=4, head_dim=HEAD_DIM)[:2]


def graph_networks(size, group=1):
    graph, layers = graphs.community_graph(60, 3, width=6), layers_of("gcn", 12, 6, 8, 3)
    share = gnn_pipe.placed(gnn_pipe.shares(graph, *gnn_pipe.cut(graph.adjacency, 2, group)), size // group)
    return partial(graph_network, layers=layers, group=group), [share, first_weights(layers, 1)], {}


def graph_network(comm, share, weights, layers, group):
    return gnn_pipe.train(comm, share, weights, layers=layers, group=group, epochs=2, period=2, rate=0.1)


def mixtures(comm, layer, whole, x, grad, others=None):
    """others: a gradient that is all-reduced meanwhile."""
    grid = Grid(comm, tp=2, ep=2) if comm.size == 4 else Grid(comm, ep=comm.size)
    mine = _experts.cut_experts(whole, grid.ep, grid.tp)
    y, saved, _ = fs_moe.forward(layer, grid, mine, x)
    return y, fs_moe.backward(layer, grid, mine, saved, grad, others)


def expert_placements(size):
    shape = routed.Shape(vocabulary=20, layers=3, width=16, heads=4, hidden=8, experts=12)
    model = routed.weights(np.random.default_rng(0), shape)
    prompts = shard(np.random.default_rng(1).integers(0, shape.vocabulary, (12, 4)).astype(np.int32))
    where = placements.shuffled(np.random.default_rng(2), shape.layers, shape.experts, size)
    arguments = [model, prompts, 4, where]
    found = {"ExFlow's baseline": {"scheme": "home"}, "ExFlow, pairwise": {"way": "pairwise"}}
    found |= {f"ExFlow, {coherence}": {"coherence": coherence} for coherence in ("kv", "early", "fetch")}
    return {name: (generated, arguments, {"heads": shape.heads} | options) for name, options in found.items()}


def generated(comm, *arguments, **options):
    """All that `generate` gives but times. No program with "ids": its store lies in one process."""
    tokens, _, logits = ex_flow.generate(comm, *arguments, **options)
    return tokens, logits


def partitioned(comm, model, weights, tokens, targets, quantised=False):
    ranks = 2 if comm.size == 3 else comm.size  # a node of Frontier cannot be cut in three
    if comm.rank >= ranks:
        return None
    scheme = partitioning.zero(3, ranks)
    if quantised and ranks > 1:
        scheme = partitioning.Scheme(2, 2, ranks, ranks, qw=8, qg=4, block=16, q2=8)
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
    steps = language_model(3, heads=12)[:2]
    found = {
        "Megatron-LM": megatrons(size),
        "Megatron-LM, interleaved": megatrons(size, 2, kind="interleaved", recompute=True),
        "Megatron-LM, tokens cut": (tokens_cut, language_model(2), {}),
        "ladder residual": (ladders, steps, {"arch": "ladder"}),
        "ladder residual, parallel": (ladders, steps, {"arch": "parallel"}),
        "ladder residual, desync": (ladders, steps, {"arch": "desync", "desync_pattern": "2x"}),
        "ladder residual, halves": (halves, steps, {}),
        "ladder residual, decoding": (continued, steps, {}),
        "GNNPipe": graph_networks(size),
        "GNNPipe, groups": graph_networks(size, {1: 1, 2: 2, 3: 3, 4: 2}[size]),
        "FSMoE": (mixtures, [fs_moe.FSMoELayer(gate, 2.4), whole, x, grad], {}),
        "FSMoE, chunks": (mixtures, [fs_moe.FSMoELayer(gate, 2.4, 2, 3), whole, x, grad, numbers(50)], {}),
        "three-level partitioning": (partitioned, [model, buckets, *text], {}),
        "three-level partitioning, quantised": (partitioned, [model, buckets, *text], {"quantised": True}),
        "T3's baseline": (t3.sequential, [shard(numbers(24 * size, 8)), shard(numbers(8 * size, 6, seed=1))], {}),
    }
    for method in ("naive", "vocab-1", "vocab-2", "interlaced"):
        found[f"vocabulary, {method}"] = output_layers, head, {"method": method}
    for method in METHODS:
        found[f"vocabulary, pipeline, {method}"] = pipelines, language_model(12), {"method": method}
    for stage in (1, 2, 3):
        found[f"ZeRO-{stage}"] = sharded_states, language_model(2), {"stage": stage}
    found |= sequence_programs.programs(size) | expert_placements(size)
    return {name: (flattened(program), args, options) for name, (program, args, options) in found.items()}
