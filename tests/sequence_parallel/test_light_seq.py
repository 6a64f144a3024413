"""LightSeq: exact for any number of ranks and heads; its blocks, messages, bytes and steps are those of its formulas.

Checkpoints change what is kept and what is computed again, and not one bit of a gradient.
"""

from collections import Counter
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from reference import dense_attention, dense_attention_backward
from toolkit.claims.sequence_parallel import light_seq as claims
from toolkit.runtime import Cluster, hardware, like, positions, shard, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _light_seq_rsa as rsa
from toolkit.sequence_parallel import light_seq, ring_attention, ulysses

RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
GROUP = pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 1), (1, 1)], ids=["MHA", "g=4", "MQA", "H=1"])
BALANCED = pytest.mark.parametrize("balanced", [True, False], ids=["helpers", "unbalanced"])
LINK = hardware.Link(1e9)  # 1 GB/s each way, no latency
COUNTING = hardware.Device("finite arithmetic, free memory", flops=1e12, memory_bandwidth=inf)


def normal(tokens, heads=4, kv_heads=4, head_dim=8, seed=0, dtype=np.float64):
    """q, k, v, grad_out."""
    random = np.random.default_rng(seed)
    return [random.standard_normal((h, tokens, head_dim)).astype(dtype) for h in (heads, kv_heads, kv_heads, heads)]


def mesh(ranks, device=hardware.IDEAL, link=LINK):
    return Cluster(topology.full_mesh(ranks, link), device)


def both_ways(cluster, q, k, v, grad_out, **options):
    """The finished forward and backward runs."""
    q, k, v, grad_out = (shard(a, 1) for a in (q, k, v, grad_out))
    forward = cluster.run(light_seq.attention, q, k, v, return_lse=True, **options)
    kept = forward.output(0), forward.output(1)
    return forward, cluster.run(light_seq.attention_backward, q, k, v, *kept, grad_out, **options)


def worst(runs, arrays):
    """Largest difference of out, lse, dq, dk, dv from the dense ones."""
    got = [a for run in runs for a in run.gather(axis=1)]
    want = *dense_attention(*arrays[:3], True), *dense_attention_backward(*arrays, True)
    return max(np.abs(a - b).max() for a, b in zip(got, want, strict=True))


# ---- exact -----------------------------------------------------------------------------------------------------------


@BALANCED
@GROUP
@RANKS
def test_out_lse_and_gradients_equal_dense_causal_attention(ranks, heads, kv_heads, balanced):
    arrays = normal(12 * ranks, heads, kv_heads, seed=ranks)
    assert worst(both_ways(mesh(ranks), *arrays, balanced=balanced), arrays) < 1e-10


@settings(max_examples=25, deadline=None)
@given(ranks=st.integers(1, 9), tokens=st.integers(1, 9), kv_heads=st.integers(1, 3), group=st.integers(1, 3),
       seed=st.integers(0, 99))  # fmt: skip
def test_any_number_of_ranks_tokens_and_heads_is_exact(ranks, tokens, kv_heads, group, seed):
    arrays = normal(tokens * ranks, kv_heads * group, kv_heads, 4, seed)
    assert worst(both_ways(mesh(ranks), *arrays), arrays) < 1e-10


@pytest.mark.parametrize("ranks", [4, 5])
def test_the_order_of_travel_and_compute_does_not_change_a_bit(ranks):
    arrays = normal(12 * ranks)
    for one, other in zip(both_ways(mesh(ranks), *arrays), both_ways(mesh(ranks), *arrays, mode="sync"), strict=True):
        for a, b in zip(one.gather(axis=1), other.gather(axis=1), strict=True):
            assert_array_equal(a, b)


def test_without_messages_the_numbers_are_wrong_and_nothing_is_sent():
    arrays = normal(48)
    runs = both_ways(mesh(4), *arrays, mode="nocomm")
    assert worst(runs, arrays) > 0.1
    assert [run.traffic.total for run in runs] == [0, 0]


