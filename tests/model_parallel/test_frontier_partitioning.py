"""Three-level partitioning: the same steps as one device and PyTorch, bytes of closed forms, honest packets."""

from dataclasses import replace
from functools import cache
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.model_parallel import _partition_picture as picture
from toolkit.model_parallel import _partition_scale as scale
from toolkit.model_parallel import _partition_trained as small
from toolkit.model_parallel import frontier_partitioning as fp
from toolkit.model_parallel._partition_blocks import dequantise, packet_bytes, quantise, sum_of_packets
from toolkit.model_parallel._partition_layout import degrees
from toolkit.model_parallel._partition_model import Model
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import DtypeError, ShapeError

N, RATE, GAMMA = 16, 0.01, 2
MODEL = Model(layers=2, h=8, heads=2, vocabulary=11)
FRONTIER = Cluster(topology.frontier(2), hardware.MI250X)
EXACT = {
    "ZeRO-0": fp.zero(0, N),
    "ZeRO-1": fp.zero(1, N),
    "ZeRO-2": fp.zero(2, N),
    "ZeRO-3": fp.zero(3, N),
    "ZeRO-3 and hpZ": fp.zero_pp(N, qwz=False, qgz=False),
    "3-level, 8": fp.three_level(N, 8, quantised=False),
    "3-level, 2": fp.three_level(N, 2, quantised=False),
    "3-level, no copy": fp.three_level(N, None, quantised=False),
    "states in the node, replicas beyond": fp.Scheme(8, None, 8, 8),
    "gradients in the pair": fp.Scheme(2, 2, 2, N),
}
PACKETS = {
    "ZeRO++": fp.zero_pp(N),
    "qwZ": fp.zero_pp(N, hpz=False, qgz=False),
    "qgZ": fp.zero_pp(N, qwz=False, hpz=False),
    "3-level, 8": fp.three_level(N),
    "3-level, 2": fp.three_level(N, 2),
    "3-level, no copy": fp.three_level(N, None),
}


@cache
def data(dtype="float64", steps=3):
    random = np.random.default_rng(0)
    weights = MODEL.weights(random, dtype)
    text = random.integers(0, MODEL.vocabulary, (steps, N * GAMMA, 7))
    return weights, text[:, :, :-1].copy(), text[:, :, 1:].copy()


@cache
def alone():
    return fp.train(Cluster(topology.switch(1, hardware.NVLINK4), hardware.MI250X), MODEL, fp.zero(0, 1), *data(), RATE)


@cache
def trained(scheme):
    return fp.train(FRONTIER, MODEL, scheme, *data(), RATE, GAMMA)


def whole(run, scheme, bucket=1):
    """A bucket's weights, put together from the ranks by `flat_range`: refuses gaps and contradictions."""
    chain, kept = degrees(scheme, N), [out[1][bucket].weights for out in run.outputs]
    found = np.full(kept[0].size * scheme.s_w, np.nan)
    for rank, part in enumerate(kept):
        place = found[slice(*fp.flat_range(rank, scheme.s_w, found.size, chain))]
        assert np.isnan(place).all() or np.array_equal(place, part)
        place[:] = part
    assert not np.isnan(found).any()
    return found


# ---- the same steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_without_packets_weights_are_those_of_one_device_after_three_steps(name):
    losses, weights, _ = trained(EXACT[name])
    assert_allclose(losses, alone()[0], rtol=0, atol=1e-12)
    for ours, wanted in zip(weights, alone()[1], strict=True):
        assert_allclose(ours[: wanted.size], wanted, rtol=0, atol=1e-12)
        assert not ours[wanted.size :].any()  # padding never moves


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("scheme", [fp.three_level, lambda n, quantised: fp.zero_pp(n, quantised, True, quantised)])
def test_other_numbers_of_nodes_take_the_same_step(nodes, scheme):
    machine, n = Cluster(topology.frontier(nodes), hardware.MI250X), 8 * nodes
    text = np.random.default_rng(nodes).integers(0, MODEL.vocabulary, (1, n, 7))
    batch = data()[0], text[:, :, :-1].copy(), text[:, :, 1:].copy()
    _, wanted, _ = fp.train(Cluster(topology.switch(1, hardware.NVLINK4)), MODEL, fp.zero(0, 1), *batch, RATE)
    _, weights, _ = fp.train(machine, MODEL, scheme(n, quantised=False), *batch, RATE)
    for ours, one in zip(weights, wanted, strict=True):
        assert_allclose(ours[: one.size], one, rtol=0, atol=1e-12)


