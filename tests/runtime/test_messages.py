"""Messages: who gets what, when it arrives, and that every wait ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from toolkit.runtime import ANY, Cluster, errors, hardware, like, per_rank, topology, wait_all, wait_any

LATENCY, BANDWIDTH = 2e-6, 1e9
LINK = hardware.Link(bandwidth=BANDWIDTH, latency=LATENCY)
KB = 1000
KB_TIME = LATENCY + KB / BANDWIDTH  # what a message of 1 kB takes, alone


def mesh(ranks):
    """Full mesh of devices that compute in no time: what remains is communication."""
    return Cluster(topology.full_mesh(ranks, LINK), device=hardware.IDEAL)


def kilobyte(value=0):
    return np.full(KB, value, np.uint8)


# ---- matching ----------------------------------------------------------------------------------------------------


def test_messages_of_one_source_and_tag_arrive_in_the_order_sent():
    def program(comm):
        if comm.rank == 0:
            wait_all([comm.isend(np.array([i]), dest=1) for i in range(5)])
        else:
            return [int(comm.recv(source=0)[0]) for _ in range(5)]

    assert mesh(2).run(program).outputs[1] == [0, 1, 2, 3, 4]


def test_a_small_message_does_not_overtake_a_large_one():
    def program(comm):
        if comm.rank == 0:
            wait_all([comm.isend(np.zeros(100_000), dest=1), comm.isend(np.zeros(1), dest=1)])
        else:
            return [comm.recv(source=0).size for _ in range(2)]

    assert mesh(2).run(program).outputs[1] == [100_000, 1]


@pytest.mark.parametrize("tags", [(1, 2), ("keys", "values"), (("layer", 3), ("layer", 4))])
def test_tags_keep_two_channels_to_one_peer_apart(tags):
    def program(comm):
        if comm.rank == 0:
            wait_all([comm.isend(np.array([i]), dest=1, tag=tag) for i, tag in enumerate(tags)])
        else:
            return [int(comm.recv(source=0, tag=tag)[0]) for tag in reversed(tags)]

    assert mesh(2).run(program).outputs[1] == [1, 0]


def test_a_named_source_waits_for_that_rank_though_another_sent_first():
    def program(comm):
        if comm.rank == 0:
            return int(comm.recv(source=2)[0]), int(comm.recv(source=1)[0])
        comm.sleep(comm.rank)
        comm.send(np.array([comm.rank]), dest=0)

    assert mesh(3).run(program).outputs[0] == (2, 1)


def test_any_takes_whoever_sends_first_and_the_request_tells_who():
    def program(comm):
        if comm.rank == 0:
            requests = [comm.irecv(source=ANY) for _ in range(3)]
            wait_all(requests)
            return [request.source for request in requests]
        comm.sleep({1: 3.0, 2: 1.0, 3: 2.0}[comm.rank])
        comm.send(np.zeros(1), dest=0)

    assert mesh(4).run(program).outputs[0] == [2, 3, 1]


def test_any_prefers_the_lowest_rank_when_all_send_at_one_instant():
    def program(comm):
        if comm.rank == 0:
            comm.sleep(1.0)
            return [int(comm.recv(source=ANY)[0]) for _ in range(3)]
        comm.send(np.array([comm.rank]), dest=0)

    assert mesh(4).run(program).outputs[0] == [1, 2, 3]


def test_the_source_of_a_request_is_a_rank_of_its_own_communicator():
    def program(comm):
        odd = comm.split(comm.rank % 2)
        if odd.rank == 1:
            odd.send(np.zeros(1), dest=0)
        else:
            request = odd.irecv(source=ANY)
            request.wait()
            return request.source

    assert mesh(4).run(program).outputs[:2] == [1, 1]


@given(
    ranks=st.integers(1, 6),
    messages=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([0, 1, "keys"])), max_size=25),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_any_messages_posted_at_once_all_arrive_in_order_on_every_channel(ranks, messages, order):
    messages = [(source % ranks, dest % ranks, tag) for source, dest, tag in messages]
    shuffled = order.sample(messages, len(messages))

    def program(comm):
        sent = [
            comm.isend(np.full(i % 3, i), dest, tag, nbytes=100 * i)
            for i, (source, dest, tag) in enumerate(messages)
            if source == comm.rank
        ]
        channels = [(source, tag) for source, dest, tag in shuffled if dest == comm.rank]
        received = wait_all([comm.irecv(source, tag) for source, tag in channels])
        wait_all(sent)
        return list(zip(channels, [got.tolist() for got in received], strict=True))

    run = mesh(ranks).run(program)
    for dest, got in enumerate(run.outputs):
        for channel in set(shuffled):
            expected = [
                [i] * (i % 3) for i, (s, d, t) in enumerate(messages) if (s, d, t) == (channel[0], dest, channel[2])
            ]
            assert [value for (s, t), value in got if (s, t) == (channel[0], channel[2])] == expected
    assert run.traffic.total == sum(100 * i for i in range(len(messages)))


# ---- payloads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        np.arange(6.0).reshape(2, 3),
        np.array(2.5),
        np.zeros((0, 4)),
        np.arange(12, dtype=np.int16)[::-3],
        np.arange(6.0).reshape(2, 3).T,
        np.array([True, False]),
        np.array([1 + 2j], np.complex64),
    ],
    ids=["matrix", "no axes", "empty", "strided", "transposed", "bool", "complex"],
)
def test_an_array_arrives_with_its_values_shape_and_dtype(payload):
    def program(comm):
        if comm.rank == 0:
            comm.send(payload, dest=1)
        else:
            return comm.recv(source=0)

    got = mesh(2).run(program).outputs[1]
    assert_array_equal(got, payload, strict=True)


def test_nested_tuples_arrive_with_their_structure():
    payload = (np.arange(3), (np.ones((2, 2)), (np.zeros(1), ())))

    def program(comm):
        if comm.rank == 0:
            comm.send(payload, dest=1)
        else:
            return comm.recv(source=0)

    run = mesh(2).run(program)
    a, (b, (c, nothing)) = run.outputs[1]
    assert_array_equal(a, payload[0])
    assert_array_equal(b, payload[1][0])
    assert_array_equal(c, payload[1][1][0])
    assert nothing == ()
    assert run.traffic.total == 3 * 8 + 4 * 8 + 8


def test_the_receiver_has_memory_of_its_own():
    def program(comm, x):
        if comm.rank == 0:
            comm.send(x, dest=1)
            x[:] = 7  # allowed: the message has arrived
            return x
        got = comm.recv(source=0)
        comm.sleep(1.0)
        return got

    run = mesh(2).run(program, np.zeros(3))
    assert_array_equal(run.outputs[1], [0, 0, 0])


def test_every_pair_may_exchange_arrays_of_its_own_size():
    def program(comm):
        return comm.sendrecv(np.full(comm.rank, comm.rank), (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size)

    run = mesh(5).run(program)
    assert [got.size for got in run.outputs] == [4, 0, 1, 2, 3]
    assert run.traffic.total == 8 * (0 + 1 + 2 + 3 + 4)


@pytest.mark.parametrize(
    "size, expected",
    [({}, 800), ({"nbytes": 37}, 37), ({"nbits": 100}, 13), ({"nbytes": 0}, 0), ({"wire": "float16"}, 200)],
)
def test_the_wire_size_can_be_given(size, expected):
    def program(comm):
        if comm.rank == 0:
            comm.send(np.arange(100.0), dest=1, **size)
        else:
            return comm.recv(source=0)

    run = mesh(2).run(program)
    assert run.traffic.total == expected
    assert run.makespan == pytest.approx(LATENCY + expected / BANDWIDTH, rel=1e-12)
    assert_array_equal(run.outputs[1], np.arange(100.0))


def test_a_wire_dtype_rounds_the_values_and_keeps_the_dtype():
    exact = np.array([1 / 3, 1e-3, 1.0])

    def program(comm):
        if comm.rank == 0:
            comm.send(exact, dest=1, wire=np.float16)
            return exact
        return comm.recv(source=0)

    run = mesh(2).run(program)
    assert_array_equal(run.outputs[1], exact.astype(np.float16).astype(np.float64), strict=True)
    assert_array_equal(run.outputs[0], [1 / 3, 1e-3, 1.0])


def test_a_wire_dtype_can_differ_for_each_array_of_a_tuple():
    def program(comm):
        if comm.rank == 0:
            comm.send((np.array([1 / 3]), np.array([1 / 3])), dest=1, wire=(np.float32, None))
        else:
            return comm.recv(source=0)

    run = mesh(2).run(program)
    assert [float(part[0]) for part in run.outputs[1]] == [float(np.float32(1 / 3)), 1 / 3]
    assert run.traffic.total == 4 + 8


# ---- times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 1])
def test_a_transfer_starts_when_both_sides_have_posted(late):
    def program(comm):
        if comm.rank == late:
            comm.sleep(1.0)
        if comm.rank == 0:
            comm.send(kilobyte(), dest=1)
        else:
            comm.recv(source=0)
        return comm.now

    run = mesh(2).run(program)
    assert run.outputs == [1.0 + KB_TIME] * 2
    send, recv = (next(e for e in run.trace if e.kind == kind) for kind in ("send", "recv"))
    assert (send.start, send.end) == (recv.start, recv.end) == (1.0, 1.0 + KB_TIME)
    assert {send.posted, recv.posted} == {0.0, 1.0}


@pytest.mark.parametrize("empty", [(), np.zeros(0), np.zeros((3, 0, 2))], ids=["()", "0", "3x0x2"])
def test_a_message_of_no_bytes_costs_latency_only(empty):
    def program(comm):
        if comm.rank == 0:
            comm.send(empty, dest=1)
        else:
            comm.recv(source=0)

    run = mesh(2).run(program)
    assert run.makespan == LATENCY
    assert run.traffic.total == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_message_to_oneself_takes_no_time_and_is_a_copy(ranks):
    def program(comm, x):
        got = comm.sendrecv(x, comm.rank, comm.rank)
        x[:] = 9
        return got

    run = mesh(ranks).run(program, np.arange(4.0))
    assert run.makespan == 0.0
    assert_array_equal(run.outputs[0], np.arange(4.0))


def test_both_directions_of_a_link_carry_a_message_at_once():
    def program(comm):
        comm.sendrecv(kilobyte(), 1 - comm.rank, 1 - comm.rank)

    assert mesh(2).run(program).makespan == pytest.approx(KB_TIME, rel=1e-12)


@pytest.mark.parametrize("by", [1, 2, -1, 0, 7])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ishift_moves_every_array_round_the_ring(ranks, by):
    def program(comm):
        return int(comm.ishift(np.array([comm.rank]), by=by).wait()[0])

    assert mesh(ranks).run(program).outputs == [(r - by) % ranks for r in range(ranks)]


# ---- requests ----------------------------------------------------------------------------------------------------


def test_wait_all_returns_values_in_the_order_of_the_requests():
    def program(comm):
        if comm.rank == 0:
            return [int(x[0]) for x in wait_all([comm.irecv(source=r) for r in (3, 1, 2)])]
        comm.sleep(comm.rank)
        comm.send(np.array([comm.rank]), dest=0)

    assert mesh(4).run(program).outputs[0] == [3, 1, 2]


def test_wait_any_returns_the_first_that_is_done_and_its_place():
    def program(comm):
        if comm.rank == 0:
            requests = [comm.irecv(source=r) for r in (1, 2, 3)]
            index, value = wait_any(requests)
            seen = index, int(value[0]), comm.now
            wait_all(requests)
            return seen
        comm.sleep({1: 3.0, 2: 1.0, 3: 2.0}[comm.rank])
        comm.send(np.array([10 * comm.rank]), dest=0, nbytes=0)

    assert mesh(4).run(program).outputs[0] == (1, 20, 1.0 + LATENCY)


def test_time_after_wait_any_is_whole_though_two_requests_end_at_one_instant():
    def program(comm):
        if comm.rank == 0:
            requests = [comm.irecv(source=1), comm.irecv(source=2)]
            wait_any(requests)
            before = comm.now
            comm.sleep(1.0)
            wait_all(requests)
            return comm.now - before
        comm.send(kilobyte(), dest=0)

    assert mesh(3).run(program).outputs[0] == pytest.approx(1.0, rel=1e-12)


def test_wait_any_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one request"):
        mesh(1).run(lambda comm: wait_any([]))


def test_waiting_twice_gives_the_same_value():
    def program(comm):
        request = comm.ishift(np.array([comm.rank]))
        return request.wait() is request.wait()

    assert mesh(2).run(program).outputs == [True, True]


def test_a_wait_that_runs_out_of_time_says_where_and_the_request_lives_on():
    def program(comm):
        if comm.rank == 0:
            request = comm.irecv(source=1)
            with pytest.raises(errors.RequestTimeout, match=r"recv\(source=1\).*test_messages\.py:\d+.*0\.25"):
                request.wait(timeout=0.25)
            return comm.now, int(request.wait()[0])
        comm.sleep(1.0)
        comm.send(np.array([5]), dest=0)

    assert mesh(2).run(program).outputs[0] == (0.25, 5)


def test_a_timeout_that_is_not_needed_does_not_lengthen_the_run():
    def program(comm):
        comm.ishift(kilobyte()).wait(timeout=100.0)

    assert mesh(2).run(program).makespan == pytest.approx(KB_TIME, rel=1e-12)


def test_a_recv_that_timed_out_does_not_swallow_the_next_message():
    def program(comm):
        if comm.rank == 0:
            with pytest.raises(errors.RequestTimeout):
                comm.recv(source=1, timeout=0.5)
            return int(comm.recv(source=1)[0])
        comm.sleep(1.0)
        comm.send(np.array([5]), dest=0)

    assert mesh(2).run(program).outputs[0] == 5


def test_a_cancelled_receive_takes_no_message():
    def program(comm):
        if comm.rank == 0:
            taken_back = comm.irecv(source=1)
            kept = comm.irecv(source=1)
            assert taken_back.cancel()
            with pytest.raises(errors.RequestCancelled, match=r"recv\(source=1\)"):
                taken_back.wait()
            return int(kept.wait()[0])
        comm.sleep(1.0)
        comm.send(np.array([5]), dest=0)

    assert mesh(2).run(program).outputs[0] == 5


def test_a_cancelled_send_gives_the_array_back():
    def program(comm, x):
        if comm.rank == 0:
            assert comm.isend(x, dest=1).cancel()
            x += 1
            comm.send(x, dest=1)
        else:
            comm.sleep(1.0)
            return comm.recv(source=0)

    assert_array_equal(mesh(2).run(program, np.zeros(2)).outputs[1], [1, 1])


def test_a_message_under_way_cannot_be_cancelled():
    def program(comm):
        request = comm.isend(kilobyte(), dest=1) if comm.rank == 0 else comm.irecv(source=0)
        comm.sleep(LATENCY)
        refused = request.cancel()
        request.wait()
        return refused

    assert mesh(2).run(program).outputs == [False, False]


def test_a_polling_loop_ends_when_the_message_has_arrived():
    def program(comm):
        if comm.rank == 0:
            request = comm.irecv(source=1)
            while not request.test():
                pass
            return comm.now
        comm.sleep(1.0)
        comm.send(kilobyte(), dest=0)

    assert mesh(2).run(program).outputs[0] == pytest.approx(1.0 + KB_TIME, rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 5])
def test_all_ranks_may_poll_at_once(ranks):
    def program(comm):
        request = comm.ishift(kilobyte(comm.rank))
        while not request.test():
            pass
        return int(request.wait()[0]), comm.now

    run = mesh(ranks).run(program)
    assert [value for value, _ in run.outputs] == [(r - 1) % ranks for r in range(ranks)]
    assert [when for _, when in run.outputs] == pytest.approx([KB_TIME] * ranks, rel=1e-12)


def test_polling_for_what_nobody_sends_is_a_deadlock_and_ends():
    def program(comm):
        request = comm.irecv(source=1 - comm.rank)
        while not request.test():
            pass

    with pytest.raises(errors.DeadlockError, match="nobody sends"):
        mesh(2).run(program)


# ---- shape-only --------------------------------------------------------------------------------------------------


def test_shape_only_messages_have_shape_dtype_time_and_no_data():
    def program(comm, x):
        return comm.ishift((x[:, :2], x.T)).wait()

    cluster = mesh(3)
    numeric = cluster.run(program, np.ones((4, 5), np.float32))
    shapes = cluster.run(program, like((4, 5), np.float32))
    assert [(a.shape, a.dtype, a.strides) for a in shapes.outputs[0]] == [
        ((4, 2), np.float32, (0, 0)),
        ((5, 4), np.float32, (0, 0)),
    ]
    assert shapes.makespan == numeric.makespan
    assert shapes.traffic.total == numeric.traffic.total == 3 * 4 * (8 + 20)


def test_traffic_counts_each_message_once_by_pair_and_on_every_link_of_its_route():
    def program(comm, nbytes):
        if comm.rank == 0:
            comm.send(np.zeros(nbytes, np.uint8), dest=3)
        if comm.rank == 3:
            comm.recv(source=0)

    ring = Cluster(topology.ring(6, LINK), device=hardware.IDEAL)
    traffic = ring.run(program, per_rank([500] * 6)).traffic
    assert traffic.total == traffic.by_pair.sum() == traffic.by_pair[0, 3] == 500
    assert traffic.by_link == {(0, 1): 500, (1, 2): 500, (2, 3): 500}