def test_float32_stays_within_two_hundred_thousandths():
    arrays = normal(512, 8, 2, 16, dtype=np.float32)
    assert worst(both_ways(mesh(8), *arrays), [a.astype(np.float64) for a in arrays]) < 2e-5


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["dq", "dk", "dv"])
@pytest.mark.parametrize("ranks", [4, 5])
def test_gradients_agree_with_finite_differences(ranks, changed):
    arrays = normal(20 * ranks, kv_heads=2)
    along = np.random.default_rng(1).standard_normal(arrays[changed].shape)

    def loss(step):
        moved = [a + step * along if i == changed else a for i, a in enumerate(arrays[:3])]
        run = mesh(ranks).run(light_seq.attention, *(shard(a, 1) for a in moved))
        return np.vdot(run.gather(axis=1), arrays[3])

    gradient = both_ways(mesh(ranks), *arrays)[1].gather(axis=1)[changed]
    assert np.vdot(gradient, along) == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)


def test_a_helper_that_starts_from_its_own_statistics_is_caught(monkeypatch):
    """Proof that the tests can fail: what comes home carries keys that its owner has counted already."""

    def stale(comm, plan, step, mail, mode, wire=None):
        if plan[step][comm.rank].kind == "help":
            light_seq.merge(mail["help"], mail["help"])  # its keys now count twice
        return honest(comm, plan, step, mail, mode, wire)

    honest, arrays = light_seq.bring_home, normal(48)
    monkeypatch.setattr(light_seq, "bring_home", stale)
    run = mesh(4).run(light_seq.attention, *(shard(a, 1) for a in arrays[:3]))
    assert np.abs(run.gather(axis=1) - dense_attention(*arrays[:3], True)[0]).max() > 0.01


def test_an_odd_number_of_ranks_without_the_tail_is_caught(monkeypatch):
    arrays = normal(60)
    monkeypatch.setattr(light_seq, "schedule", lambda size, balanced: without_last_help(size))
    run = mesh(5).run(light_seq.attention, *(shard(a, 1) for a in arrays[:3]))
    assert np.abs(run.gather(axis=1) - dense_attention(*arrays[:3], True)[0]).max() > 0.01


def without_last_help(size, real=light_seq.schedule):
    *steps, last = real(size)
    return [*steps, [job if job.kind == "own" else light_seq.Job("idle") for job in last]]


# ---- who computes what -----------------------------------------------------------------------------------------------

EIGHT = """
h70 10 21 32 43 54 65 76
h60 h71 20 31 42 53 64 75
h50 h61 h72 30 41 52 63 74
- - - - 40 51 62 73
"""  # the worked example: steps 1 to 4; query owner, key owner; h: computed by a helper


def test_eight_ranks_follow_the_worked_example():
    sign = {"own": "", "help": "h", "idle": "-"}
    rows = [
        " ".join(sign[kind] + ("" if kind == "idle" else f"{queries}{keys}") for kind, queries, keys in jobs)
        for jobs in light_seq.schedule(8)[1:]
    ]
    assert rows == EIGHT.split("\n")[1:-1]


@BALANCED
@pytest.mark.parametrize("ranks", range(1, 18))
def test_every_visible_pair_is_computed_once_by_a_rank_that_owns_one_side(ranks, balanced):
    done = [(job, rank) for jobs in light_seq.schedule(ranks, balanced) for rank, job in enumerate(jobs)]
    pairs = sorted((job.queries, job.keys) for job, _ in done if job.kind != "idle")
    assert pairs == [(a, b) for a in range(ranks) for b in range(a + 1)]
    assert all({"own": job.queries, "help": job.keys}.get(job.kind, rank) == rank for job, rank in done)