def test_one_device_takes_the_steps_of_torchs_adam():
    torch = pytest.importorskip("torch")
    weights, tokens, targets = data()
    tensors = [{name: torch.tensor(a, requires_grad=True) for name, a in bucket.items()} for bucket in weights]
    leaves = [a for bucket in tensors for a in bucket.values()]
    adam = torch.optim.Adam(leaves, lr=RATE)
    for text, wanted in zip(tokens, targets, strict=True):
        adam.zero_grad()
        torch_loss(torch, tensors, torch.tensor(text), torch.tensor(wanted)).backward()
        adam.step()
    for bucket, ours in zip(tensors, alone()[1], strict=True):
        wanted = np.concatenate([bucket[name].detach().numpy().ravel() for name in sorted(bucket)])
        assert_allclose(ours, wanted, rtol=0, atol=1e-7)


def torch_loss(torch, tensors, text, wanted):
    functional, (batch, n), d = torch.nn.functional, text.shape, MODEL.h // MODEL.heads
    angle = torch.as_tensor(np.arange(n)[:, None] * 10_000.0 ** (-np.arange(d // 2) / (d // 2)))
    norm = lambda x, gain: functional.rms_norm(x, (MODEL.h,), gain, eps=1e-6)  # noqa: E731

    def heads(x, turned):
        x = x.reshape(batch, n, -1, d).transpose(1, 2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1) if turned else x

    x = tensors[0]["embedding"][text]
    for w in tensors[1:-1]:
        q, k, v = (heads(norm(x, w["norm_1"]) @ w[name], name in "qk") for name in "qkv")
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + out.transpose(1, 2).reshape(batch, n, -1) @ w["o"]
        x = x + functional.gelu(norm(x, w["norm_2"]) @ w["up"], approximate="tanh") @ w["down"]
    logits = norm(x, tensors[-1]["norm"]) @ tensors[-1]["head"]
    return functional.cross_entropy(logits.reshape(-1, MODEL.vocabulary), wanted.reshape(-1))


def test_a_pair_that_exchanges_the_wrong_halves_is_caught(monkeypatch):
    right = fp.flat_range
    monkeypatch.setattr(fp, "flat_range", lambda rank, degree, *rest: right(rank ^ (degree == 2), degree, *rest))
    losses, *_ = fp.train(FRONTIER, MODEL, EXACT["3-level, 2"], *data(), RATE, GAMMA)
    assert abs(losses - alone()[0]).max() > 1e-3


# ---- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*EXACT.values(), *PACKETS.values()], ids=[*EXACT, *(f"{p}*" for p in PACKETS)])
@pytest.mark.parametrize("state", ["s_w", "s_g", "s_o"])
def test_parts_of_every_state_cover_the_vector_as_often_as_there_are_copies(scheme, state):
    chain, degree, count = degrees(scheme, N), getattr(scheme, state), np.zeros(64, int)
    for rank in range(N):
        count[slice(*fp.flat_range(rank, degree, 64, chain))] += 1
    assert (count == N // degree).all()


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_the_three_level_layout_is_the_papers(nodes, salt):
    n = 8 * nodes
    rank, psi = salt % n, 24 * n
    half, quarter, node = rank % 2, rank % 8 // 2, rank // 8
    start = half * psi // 2 + quarter * psi // 8 + node * psi // n
    assert fp.flat_range(rank, n, psi, degrees(fp.three_level(n), n)) == (start, start + psi // n)


def test_a_finer_part_lies_inside_the_coarser_one():
    chain = degrees(fp.three_level(N), N)
    for rank in range(N):
        (a, b), (c, d), (e, f) = (fp.flat_range(rank, degree, 64, chain) for degree in (2, 8, N))
        assert a <= c <= e < f <= d <= b


def numbered(comm, scheme, psi):
    """Gather the pieces of 0 … psi-1 as the step does: what this rank then has as weights."""
    start, end = fp.flat_range(comm.rank, scheme.s_o, psi, degrees(scheme, comm.size))
    return fp.gather(fp.groups(comm, scheme).refresh, np.arange(float(start), float(end)))


@pytest.mark.parametrize("s_w2", [8, 2, None])
def test_the_gathers_of_the_step_give_exactly_the_half(s_w2):
    outputs = FRONTIER.run(numbered, fp.three_level(N, s_w2), 64).outputs
    for rank, half in enumerate(outputs):
        assert half.tolist() == list(range(rank % 2 * 32, rank % 2 * 32 + 32))


def owned(comm, scheme, grads, psi):
    """This rank's part of the sum of all ranks' gradients, between microbatches."""
    groups = fp.groups(comm, scheme)
    return fp.reduce(groups.micro, grads, scheme.qg, scheme.block, groups.order)


@pytest.mark.parametrize("name", [*EXACT, *PACKETS])
def test_every_rank_gets_its_own_part_of_the_gradient(name):
    scheme = replace((EXACT | PACKETS)[name], block=16)
    parts = FRONTIER.run(owned, scheme, np.repeat(np.arange(16.0), 16), 256).outputs
    for rank, part in enumerate(parts):
        start, end = fp.flat_range(rank, scheme.s_g, 256, degrees(scheme, N))
        assert_allclose(part, scheme.s_g * np.repeat(np.arange(16.0), 16)[start:end], rtol=1e-6)


# ---- packets ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.sampled_from([4, 8]), st.sampled_from([2, 7, 16, 256, inf]), st.integers(0, 99))
def test_what_comes_out_is_within_half_a_scale(n, bits, block, seed):
    x = np.random.default_rng(seed).standard_normal((2, n)).astype("float32") * 10.0 ** (seed % 7 - 3)
    packets = quantise(x, bits, block)
    assert packets.shape == (2, packet_bytes(n, bits, block))
    size = n if block == inf else int(block)
    top = np.stack([abs(np.pad(row, (0, -n % size)).reshape(-1, size)).max(1).repeat(size)[:n] for row in x])
    error = abs(dequantise(packets, n, bits, block, "float32") - x)
    assert (error <= top / (2 ** (bits - 1) - 1) / 2 * (1 + 1e-5)).all()


def test_a_block_of_zeros_stays_zeros():
    assert not dequantise(quantise(np.zeros((1, 9), "float32"), 4, 4), 9, 4, 4, "float32").any()


def test_a_packet_holds_half_a_byte_a_value_and_four_a_block():
    assert quantise(np.ones((1, 1024), "float32"), 4, 256).nbytes == 512 + 16


def test_what_was_dequantised_is_a_fixed_point():
    x = np.random.default_rng(1).standard_normal((1, 512)).astype("float32")
    once = dequantise(quantise(x, 8, 64), 512, 8, 64, "float32")
    assert_allclose(dequantise(quantise(once, 8, 64), 512, 8, 64, "float32"), once, rtol=1e-6)


def test_sums_of_eight_packets_do_not_overflow():
    packets = quantise(np.full((8, 16), 3.0, "float32"), 4, 16)
    assert_allclose(sum_of_packets(packets, 16, 4, 16, np.dtype("float32")), 24.0)


def mean_error(nodes, scheme):
    grads = [np.random.default_rng(7 + r % 8).standard_normal(512) for r in range(8 * nodes)]
    machine = Cluster(topology.frontier(nodes), hardware.IDEAL)
    exact = np.mean(grads[:8], axis=0)

    def average(comm):
        mine = owned(comm, scheme, grads[comm.rank], 512) / scheme.s_g
        start, end = fp.flat_range(comm.rank, scheme.s_g, 512, degrees(scheme, comm.size))
        return abs(mine - exact[start:end]).max()

    return max(machine.run(average).outputs)


def test_the_error_of_the_average_does_not_grow_with_ranks():
    assert mean_error(4, fp.three_level(32)) == mean_error(1, fp.three_level(8)) > 0


def test_a_second_hop_of_packets_adds_an_error_that_one_hop_has_not():
    assert mean_error(4, fp.zero_pp(32)) > 1.2 * mean_error(4, fp.three_level(32))


@pytest.mark.parametrize("name", PACKETS)
def test_replicas_stay_the_same_bit_for_bit(name):
    losses, _, run = trained(PACKETS[name])
    for bucket in range(MODEL.layers + 2):
        whole(run, PACKETS[name], bucket)
    assert 1e-6 < abs(losses - alone()[0]).max() < 0.1  # packets were used, and training still works


def test_the_owner_too_computes_with_what_came_out_of_the_packet():
    part = np.random.default_rng(0).standard_normal(32)

    def both(comm):
        return fp.gather(fp.groups(comm, fp.three_level(8)).forward, part + comm.rank % 2, 8, 16)

    outputs = Cluster(topology.frontier(1), hardware.IDEAL).run(both).outputs
    assert all(np.array_equal(outputs[0], other) for other in outputs)
    assert not np.array_equal(outputs[0][:32], part)


def test_the_second_copy_is_that_of_the_new_weights_after_a_step():
    _, _, run = trained(PACKETS["3-level, 8"])
    assert all(one.second is None and one.gradient is None for _, kept in run.outputs for one in kept)


# ---- bytes -----------------------------------------------------------------------------------------------------------

PSI = 16 * 4096


def phases(comm, scheme, phase):
    groups, kept = fp.groups(comm, scheme), fp.begin(comm, scheme, {"w": like((PSI,), "float16")})
    if scheme.s_w2:
        kept.second = fp.second_copy(groups, scheme, like((PSI,), "float16"))
    if phase == "forward":
        fp.forward_weights(groups, scheme, kept)
    elif phase == "backward":
        fp.backward_weights(groups, scheme, kept)
    elif phase == "gradient":
        fp.add_gradient(groups, scheme, kept, {"w": like((PSI,), "float16")}, comm.size)
    elif phase == "step":
        fp.sum_of_step(groups, like((PSI // scheme.s_g,), "float16"))
    else:
        fp.gather(groups.refresh, like((PSI // scheme.s_o,), "float16"))


@pytest.mark.parametrize("phase", ["forward", "backward", "gradient", "step", "refresh"])
@pytest.mark.parametrize("name", [*EXACT, *PACKETS])
def test_bytes_of_a_phase_are_those_of_the_closed_form(name, phase):
    scheme = (EXACT | PACKETS)[name]
    traffic = FRONTIER.run(phases, scheme, phase).traffic
    wanted = sum(count for (p, _), count in fp.step_bytes(scheme, PSI, N).items() if p == phase)
    assert traffic.by_pair.sum(axis=1).tolist() == [wanted] * N


@pytest.mark.parametrize("name", [*EXACT, *PACKETS])
def test_bytes_between_nodes_are_those_of_the_closed_form(name):
    scheme = (EXACT | PACKETS)[name]
    runs = [FRONTIER.run(phases, scheme, p).traffic for p in ("forward", "backward", "gradient", "step", "refresh")]
    crossing = sum(traffic.by_pair[:8, 8:].sum() for traffic in runs)
    assert crossing / 8 == pytest.approx(fp.between_nodes(scheme, PSI, N))


def G(x):
    return (x - 1) / x


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("n", [16, 384])
def test_closed_forms_are_the_papers(n, gamma):
    a, psi = n // 8, 384 * 4096 * 8
    q8, q4 = 1 + 4 / 256, 1 / 2 + 4 / 256
    flat = {(phase, "flat"): G(n) * 2 * psi for phase in ("forward", "backward", "gradient")}
    plus = {
        ("forward", "flat"): G(n) * q8 * psi,
        ("backward", "node"): G(8) * 2 * psi,
        ("gradient", "node"): G(8) * q4 * psi,
        ("gradient", "inter"): G(a) * q4 * psi / 8,
    }
    once = {("step", "inter"): G(a) * psi / 4, ("refresh", "inter"): G(a) * psi / 4, ("refresh", "node"): 3 / 4 * psi}
    often = {("forward", "pair"): q8 * psi / 2, ("gradient", "node"): G(8) * q4 * psi}
    of = lambda table: {key: gamma * count for key, count in table.items()}  # noqa: E731
    assert fp.step_bytes(fp.zero(3, n), psi, n, gamma) == pytest.approx(of(flat))
    assert fp.step_bytes(fp.zero_pp(n), psi, n, gamma) == pytest.approx(of(plus))
    eight, two = {("backward", "node"): G(8) * q8 * psi}, {("backward", "pair"): q8 * psi / 2}
    assert fp.step_bytes(fp.three_level(n, 8), psi, n, gamma) == pytest.approx(of(often | eight) | once)
    assert fp.step_bytes(fp.three_level(n, 2), psi, n, gamma) == pytest.approx(of(often | two) | once)


@pytest.mark.parametrize("name", ["ZeRO-3", "ZeRO++", "3-level, 8", "3-level, 2"])
def test_only_the_three_level_schemes_send_no_more_between_nodes_with_more_microbatches(name):
    one, sixteen = (fp.between_nodes(fp.named(384)[name], 384 * 4096, 384, gamma) for gamma in (1, 16))
    assert sixteen == pytest.approx(one * (1 if name.startswith("3") else 16))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, gigabytes",
    [
        (fp.zero(3, 64), 2.5),
        (fp.zero_pp(64), 5.0),
        (fp.three_level(64), 15.625),
        (fp.three_level(64, 2), 19.375),
        (fp.three_level(64, None), 14.375),
    ],
)
def test_memory_of_10b_parameters_on_64_ranks_without_scales(scheme, gigabytes):
    assert sum(fp.memory(replace(scheme, block=inf), 10e9, 64).values()) == pytest.approx(gigabytes * 1e9)


def held(comm, scheme):
    """Bytes of a bucket that a rank keeps when a microbatch is over."""
    groups, weights = fp.groups(comm, scheme), {"w": like((PSI,), "float16")}
    kept = fp.begin(comm, scheme, weights)
    if scheme.s_w2:
        kept.second = fp.second_copy(groups, scheme, weights["w"])
    fp.add_gradient(groups, scheme, kept, weights, comm.size)
    return kept.nbytes


@pytest.mark.parametrize("name", [*EXACT, *PACKETS])
def test_what_a_rank_keeps_is_the_closed_form(name):
    scheme = (EXACT | PACKETS)[name]
    assert FRONTIER.run(held, scheme).outputs == [sum(fp.memory(scheme, PSI, N).values())] * N


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, n, says",
    [
        (fp.three_level(12), 12, "multiple of 8"),
        (fp.three_level(16, 4), 16, "s_w2=4"),
        (fp.Scheme(3, None, 16, 16), 16, "divide"),
        (fp.Scheme(16, None, 8, 8), 16, "s_o=8"),
        (fp.Scheme(1, None, 1, 16, qg=4), 16, "qg=4"),
        (fp.Scheme(16, None, 16, 16, qw=3), 16, "4 or 8 bits"),
        (fp.Scheme(2, None, 8, 16, block=1), 16, "block=1"),
        (fp.three_level(4), 4, "divide"),
    ],
)
def test_a_scheme_that_cannot_be_is_refused(scheme, n, says):
    with pytest.raises(ShapeError, match=says):
        degrees(scheme, n)


def test_a_vector_that_does_not_divide_is_refused_by_name():
    with pytest.raises(ShapeError, match="65 values do not divide into 16 parts: pad to 80"):
        fp.flat_range(0, 16, 65, (16,))


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(DtypeError, match="not finite"):
        quantise(np.array([[1.0, np.inf]]), 8, 256)


def test_sequences_that_do_not_divide_are_refused():
    weights, tokens, targets = data()
    with pytest.raises(ShapeError, match="sequences for 16 ranks"):
        fp.train(FRONTIER, MODEL, EXACT["ZeRO-3"], weights, tokens[:, :17], targets[:, :17])


# ---- at scale --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, inner", [("all_gather", 1), ("reduce_scatter", 1), ("all_gather", 8), ("all_to_all", 8)]
)
def test_a_collective_on_12_nodes_takes_what_the_line_says(name, inner):
    fixed, a_byte = scale.line(name, inner, 96)
    assert fixed + a_byte * 3e6 == pytest.approx(scale.simulated(name, inner, 96, 3_000_000, 12, scale.NIC), rel=0.01)


SMALL = Model(layers=3, h=1024, heads=8, vocabulary=512, recompute=True)


def on_all_ranks(scheme, nic):
    """The same step with every rank in the simulation."""

    def program(comm):
        groups, weights = fp.groups(comm, scheme), SMALL.weights()
        shapes = [{name: a.shape for name, a in bucket.items()} for bucket in weights]
        kept = [fp.begin(comm, scheme, bucket) for bucket in weights]
        text, start = like((1, 2048), "int64"), comm.now
        for _ in range(2):
            fp.micro_step(comm, groups, scheme, kept, SMALL.buckets(comm, text, text, 1.0), shapes, comm.size)
        fp.optimizer_step(comm, groups, scheme, kept, RATE)
        return comm.now - start

    return max(Cluster(fp.frontier(2, nic), scale.DEVICE).run(program).outputs)


@pytest.mark.parametrize("name", ["ZeRO-3", "ZeRO++", "3-level, 8", "3-level, 2, fp16"])
@pytest.mark.parametrize("nic", [scale.NIC, 1e9], ids=["rated", "slow"])
def test_one_of_many_equal_ranks_takes_the_time_of_all(name, nic):
    scheme = fp.named(N)[name]
    assert scale.step(scheme, N, 2, SMALL, nic=nic).seconds == pytest.approx(on_all_ranks(scheme, nic), rel=0.06)


def test_seconds_are_compute_and_waiting():
    step = scale.step(fp.named(N)["3-level, 8"], N, 4, SMALL, nic=1e9)
    assert step.compute + sum(step.exposed.values()) == pytest.approx(step.seconds, rel=0.01)


@pytest.mark.parametrize("gamma", [1, 3])
def test_seconds_of_more_microbatches_are_those_of_one_more_each(gamma):
    one, two, more = (scale.step(fp.named(N)["ZeRO++"], N, g, SMALL).seconds for g in (1, 2, 2 + gamma))
    assert more == pytest.approx(two + gamma * (two - one))


@pytest.mark.parametrize("name", small.schemes())
def test_the_shipped_losses_are_those_of_the_script(name):
    assert_allclose(small.losses(small.schemes()[name], 1, steps=2), small.measured()[name][1, :2], rtol=1e-4)


@pytest.mark.parametrize("name", picture.shown(N))
def test_the_picture_shares_all_bytes_among_the_links(name):
    scheme = fp.named(N)[name]
    links = picture.by_links(scheme, PSI, N, 4)
    assert sum(links.values()) == pytest.approx(sum(fp.step_bytes(scheme, PSI, N, 4).values()))
    assert links["inter"] == pytest.approx(fp.between_nodes(scheme, PSI, N, 4))


def test_the_pictures_words_tell_bytes_memory_and_seconds():
    words = picture.draw("3-level, 8", 4, scale.NIC).words
    assert "between nodes 10.1 GB" in words and "28.9 GB of 64" in words and "ZeRO-3" in words


def test_a_node_has_its_ranks_on_a_ring_of_direct_links():
    machine = fp.frontier(2)
    for rank in range(8):
        assert len(machine.route(machine.ranks[rank], machine.ranks[(rank + 1) % 8])) == 1


def test_eight_dies_of_a_node_reach_the_others_by_four_nics():
    machine = fp.frontier(2)
    routes = [machine.route(machine.ranks[rank], machine.ranks[8 + rank]) for rank in range(8)]
    assert len({edge for route in routes for edge in route if edge[1] == "slingshot"}) == 4
