"""LASP-2: exact for any number of ranks and chunks, one collective a pass, messages that do not grow with the sequence.

Judges: the quadratic form written out with numpy, PyTorch's autograd through it, closed formulas.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from reference import dense_attention, dense_attention_backward
from toolkit.claims.sequence_parallel import lasp2 as claims
from toolkit.kernels.layers import merge_heads, split_heads
from toolkit.runtime import Cluster, hardware, like, per_rank, positions, shard, topology
from toolkit.runtime.collectives import Collectives
from toolkit.runtime.communicator import Communicator
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _lasp2_kernels as kernels
from toolkit.sequence_parallel import _lasp2_layers as layers
from toolkit.sequence_parallel import _lasp2_recall as recall
from toolkit.sequence_parallel import _lasp2_rings as rings
from toolkit.sequence_parallel import _megatron_sp as megatron
from toolkit.sequence_parallel import _two_level, lasp2

torch = pytest.importorskip("torch")

HEADS, TOKENS, D_K, D_V = 3, 48, 5, 7
STATE = HEADS * D_K * D_V * 8  # bytes, float64
EXCHANGES = {
    "all-gather in a ring": lasp2.gathered,
    "all-gather by doubling": partial(
        lasp2.gathered, gather=partial(Communicator.all_gather, algorithm="recursive_doubling")
    ),
    "direct all-gather": partial(lasp2.gathered, gather=lasp2.direct_all_gather),
    "LASP-1": lasp2.handed_on,
}
MAPS = {"identity": False, "elu": False, "relu": False, "elu, normalised": True}
RANKS = pytest.mark.parametrize("ranks", [1, 2, 4, 8])
CHUNKS = pytest.mark.parametrize("chunks", [1, 2])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
EXCHANGE = pytest.mark.parametrize("exchange", EXCHANGES)
MAP = pytest.mark.parametrize("name", MAPS)


def mesh(ranks, device=hardware.A100, link=hardware.NVLINK3):
    return Cluster(topology.full_mesh(ranks, link), device)


def normal(tokens=TOKENS, seed=0, dtype="float64"):
    """q, k, v and the gradient of the result; keys are narrower than values."""
    random = np.random.default_rng(seed)
    widths = D_K, D_K, D_V, D_V
    return [random.standard_normal((HEADS, tokens, width)).astype(dtype) for width in widths]


def sharded(arrays):
    return [shard(a, axis=1) for a in arrays]


def both_passes(comm, q, k, v, grad_out, **options):
    """(out, dq, dk, dv)"""
    out, saved = lasp2.attention(comm, q, k, v, return_saved=True, **options)
    return out, *lasp2.attention_backward(comm, q, k, v, saved, grad_out, **options)


def options_of(name, causal=True, chunks=1, exchange="all-gather in a ring"):
    return {
        "feature_map": name.split(",")[0],
        "normalise": MAPS[name],
        "causal": causal,
        "chunks_per_rank": chunks,
        "exchange": EXCHANGES[exchange],
    }


def quadratic(q, k, v, causal, name="identity"):
    """All pairs, as PyTorch computes them; tensors in, tensor out."""
    phi = {"identity": lambda x: x, "elu": lambda x: torch.nn.functional.elu(x) + 1, "relu": torch.relu}
    feature = phi[name.split(",")[0]]
    weights = feature(q) @ feature(k).transpose(1, 2)
    weights = weights.tril() if causal else weights
    return weights @ v / (weights.sum(2, keepdim=True) if MAPS[name] else 1)


def judged(arrays, causal, name="identity"):
    """(out, dq, dk, dv) by PyTorch's autograd through the quadratic form."""
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays[:3]]
    out = quadratic(*tensors, causal, name)
    out.backward(torch.tensor(arrays[3], dtype=torch.float64))
    return [out.detach().numpy(), *(t.grad.numpy() for t in tensors)]


# ---- exactness -------------------------------------------------------------------------------------------------------