@pytest.mark.parametrize("ranks", range(1, 18))
def test_idle_slots_are_half_a_step_for_an_even_number_and_none_for_an_odd_one(ranks):
    idle = [job.kind for jobs in light_seq.schedule(ranks) for job in jobs].count("idle")
    assert idle == (ranks // 2 if ranks % 2 == 0 else 0)
    assert idle / (ranks * (ranks // 2 + 1)) == (1 / (ranks + 2) if ranks % 2 == 0 else 0)


@pytest.mark.parametrize("ranks", range(1, 18))
def test_without_help_half_of_the_slots_are_idle(ranks):
    idle = [job.kind for jobs in light_seq.schedule(ranks, balanced=False) for job in jobs].count("idle")
    assert idle == ranks * (ranks - 1) // 2


@BALANCED
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_a_run_computes_the_blocks_of_the_schedule_each_once(ranks, balanced, monkeypatch):
    """Who owns a token is written into it, so that a kernel's arguments tell which block it computes."""
    seen, kernel = [], light_seq.attention_block
    owner = np.repeat(np.arange(ranks, dtype=float), 3)[None, :, None] * np.ones((2, 1, 4))

    def noting(q, k, v, *rest, **options):
        seen.append((int(q[0, 0, 0]), int(k[0, 0, 0])))
        return kernel(q, k, v, *rest, **options)

    monkeypatch.setattr(light_seq, "attention_block", noting)
    mesh(ranks).run(light_seq.attention, *(shard(owner, 1) for _ in range(3)), balanced=balanced)
    assert sorted(seen) == [(a, b) for a in range(ranks) for b in range(a + 1)]


@st.composite
def plans(draw):
    """A size, and any plan for it: each block at any step, done by either side, with idle slots anywhere."""
    size = draw(st.integers(1, 6))
    todo = {rank: [] for rank in range(size)}
    for queries in range(size):
        for keys in range(queries):
            kind = draw(st.sampled_from(["own", "help"]))
            todo[queries if kind == "own" else keys].append((kind, queries, keys))
    steps = max(map(len, todo.values())) + draw(st.integers(0, 1))
    slots = [draw(st.permutations(todo[r] + [("idle", None, None)] * (steps - len(todo[r])))) for r in range(size)]
    return size, [[("own", r, r) for r in range(size)], *map(list, zip(*slots, strict=True))]


@settings(max_examples=25, deadline=None)
@given(plans())
def test_any_plan_that_does_every_block_once_is_exact(drawn):
    size, plan = drawn
    arrays = normal(3 * size, 2, 1, 4)
    assert worst(both_ways(mesh(size), *arrays, plan=plan), arrays) < 1e-10


DIAGONAL_OF_TWO = [("own", 0, 0), ("own", 1, 1)]


@pytest.mark.parametrize(
    "plan, complaint",
    [
        ([], "step 0 of a plan is the diagonal"),
        ([[("own", 0, 0), ("own", 1, 0)]], "step 0 of a plan is the diagonal"),
        ([DIAGONAL_OF_TWO], r"nobody does queries × keys \[\(1, 0\)\]"),
        ([DIAGONAL_OF_TWO, [("help", 1, 0), ("own", 1, 0)]], "step 1: queries 1 × keys 0 are done already"),
        ([DIAGONAL_OF_TWO, [("own", 0, 1), ("own", 1, 0)]], "queries 0 × keys 1 are done already, or not visible"),
        ([DIAGONAL_OF_TWO, [("own", 1, 0), ("idle", None, None)]], "step 1: rank 0 cannot do .* 'own' needs its own"),
        ([DIAGONAL_OF_TWO, [("help", 1, 0)]], "step 1 of the plan has 1 jobs for 2 ranks"),
    ],
    ids=["empty", "no diagonal", "left out", "twice", "invisible", "neither side", "too short"],
)
def test_a_plan_that_is_not_one_is_refused_with_the_block_at_fault(plan, complaint):
    q, k, v, _ = normal(12)
    with pytest.raises(ValueError, match=complaint):
        mesh(2).run(light_seq.attention, *(shard(a, 1) for a in (q, k, v)), plan=plan)


# ---- messages --------------------------------------------------------------------------------------------------------


def shapes(ranks, local=8, heads=8, group=1, head_dim=128, dtype="float16"):
    """q, k, v, grad_out without data, `local` tokens a rank."""
    return [like((h, ranks * local, head_dim), dtype) for h in (heads, heads // group, heads // group, heads)]


def sent(run):
    """Channel -> (messages, bytes), over all ranks."""
    total = Counter(), Counter()
    for event in run.trace:
        if event.kind == "send":
            total[0][event.name] += 1
            total[1][event.name] += event.bytes
    return {name: (total[0][name], total[1][name]) for name in total[0]}


@pytest.mark.parametrize("ranks", range(1, 18))
def test_numbers_of_messages_are_the_formulas(ranks):
    last = ranks // 2
    count = Counter(what for *_, what in light_seq.messages(ranks))
    helps = last * (last - 1) // 2 if ranks % 2 == 0 else last * (last + 1) // 2
    assert count["keys and values"] == sum(ranks - step for step in range(1, last + 1))
    assert count["queries"] == count["results"] == helps


@BALANCED
@RANKS
def test_the_program_sends_exactly_the_messages_of_the_plan_in_their_steps(ranks, balanced):
    arrays = [shard(a, 1) for a in shapes(ranks)[:3]]
    block = 4 * 8 * 64 * 128 / COUNTING.flops  # seconds; free wires, so that steps begin at 0, ½, 1½, … blocks
    link = hardware.Link(inf)
    run = mesh(ranks, COUNTING, link).run(light_seq.attention, *arrays, balanced=balanced)
    found = []
    for event in run.trace:
        if event.kind == "send":
            diagonal = 4 * 8 * 36 * 128 / COUNTING.flops  # 8 tokens: 36 of 64 scores
            step = 0 if event.start < diagonal / 2 else 1 + round((event.start - diagonal) / block)
            found.append((step, event.rank, event.peer, event.name))
    assert sorted(found) == light_seq.messages(ranks, balanced)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 9])
def test_helping_costs_no_bytes_but_the_lse(ranks):
    q = 8 * 8 * 128 * 2  # bytes of one rank's queries
    arrays = [shard(a, 1) for a in shapes(ranks)[:3]]
    lse = 8 * 8 * 4 * sum(what == "results" for *_, what in light_seq.messages(ranks))
    helped, alone = (mesh(ranks).run(light_seq.attention, *arrays, balanced=b).traffic.total for b in (True, False))
    assert alone == ranks * (ranks - 1) * q
    assert helped == alone + lse


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("ranks", [4, 5, 8])
def test_with_grouped_heads_helping_costs_the_group_times_more(ranks, group):
    run = mesh(ranks).run(light_seq.attention, *(shard(a, 1) for a in shapes(ranks, group=group)[:3]))
    found, q, lse = sent(run), 8 * 8 * 128 * 2, 8 * 8 * 4
    number, total = found["keys and values"]
    assert total == number * 2 * q // group
    assert found["queries"][1] + found["results"][1] == found["queries"][0] * (2 * q + lse)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 9])
def test_backward_moves_four_units_a_pair_on_both_paths(ranks):
    q, lse = 8 * 8 * 128 * 2, 8 * 8 * 4
    _, backward = both_ways(mesh(ranks), *shapes(ranks))
    _, narrow = both_backward(ranks, wire_dtype="float16")
    helps = sum(what == "results" for *_, what in light_seq.messages(ranks))
    pairs = ranks * (ranks - 1) // 2
    assert narrow.traffic.total == 4 * q * pairs + lse * helps
    assert backward.traffic.total == narrow.traffic.total + (2 * pairs - helps) * q  # gradients in float32
    assert sent(narrow)["keys and values"][1] == sent(narrow)["key gradients"][1] == 2 * q * (pairs - helps)


def both_backward(ranks, **options):
    q, k, v, grad_out = (shard(a, 1) for a in shapes(ranks))
    forward = mesh(ranks).run(light_seq.attention, q, k, v, return_lse=True)
    kept = forward.output(0), forward.output(1)
    return forward, mesh(ranks).run(light_seq.attention_backward, q, k, v, *kept, grad_out, **options)


def test_every_array_goes_straight_to_its_user():
    """No relaying: a rank sends only what it owns, or a result that it has computed itself."""
    run = mesh(8).run(light_seq.attention, *(shard(a, 1) for a in shapes(8)[:3]))
    sources = {(e.name, e.rank, e.peer) for e in run.trace if e.kind == "send"}
    assert sources == {(what, source, dest) for _, source, dest, what in light_seq.messages(8)}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_zigzag_ring_sends_twice_the_bytes(ranks):
    arrays = shapes(ranks)[:3]
    zigzag = mesh(ranks).run(ring_attention.attention, *(shard(a, 1, "zigzag") for a in arrays), causal=True,
                             layout="zigzag")  # fmt: skip
    ours = mesh(ranks).run(light_seq.attention, *(shard(a, 1) for a in arrays), balanced=False)
    assert zigzag.traffic.total == 2 * ours.traffic.total


# ---- time ------------------------------------------------------------------------------------------------------------

LOCAL = 512  # tokens a rank: the diagonal is a block's half and 1/1024


def timed(ranks, fetch=0.0, group=1, **options):
    """Makespan in blocks on a full mesh; `fetch` is the time of keys and values in blocks."""
    heads, head_dim = 2, 64
    block = 4 * heads * LOCAL**2 * head_dim / COUNTING.flops
    nbytes = 2 * heads // group * LOCAL * head_dim * 2
    link = hardware.Link(nbytes / (fetch * block) if fetch else inf)
    arrays = (shard(a, 1) for a in shapes(ranks, LOCAL, heads, group, head_dim)[:3])
    return mesh(ranks, COUNTING, link).run(light_seq.attention, *arrays, **options).makespan / block


DIAGONAL = (LOCAL + 1) / (2 * LOCAL)


@pytest.mark.parametrize("ranks", range(1, 18))
def test_with_free_messages_the_forward_pass_takes_half_a_block_and_a_block_a_step(ranks):
    assert timed(ranks) == pytest.approx(ranks // 2 + DIAGONAL, rel=1e-9)
    assert timed(ranks, balanced=False) == pytest.approx(ranks - 1 + DIAGONAL, rel=1e-9)


@pytest.mark.parametrize("fetch", [0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("ranks", [4, 6, 8, 16])
def test_messages_up_to_a_block_are_hidden_but_for_the_first(ranks, fetch):
    exposed = max(0.0, fetch - DIAGONAL)
    assert timed(ranks, fetch) == pytest.approx(ranks // 2 + DIAGONAL + exposed, rel=1e-9)


@pytest.mark.parametrize("fetch", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [3, 5, 9])
def test_an_odd_number_of_ranks_pays_a_tail_of_one_result(ranks, fetch):
    result = fetch / 2 * (1 + 4 / 128)  # half of keys and values, and float32 lse on 64 float16 channels
    expected = ranks // 2 + DIAGONAL + max(0.0, fetch - DIAGONAL) + result
    assert timed(ranks, fetch) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ranks", [4, 8])
def test_without_overlap_every_fetch_and_every_result_is_exposed(ranks):
    last, fetch, result = ranks // 2, 0.5, 0.25 * (1 + 4 / 128)
    exposed = last * fetch + (last - 1) * result
    assert timed(ranks, fetch, mode="sync") == pytest.approx(last + DIAGONAL + exposed, rel=1e-9)
    assert timed(ranks, fetch, mode="nocomm") == pytest.approx(last + DIAGONAL, rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_backward_takes_two_and_a_half_times_as_long_and_its_last_gradients_come_home_in_a_tail(ranks):
    block = 10 * 8 * LOCAL**2 * 128 / COUNTING.flops  # five products
    fetch = block / 10
    link = hardware.Link(2 * 8 * LOCAL * 128 * 2 / fetch)
    q = shard(like((8, ranks * LOCAL, 128), "float16"), 1)
    lse = shard(like((8, ranks * LOCAL), "float32"), 1)
    run = mesh(ranks, COUNTING, link).run(light_seq.attention_backward, q, q, q, q, lse, q, wire_dtype="float16")
    assert run.makespan == pytest.approx((ranks // 2 + DIAGONAL) * block + fetch, rel=1e-9)


def test_shape_only_runs_take_and_send_what_real_ones_do():
    arrays = normal(60, 8, 2, dtype=np.float32)
    real = both_ways(mesh(5, hardware.A100), *arrays)
    empty = both_ways(mesh(5, hardware.A100), *(like(a) for a in arrays))
    assert [(r.makespan, r.traffic.total) for r in real] == [(r.makespan, r.traffic.total) for r in empty]
    assert [a.shape for a in real[1].outputs[0]] == [a.shape for a in empty[1].outputs[0]]


# ---- checkpoints -----------------------------------------------------------------------------------------------------

H, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, TOKENS = 16, 4, 2, 4, 24, 60
CHECKPOINTS = ["none", "layer", "remat_aware"]


def iteration(comm, x, target, layers, checkpoint, attention=None, head_dim=HEAD_DIM):
    """Loss and all gradients of squared error, gradients summed over the ranks."""

    def loss(y):
        return ((y - target) ** 2).sum(keepdims=True), 2 * (y - target)

    where = positions("contiguous", comm.rank, comm.size, comm.size * len(x))
    losses, dx, grads = light_seq.run_layers(
        comm, x, layers, loss, where=where, head_dim=head_dim, checkpoint=checkpoint, attention=attention
    )
    return losses, dx, *(g[name] for g in blocks.sum_gradients(comm, grads) for name in sorted(g))


def trained(ranks, checkpoint, attention=None, layers=2):
    random = np.random.default_rng(0)
    weights = [blocks.block_weights(random, H, HEADS, KV_HEADS, HEAD_DIM, HIDDEN) for _ in range(layers)]
    x, target = random.standard_normal((2, TOKENS, H))
    return mesh(ranks, COUNTING).run(iteration, shard(x), shard(target), weights, checkpoint, attention)


@pytest.mark.parametrize("checkpoint", ["layer", "remat_aware"])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_checkpoints_change_no_bit_of_loss_or_gradients(ranks, checkpoint):
    for ours, plain in zip(trained(ranks, checkpoint).outputs, trained(ranks, "none").outputs, strict=True):
        for a, b in zip(ours, plain, strict=True):
            assert_array_equal(a, b)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_layers_over_ranks_have_the_gradients_of_one_device_with_dense_attention(checkpoint):
    def dense(_comm, q, k, v):
        out, lse = dense_attention(q, k, v, True)
        return out, (q, k, v, out, lse)

    def dense_backward(_comm, saved, grad_out):
        return dense_attention_backward(*saved[:3], grad_out, True)

    ((_, dx, *grads),) = trained(1, "none", blocks.Attention(dense, dense_backward)).outputs
    run = trained(4, checkpoint)
    assert np.abs(np.concatenate([output[1] for output in run.outputs]) - dx).max() < 1e-10
    assert max(np.abs(a - b).max() for a, b in zip(run.outputs[3][2:], grads, strict=True)) < 1e-9


@pytest.mark.parametrize("checkpoint, times", [("none", 1), ("layer", 2), ("remat_aware", 1)])
@pytest.mark.parametrize("ranks", [3, 4])
def test_attention_runs_forward_once_a_layer_and_twice_with_layer_checkpoints(ranks, checkpoint, times):
    blocks_of_one = ranks * (ranks + 1) // 2
    kernels = Counter(e.name for e in trained(ranks, checkpoint).trace if e.kind == "compute")
    assert kernels["attention"] == times * 2 * blocks_of_one
    assert kernels["attention_backward"] == 2 * blocks_of_one


@pytest.mark.parametrize("checkpoint, products", [("none", 7), ("layer", 9), ("remat_aware", 7)])
def test_products_of_score_size_are_nine_with_layer_checkpoints_and_seven_without_recomputing(checkpoint, products):
    flops = Counter()
    for e in trained(4, checkpoint).trace:
        flops[e.name] += e.flops
    score = 2 * HEADS * (TOKENS * (TOKENS + 1) / 2) * HEAD_DIM * 2  # one product, two layers
    assert (flops["attention"] + flops["attention_backward"]) / score == pytest.approx(products, rel=1e-12)


@pytest.mark.parametrize("checkpoint, messages", [("none", 1), ("layer", 2), ("remat_aware", 1)])
def test_what_a_checkpoint_keeps_need_not_travel_again(checkpoint, messages):
    forward = Counter(what for *_, what in light_seq.messages(4))
    found = sent(trained(4, checkpoint, layers=1))
    backward = forward["keys and values"], forward["results"]
    assert found["keys and values"][0] == messages * forward["keys and values"] + backward[0]
    assert found["results"][0] == messages * forward["results"] + backward[1]


def peak(checkpoint, layers, local=4096, heads=8, head_dim=16, ranks=4):
    h = heads * head_dim
    weights = [blocks.block_weights(None, h, heads, heads, head_dim, 4 * h, "float16")] * layers
    x = shard(like((ranks * local, h), "float16"))

    def program(comm, x):
        where = positions("contiguous", comm.rank, comm.size, ranks * local)
        return light_seq.run_layers(
            comm, x, weights, lambda y: (y, y), where=where, head_dim=head_dim, checkpoint=checkpoint
        )

    return mesh(ranks, COUNTING).run(program, x).peak_memory


@pytest.mark.parametrize("checkpoint, tensors, lse", [("layer", 1, 0), ("remat_aware", 2, 1)])
def test_each_layer_more_adds_its_checkpoint_to_the_peak_and_nothing_else(checkpoint, tensors, lse):
    hidden, statistics = 4096 * 8 * 16 * 2, 4096 * 8 * 4  # float16, float32
    added = np.subtract(peak(checkpoint, 6), peak(checkpoint, 5))
    assert_array_equal(added, tensors * hidden + lse * statistics)


def test_keeping_everything_takes_more_than_either_checkpoint():
    none, layer, ours = (max(peak(checkpoint, 4)) for checkpoint in CHECKPOINTS)
    assert layer < ours < none


def test_the_ring_profits_from_the_same_checkpoint():
    ring = blocks.exact(ring_attention, causal=True)
    kernels = Counter(e.name for e in trained(4, "remat_aware", ring).trace if e.kind == "compute")
    assert kernels["attention"] == 2 * 10


# ---- rivals, and the sizes of the claims -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_ring_self_attention_equals_dense_causal_attention_and_its_gradients(ranks):
    def program(comm, q, k, v, grad_out):
        out, saved = rsa.forward(comm, q, k, v)
        return out, *rsa.backward(comm, saved, grad_out)

    arrays = normal(12 * ranks)
    got = mesh(ranks).run(program, *(shard(a, 1) for a in arrays)).gather(axis=1)
    want = dense_attention(*arrays[:3], True)[0], *dense_attention_backward(*arrays, True)
    assert max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_megatron_moves_14_units_where_light_seq_moves_3_and_the_lse(ranks):
    theirs, ours = (
        claims.iteration(rival, ranks, 128 * ranks, layers=1, zero=False).traffic.total
        for rival in ("Megatron", "LightSeq")
    )
    unit = ranks * (ranks - 1) * 128 * 32 * 128 * 2  # (P-1)/P · N · d of every rank, float16
    helps = sum(what == "results" for *_, what in light_seq.messages(ranks))
    assert theirs == 14 * unit
    assert ours == 3 * unit + 2 * helps * 32 * 128 * 4


@pytest.mark.parametrize("rival", ["Megatron", "Ulysses"])
def test_33_heads_cost_rivals_that_cut_by_heads_more_than_32_and_light_seq_nothing(rival):
    tokens = 64 * 1024
    work = {
        (name, heads): sum(e.flops for e in claims.iteration(name, 16, tokens, heads).trace if "attention" in e.name)
        for name in (rival, "LightSeq")
        for heads in (32, 33)
    }
    assert work[rival, 33] / work[rival, 32] == 48 / 32
    assert work["LightSeq", 33] / work["LightSeq", 32] == pytest.approx(33 / 32, rel=1e-12)


def test_zero_s_weights_do_not_change_what_attention_sends():
    with_weights, without = (
        sent(claims.iteration("LightSeq", 8, 8 * 1024, zero=zero))["keys and values"] for zero in (True, False)
    )
    assert with_weights == without


def test_the_longest_sequence_fills_the_memory_when_all_32_layers_run():
    tokens = int(claims.longest("LightSeq", 8)) // 8 * 8
    run = claims.iteration("LightSeq", 8, tokens, layers=claims.LAYERS, zero=False)
    states = claims.STATE * claims.PARAMETERS / 16
    assert max(run.peak_memory) + states == pytest.approx(claims.A100.memory_capacity, rel=0.01)


@pytest.mark.parametrize("tokens", [32, 128])
def test_overlap_hides_part_of_what_messages_cost_and_all_of_it_is_positive(tokens):
    assert 0 < claims.overhead("overlap", tokens * 1024) < claims.overhead("sync", tokens * 1024)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_calls_without_a_causal_mask_are_refused_because_nobody_could_help():
    q, k, v, _ = normal(24)
    with pytest.raises(ValueError, match=r"without a mask no rank is idle.*use ring_attention"):
        mesh(4).run(light_seq.attention, *(shard(a, 1) for a in (q, k, v)), causal=False)


def test_tokens_that_do_not_divide_are_refused_by_name():
    q, k, v, _ = normal(25)
    with pytest.raises(ShapeError, match=r"holds .* tokens and fetched .*: pad the sequence to a multiple of 4 tokens"):
        mesh(4).run(light_seq.attention, *(shard(a, 1) for a in (q, k, v)))


def test_key_heads_that_do_not_divide_the_heads_are_refused():
    q, k, v, _ = normal(24, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        mesh(4).run(light_seq.attention, *(shard(a, 1) for a in (q, k, v)))


def test_an_unknown_mode_is_refused_with_those_that_exist():
    q, k, v, _ = normal(24)
    with pytest.raises(ValueError, match="mode='fast' is not one of overlap, sync, nocomm"):
        mesh(4).run(light_seq.attention, *(shard(a, 1) for a in (q, k, v)), mode="fast")


def test_an_attention_that_saves_something_else_is_refused_by_the_checkpoint_that_would_mistake_it():
    with pytest.raises(ValueError, match=r"saves 6 things, not \(q, k, v, out, lse\).*use checkpoint='layer'"):
        trained(2, "remat_aware", ulysses.pair(causal=True))


def test_an_unknown_checkpoint_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="checkpoint='all' is not one of none, layer, remat_aware"):
        trained(2, "all")