@MAP
@CAUSAL
@CHUNKS
@RANKS
def test_outputs_and_gradients_are_those_of_the_quadratic_form(ranks, chunks, causal, name):
    arrays = normal(seed=ranks)
    run = mesh(ranks).run(both_passes, *sharded(arrays), **options_of(name, causal, chunks))
    for ours, theirs in zip(run.gather(axis=1), judged(arrays, causal, name), strict=True):
        assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@EXCHANGE
@CAUSAL
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_exchange_gives_the_same(ranks, causal, exchange):
    arrays = normal(seed=9)
    run = mesh(ranks).run(both_passes, *sharded(arrays), **options_of("identity", causal, 1, exchange))
    for ours, theirs in zip(run.gather(axis=1), judged(arrays, causal), strict=True):
        assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["identity", "elu, normalised"])
def test_token_by_token_is_the_quadratic_form_too(name):
    q, k, v, _ = normal()
    out = lasp2.recurrent_oracle(q, k, v, name.split(",")[0], MAPS[name])
    assert_allclose(out, quadratic(*map(torch.tensor, (q, k, v)), True, name), rtol=0, atol=1e-10)


@RANKS
@CHUNKS
def test_lasp_1_and_lasp_2_differ_by_rounding_only(ranks, chunks):
    arrays = sharded(normal(seed=4)[:3])
    ours = mesh(ranks).run(lasp2.attention, *arrays, chunks_per_rank=chunks).gather(axis=1)
    theirs = mesh(ranks).run(lasp2.lasp1_attention, *arrays, chunks_per_rank=chunks).gather(axis=1)
    assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_lasp_1s_own_names_hand_states_on():
    def program(comm, q, k, v, grad_out):
        out, saved = lasp2.lasp1_attention(comm, q, k, v, return_saved=True)
        return out, *lasp2.lasp1_attention_backward(comm, q, k, v, saved, grad_out)

    arrays = normal(seed=5)
    run = mesh(4).run(program, *sharded(arrays))
    for ours, theirs in zip(run.gather(axis=1), judged(arrays, True), strict=True):
        assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    assert sorted({(e.name, e.peer - e.rank) for e in run.trace if e.kind == "send"}) == [("state", -1), ("state", 1)]


def test_runs_of_different_lengths_are_fine():
    arrays = normal(tokens=50)
    run = mesh(4).run(both_passes, *sharded(arrays))
    for ours, theirs in zip(run.gather(axis=1), judged(arrays, True), strict=True):
        assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_nodes_may_gather_with_all_their_nics(nodes):
    machine = topology.two_level(nodes, 8 // nodes, hardware.NVLINK3, hardware.IB_HDR)
    arrays = normal(seed=6)
    exchange = partial(lasp2.gathered, gather=_two_level.all_gather)
    run = Cluster(machine, hardware.A100).run(both_passes, *sharded(arrays), exchange=exchange)
    for ours, theirs in zip(run.gather(axis=1), judged(arrays, True), strict=True):
        assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-5), ("float16", 2e-2)])
@MAP
def test_narrower_numbers_lose_no_more_than_their_rounding(name, dtype, atol):
    arrays = [a * 0.25 for a in normal(dtype=dtype)]
    run = mesh(4).run(both_passes, *sharded(arrays), **options_of(name, chunks=2))
    ours = run.gather(axis=1)
    assert [a.dtype for a in ours] == [dtype, "float32", "float32", "float32"]
    for mine, theirs in zip(ours, judged(arrays, True, name), strict=True):
        assert_allclose(mine, theirs, rtol=0, atol=atol)


def test_states_of_float16_are_summed_in_float32():
    """65 504 is the largest float16; a state of 100 000 ones is larger."""
    q = np.full((1, 100_000, 1), 1e-4, "float16")
    run = mesh(4).run(lasp2.attention, *sharded([q, np.ones_like(q), np.ones_like(q)]), chunks_per_rank=250)
    assert run.gather(axis=1)[0, -1, 0] == pytest.approx(10.0, rel=1e-2)


@settings(max_examples=30, deadline=None)
@given(
    runs=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    chunk=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_cut_into_ranks_and_chunks_gives_the_same(runs, widths, chunk, seed):
    """Runs of any lengths, in multiples of the chunk."""
    random, ends = np.random.default_rng(seed), np.cumsum(runs)[:-1] * chunk
    q, k = random.standard_normal((2, 2, sum(runs) * chunk, widths[0]))
    v = random.standard_normal((2, sum(runs) * chunk, widths[1]))

    def program(comm, q, k, v):
        return lasp2.attention(comm, q, k, v, chunks_per_rank=q.shape[1] // chunk)

    run = mesh(len(runs)).run(program, *(per_rank(np.split(a, ends, axis=1)) for a in (q, k, v)))
    wanted = quadratic(*map(torch.tensor, (q, k, v)), True)
    assert_allclose(np.concatenate(run.outputs, axis=1), wanted, rtol=0, atol=1e-10)


def test_a_state_that_counts_its_own_chunk_twice_is_caught():
    def with_own(comm, state, want):
        return lasp2.gathered(comm, state, want) + state

    arrays = normal()
    wrong = mesh(4).run(lasp2.attention, *sharded(arrays[:3]), exchange=with_own).gather(axis=1)
    assert abs(wrong - judged(arrays, True)[0]).max() > 1


def test_later_tokens_change_nothing_before_them():
    q, k, v, _ = normal()
    before = mesh(4).run(lasp2.attention, *sharded([q, k, v])).gather(axis=1)
    k[:, 30:], v[:, 30:] = 7.0, -3.0
    after = mesh(4).run(lasp2.attention, *sharded([q, k, v])).gather(axis=1)
    assert_array_equal(before[:, :30], after[:, :30])


# ---- messages --------------------------------------------------------------------------------------------------------


def sends(run):
    """(label, bytes) of every message, in order of rank."""
    return sorted((e.rank, e.name, e.bytes) for e in run.trace if e.kind == "send")


@pytest.fixture
def collectives(monkeypatch):
    """Names of the collectives that rank 0 enters."""
    entered, original = [], Collectives._collective

    def counted(self, name, *args, **options):
        if self.rank == 0:
            entered.append(name)
        return original(self, name, *args, **options)

    monkeypatch.setattr(Collectives, "_collective", counted)
    return entered


@CAUSAL
@CHUNKS
def test_a_pass_is_one_all_gather_and_no_other_message(collectives, causal, chunks):
    arrays = sharded(normal())
    options = options_of("identity", causal, chunks)
    forward = mesh(4).run(lasp2.attention, *arrays[:3], return_saved=True, **options)
    assert collectives == ["all_gather"]
    assert sends(forward) == sorted((rank, "all_gather", STATE) for rank in range(4) for _ in range(3))
    backward = mesh(4).run(lasp2.attention_backward, *arrays[:3], forward.output(1), arrays[3], **options)
    assert collectives == ["all_gather"] * 2
    assert sends(backward) == sends(forward)


def test_the_normaliser_travels_in_the_same_all_gather(collectives):
    run = mesh(4).run(lasp2.attention, *sharded(normal()[:3]), feature_map="elu", normalise=True)
    assert collectives == ["all_gather"]
    assert {nbytes for _, _, nbytes in sends(run)} == {HEADS * D_K * (D_V + 1) * 8}


@EXCHANGE
def test_bytes_do_not_depend_on_the_length_of_the_sequence(exchange):
    totals = set()
    for tokens in (64, 128, 4096):
        arrays = [shard(like((HEADS, tokens, width)), 1) for width in (D_K, D_K, D_V)]
        totals.add(mesh(8).run(lasp2.attention, *arrays, exchange=EXCHANGES[exchange]).traffic.total)
    assert totals == {7 * STATE if exchange == "LASP-1" else 8 * 7 * STATE}


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_lasp_2_sends_as_many_times_the_bytes_of_lasp_1_as_there_are_ranks(ranks):
    arrays = sharded(normal()[:3])
    more, fewer = (mesh(ranks).run(f, *arrays).traffic.total for f in (lasp2.attention, lasp2.lasp1_attention))
    assert more == ranks * fewer


@pytest.mark.parametrize("causal, messages", [(True, 7), (False, 14)])
def test_lasp_1_sends_a_message_a_rank_and_direction(causal, messages):
    run = mesh(8).run(lasp2.lasp1_attention, *sharded(normal()[:3]), causal=causal)
    assert [nbytes for _, _, nbytes in sends(run)] == [STATE] * messages


@pytest.mark.parametrize("products", rings.PRODUCTS)
def test_a_ring_sends_keys_and_values_as_often_as_there_are_other_ranks(products):
    run = mesh(4).run(rings.attention, *sharded(normal()[:3]), products=products)
    assert run.traffic.total == 4 * 3 * HEADS * 12 * (D_K + D_V) * 8


@pytest.mark.parametrize("name", ["identity", "relu"])
@pytest.mark.parametrize("products", rings.PRODUCTS)
@CAUSAL
@CHUNKS
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rings_of_keys_and_values_are_exact_rivals(ranks, chunks, causal, products, name):
    def program(comm, q, k, v, grad_out, **options):
        out = rings.attention(comm, q, k, v, **options)
        return out, *rings.attention_backward(comm, q, k, v, grad_out, **options)

    arrays = normal(seed=ranks)
    options = {"causal": causal, "products": products, "feature_map": name, "chunks_per_rank": chunks}
    run = mesh(ranks).run(program, *sharded(arrays), **options)
    for ours, theirs in zip(run.gather(axis=1), judged(arrays, causal, name), strict=True):
        assert_allclose(ours, theirs, rtol=0, atol=1e-10)


# ---- time and memory -------------------------------------------------------------------------------------------------

LINK = hardware.Link(50e9, 5e-6)


def paper_heads(ranks, tokens):
    """q, k and v of 16 heads of 128, float16, without data."""
    return [shard(like((16, ranks * tokens, 128), "float16"), 1)] * 3


@pytest.mark.parametrize("latency", [0.0, 5e-6, 3e-4])
@pytest.mark.parametrize("tokens", [64, 2048, 8192])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "exchange, scheme, collective",
    [
        ("LASP-1", "lasp1", "ring"),
        ("all-gather in a ring", "lasp2", "ring"),
        ("all-gather by doubling", "lasp2", "tree"),
        ("direct all-gather", "lasp2", "direct"),
    ],
)
def test_time_is_the_closed_form(exchange, scheme, collective, ranks, tokens, latency):
    link = replace(LINK, latency=latency)
    run = mesh(ranks, link=link).run(lasp2.attention, *paper_heads(ranks, tokens), exchange=EXCHANGES[exchange])
    predicted = lasp2.predict_time(ranks, tokens, 16, 128, hardware.A100, link, scheme, collective=collective)
    assert run.makespan == pytest.approx(predicted, rel=1e-9)


@pytest.mark.parametrize("tokens, hidden", [(256, False), (4096, True), (32_768, True)])
def test_the_all_gather_is_seen_only_when_a_rank_has_few_tokens(tokens, hidden):
    free, real = (
        mesh(8, link=link).run(lasp2.attention, *paper_heads(8, tokens)).makespan
        for link in (replace(LINK, bandwidth=np.inf, latency=0.0), LINK)
    )
    assert (real == pytest.approx(free, rel=1e-9)) == hidden


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_lasp_1_waits_for_every_hop_even_if_computing_took_no_time(ranks):
    device = replace(hardware.IDEAL, memory_bandwidth=2e12)
    run = mesh(ranks, device, LINK).run(lasp2.lasp1_attention, *paper_heads(ranks, 128))
    state = 16 * 128 * 128 * 4
    update = 3 * state / device.memory_bandwidth
    assert run.makespan >= (ranks - 1) * (LINK.latency + state / LINK.bandwidth) + (ranks - 2) * update


def test_a_direct_all_gather_on_a_mesh_takes_one_hop_whatever_the_number_of_ranks():
    times = [
        mesh(ranks, hardware.IDEAL, LINK)
        .run(lasp2.attention, *paper_heads(ranks, 128), exchange=EXCHANGES["direct all-gather"])
        .makespan
        for ranks in (4, 32)
    ]
    assert times == pytest.approx([LINK.latency + 16 * 128 * 128 * 4 / LINK.bandwidth] * 2, rel=1e-9)


def stacked(comm, q, k, v, depth, in_step):
    """So many layers, one after the other."""
    for _ in range(depth):
        lasp2.lasp1_attention(comm, q, k, v)
        if in_step:
            comm.barrier()


@pytest.mark.parametrize("in_step, rounds", [(False, 7 + 2), (True, 3 * (7 + 3))])
def test_three_layers_of_lasp_1_wait_once_unless_something_keeps_ranks_in_step(in_step, rounds):
    """Computing is free, a message takes 1 s: 7 hops and then one a layer, as in a pipeline; or 7 and a barrier's 3."""
    run = mesh(8, hardware.IDEAL, hardware.Link(np.inf, 1.0)).run(stacked, *paper_heads(8, 64), 3, in_step)
    assert run.makespan == rounds


@pytest.mark.parametrize("scheme, in_step", [("LASP-2", False), ("LASP-2", True), ("LASP-1", True)])
def test_ranks_in_step_take_the_same_time_for_every_layer(scheme, in_step):
    """What the claims' step of 16 layers stands on."""
    one, two = (claims.passes(scheme, depth, 8, 2**15, in_step, 1e-4).makespan for depth in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-9)


def test_a_step_of_the_claims_is_that_of_all_layers():
    options = {"gpus": 8, "tokens": 2**14}
    all_layers = claims.passes("LASP-1", claims.LAYERS, **options).makespan
    assert claims.step_seconds("LASP-1", **options) == pytest.approx(all_layers, rel=1e-6)


@pytest.mark.parametrize("products, growth", [("left", 4), ("right", 2)])
def test_the_left_product_is_quadratic_in_the_tokens_and_the_right_linear(products, growth):
    def flops(tokens):
        run = mesh(8).run(rings.attention, *paper_heads(8, tokens), products=products, chunks_per_rank=tokens // 64)
        return sum(e.flops for e in run.trace if e.kind == "compute")

    assert flops(4096) / flops(2048) == pytest.approx(growth, rel=0.02)


def test_more_chunks_shrink_the_work_inside_them_and_not_the_messages():
    one, many = (mesh(4).run(lasp2.attention, *paper_heads(4, 4096), chunks_per_rank=c) for c in (1, 16))
    inside = [sum(e.flops for e in run.trace if e.name == "inside") for run in (one, many)]
    assert inside[0] == 4 * 16 * 4 * 4096**2 * 128
    assert inside[1] == inside[0] / 16 + 4 * 16 * 2 * (4096 - 256) * 128**2
    assert one.traffic.total == many.traffic.total


@pytest.mark.parametrize("ranks", [8, 16, 32])
def test_with_as_many_tokens_a_rank_only_the_gathered_states_grow(ranks):
    """In the largest moment of a small run: the states that arrived, and their joined copy."""
    state = 16 * 128 * 128 * 4
    small, large = (max(mesh(n).run(lasp2.attention, *paper_heads(n, 256)).peak_memory) for n in (ranks, ranks + 1))
    assert large - small == 2 * state


@MAP
@EXCHANGE
@CHUNKS
def test_without_data_time_bytes_and_memory_are_the_same(chunks, exchange, name):
    options = options_of(name, True, chunks, exchange)
    arrays = normal()
    real, empty = (mesh(4).run(both_passes, *sharded(a), **options) for a in (arrays, [like(a) for a in arrays]))
    assert (real.makespan, real.peak_memory, list(real.trace)) == (empty.makespan, empty.peak_memory, list(empty.trace))


# ---- kernels on tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_kernels_give_the_same_on_torchs_tensors(chunks, dtype):
    arrays = [a * 0.5 for a in normal(dtype=dtype)]
    tensors = [torch.from_numpy(a) for a in arrays]
    found = []
    for call, (q, k, v, grad) in ((lambda f: f, arrays), (lambda f: getattr(f, "__wrapped__", f), tensors)):
        states, grad_states = (call(kernels.chunk_states)(a, b, chunks) for a, b in ((k, v), (q, grad)))
        out = call(kernels.inside)(q, k, v, states)
        past = call(kernels.sum_of)(states.swapaxes(0, 1), 0, chunks)
        parts = call(kernels.finish_backward)(grad[:, :, :-1], out + 50)
        found.append(
            [
                states,
                out,
                *call(kernels.inside_backward)(q, k, v, states, grad_states, grad),
                call(kernels.add_through)(call(kernels.through)(q, past), q, past),
                call(kernels.rounded)(out + 50, v, True),
                *parts,
                call(kernels.feature_map)(q, "elu"),
                call(kernels.feature_map_backward)(q, out[:, :, :D_K], "elu"),
                *call(kernels.pairs_backward)(q, k, v, grad),
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        assert str(theirs.dtype) == f"torch.{ours.dtype}"
        assert_allclose(ours, theirs.numpy(), rtol=0, atol={"float64": 1e-12, "float32": 1e-4, "float16": 0.05}[dtype])


# ---- LASP-2H ---------------------------------------------------------------------------------------------------------


def softmax_passes(comm, q, k, v, grad_out, causal):
    out, lse = lasp2.softmax_attention(comm, q, k, v, causal=causal, return_lse=True)
    return out, *lasp2.softmax_attention_backward(comm, q, k, v, out, lse, grad_out, causal=causal)


@CAUSAL
@pytest.mark.parametrize("kv_heads", [4, 2])
@RANKS
def test_softmax_layers_equal_one_device(ranks, kv_heads, causal):
    random = np.random.default_rng(ranks)
    q, grad = random.standard_normal((2, 4, TOKENS, 6))
    k, v = random.standard_normal((2, kv_heads, TOKENS, 6))
    run = mesh(ranks).run(softmax_passes, *sharded([q, k, v, grad]), causal=causal)
    wanted = dense_attention(q, k, v, causal)[0], *dense_attention_backward(q, k, v, grad, causal)
    for ours, theirs in zip(run.gather(axis=1), wanted, strict=True):
        assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_softmax_layers_gather_keys_and_values_once(collectives):
    q = shard(like((4, 64, 16)), 1)
    run = mesh(4).run(lasp2.softmax_attention, q, q, q)
    assert collectives == ["all_gather"] * 2
    assert run.traffic.total == 4 * 3 * 2 * 4 * 16 * 16 * 8


def test_under_the_mask_the_last_rank_works_longest():
    run = mesh(4).run(lasp2.softmax_attention, *[shard(like((4, 64, 16)), 1)] * 3)
    flops = [sum(e.flops for e in run.trace if e.kind == "compute" and e.rank == rank) for rank in range(4)]
    assert flops == [4 * 4 * 16 * (16 * 17 / 2 + 16 * 16 * rank) for rank in range(4)]


# ---- a hybrid model --------------------------------------------------------------------------------------------------

SIZES = H, _, _, HEAD_DIM, _ = 12, 3, 3, 4, 20
VOCABULARY, PATTERN, RATE, STEPS = 11, "LLLS", 0.3, 4


def start():
    random = np.random.default_rng(3)
    text = random.integers(0, VOCABULARY, TOKENS + 1)
    return blocks.model_weights(random, VOCABULARY, len(PATTERN), *SIZES), text[:-1], text[1:]


def train(comm, params, tokens, targets):
    """Mean losses of this rank's tokens, step by step."""
    where = positions("contiguous", comm.rank, comm.size, TOKENS)
    kinds = {"L": layers.linear(feature_map="elu", normalise=True), "S": layers.softmax()}
    attention, found = layers.in_turn(*(kinds[letter] for letter in PATTERN)), []
    for _ in range(STEPS):
        losses, grads = blocks.loss_and_gradients(comm, params, tokens, targets, where, attention, HEAD_DIM, TOKENS)
        params = mapped(lambda w, g: w - RATE * g, params, blocks.sum_gradients(comm, grads))
        found.append(losses.sum() / TOKENS)
    return np.array(found)


def mapped(function, value, other=None):
    if isinstance(value, dict):
        return {name: mapped(function, part, other and other[name]) for name, part in value.items()}
    if isinstance(value, list):
        return [mapped(function, part, other and other[i]) for i, part in enumerate(value)]
    return function(value) if other is None else function(value, other)


def torch_losses(params, tokens, targets):
    """The same model and the same descent in PyTorch, on whole arrays."""
    functional, half = torch.nn.functional, HEAD_DIM // 2
    params, tokens, targets = mapped(torch.tensor, params), torch.tensor(tokens), torch.tensor(targets)
    angle = torch.tensor(np.arange(TOKENS)[:, None] * 10_000.0 ** (-np.arange(half) / half))

    def norm(x, gain):
        return functional.rms_norm(x, (H,), gain, eps=1e-6)

    def heads(x, turned):
        x = x.reshape(TOKENS, -1, HEAD_DIM).transpose(0, 1)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1) if turned else x

    found = []
    for _ in range(STEPS):
        params = mapped(lambda p: p.detach().requires_grad_(), params)
        x = params["embedding"][tokens]
        for kind, w in zip(PATTERN, params["layers"], strict=True):
            q, k, v = (heads(norm(x, w["norm_1"]) @ w[name], name in "qk") for name in "qkv")
            linear, softmax = partial(quadratic, name="elu, normalised"), functional.scaled_dot_product_attention
            out = linear(q, k, v, True) if kind == "L" else softmax(q, k, v, is_causal=True)
            x = x + out.transpose(0, 1).reshape(TOKENS, -1) @ w["o"]
            x = x + functional.gelu(norm(x, w["norm_2"]) @ w["up"], approximate="tanh") @ w["down"]
        loss = functional.cross_entropy(norm(x, params["norm"]) @ params["head"], targets)
        loss.backward()
        found.append(loss.item())
        params = mapped(lambda p: p - RATE * p.grad, params)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_hybrid_of_four_layers_trains_as_on_one_device(ranks):
    params, *text = start()
    run = mesh(ranks, hardware.IDEAL).run(train, params, *(shard(a) for a in text))
    wanted = torch_losses(params, *text)
    assert_allclose(sum(run.outputs), wanted, rtol=0, atol=1e-9)
    assert wanted[-1] < wanted[0] - 0.1


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_the_models_that_learn_have_the_layers_of_this_system(kind):
    random, x = np.random.default_rng(4), np.random.default_rng(5).standard_normal((1, TOKENS, recall.CHANNELS))
    weights = {name: a.astype("float64") for name, a in recall.fresh(random).items()}
    for name in "qkv":  # no short convolution, no output matrix: what remains is attention
        weights[f"{name}_kernel"] = np.eye(1, recall.WIDTH).T * np.ones(recall.CHANNELS)
    weights["o"] = np.eye(recall.CHANNELS)
    head_dim = recall.CHANNELS // recall.HEADS
    q, k, v = (shard(split_heads(x[0] @ weights[name], head_dim), 1) for name in "qkv")
    options = {"linear": {"feature_map": "elu", "normalise": True}, "softmax": {}}[kind]
    program = {"linear": lasp2.attention, "softmax": lasp2.softmax_attention}[kind]
    out = mesh(4).run(program, q, k, v, causal=True, **options).gather(1)
    assert_allclose(recall.mix(kind, weights, x)[0], merge_heads(out), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", recall.MODELS)
def test_the_weights_that_ship_are_those_of_models_that_have_learned(name):
    assert min(recall.recall(name)) > 5 * 2 / recall.VOCABULARY  # five times as often as by guessing


@pytest.mark.parametrize("ranks", [1, 3])
def test_megatrons_sequence_parallelism_takes_linear_layers_too(ranks):
    def whole(comm, weights, x):
        return blocks.block(comm, weights, x, np.arange(TOKENS), layers.linear(), HEAD_DIM)[0]

    def cut(comm, weights, x):
        mine = megatron.shard_weights(weights, comm.rank, comm.size, HEAD_DIM)
        return megatron.block(comm, mine, x, np.arange(TOKENS), layers.alone(layers.linear()), HEAD_DIM)[0]

    random = np.random.default_rng(2)
    weights, x = blocks.block_weights(random, 12, 3, 3, 4, 21), random.standard_normal((TOKENS, H))
    wanted = mesh(1).run(whole, weights, x).outputs[0]
    assert_allclose(mesh(ranks).run(cut, weights, shard(x)).gather(), wanted, rtol=0, atol=1e-10)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunks_per_rank": 5}, "12 tokens of a rank do not divide into 5 chunks"),
        ({"chunks_per_rank": 0.5}, "do not divide into 0.5 chunks"),
        ({"feature_map": "exp"}, "'exp' is not one of identity, elu, relu"),
        ({"normalise": True}, "'identity' may sum to 0"),
        ({"layout": "zigzag"}, "under the mask a rank must hold a run of tokens"),
        ({"layout": "spiral", "causal": False}, "layout 'spiral'"),
        ({"causal": np.full((12, 12), -np.inf)}, "a mask of linear attention multiplies"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ShapeError, match=message):
        mesh(4).run(lasp2.attention, *sharded(normal()[:3]), **options)


@pytest.mark.parametrize(
    "cut", [lambda q, k, v: (q[:2], k, v), lambda q, k, v: (q, k, v[:1]), lambda q, k, v: (q, v, k)]
)
def test_heads_and_widths_that_do_not_fit_are_refused(cut):
    with pytest.raises(ValueError, match="the same heads and tokens, and q as wide as k"):
        mesh(4).run(lasp2.attention, *sharded(cut(*normal()[:3])))


@pytest.mark.parametrize("program", [lasp2.attention, lasp2.softmax_attention])
def test_without_a_mask_any_layout_will_do(program):
    q, k, v = (shard(a, 1, "striped") for a in np.random.default_rng(1).standard_normal((3, 2, 24, 4)))
    ours = mesh(4).run(program, q, k, v, causal=False, layout="striped").gather(1, "striped")
    wanted = mesh(1).run(program, *(shard(a.array, 1) for a in (q, k, v)), causal=False).gather(1)
    assert_allclose(ours, wanted, rtol=0, atol=1e-10)


def test_softmax_layers_under_the_mask_need_contiguous_runs():
    q = shard(np.zeros((2, 48, 4)), 1, "zigzag")
    with pytest.raises(ShapeError, match="under the mask a rank must hold a run of tokens"):
        mesh(4).run(lasp2.softmax_attention, q, q, q, layout="zigzag")


def test_softmax_layers_need_runs_of_one_length():
    q = shard(np.zeros((2, 50, 4)), 1)
    with pytest.raises(ShapeError, match="50 tokens on 4 ranks, 13 here: give each rank the same number"):
        mesh(4).run(lasp2.softmax_attention, q, q, q)


@pytest.mark.parametrize("scheme, collective", [("lasp3", "ring"), ("lasp2", "butterfly")])
def test_unknown_schemes_have_no_predicted_time(scheme, collective):
    with pytest.raises(ShapeError, match="give lasp1 or lasp2, ring, tree, direct"):
        lasp2.predict_time(4, 64, 2, 8, hardware.A100, LINK, scheme, collective=collective)
