"""Faults against closed forms: when slow kernels, slow and dead links end; who hears of a crash; jitter by seed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import toolkit
from toolkit.runtime import Cluster, Cost, hardware, kernel, like, per_rank, topology, wait_any
from toolkit.runtime.errors import (
    DeadlockError,
    InvalidFault,
    LinkDown,
    PeerCrashed,
    RequestTimeout,
    RuntimeFault,
    UnreceivedMessage,
)
from toolkit.runtime.faults import Crash, DeadLink, Jitter, SlowDevice, SlowLink

LINK = hardware.Link(bandwidth=100.0, latency=0.5)  # 100 bytes a second: times are easy to do by hand
WIRE = hardware.Link(bandwidth=100.0)
SECOND = hardware.Device("a flop a second", flops=1.0, memory_bandwidth=float("inf"))


@kernel(cost=lambda x, seconds: Cost(seconds, 0), out=lambda x, seconds: like(x))
def work(x, seconds):
    return x + 1


def mesh(ranks, *faults, link=WIRE, device=SECOND):
    return Cluster(topology.full_mesh(ranks, link), device=device, faults=faults)


def one_kernel(comm, seconds, begin=0.0):
    comm.sleep(begin)
    work(np.zeros(0), seconds)
    return comm.now


def one_message(comm, nbytes=100):
    if comm.rank == 0:
        comm.send(like((nbytes,), np.uint8), dest=1)
    if comm.rank == 1:
        comm.recv(source=0)
    return comm.now


# ---- slow devices ------------------------------------------------------------------------------------------------


def test_kernels_of_a_slow_device_take_factor_times_as_long_and_those_of_others_do_not():
    assert mesh(3, SlowDevice(1, factor=4)).run(one_kernel, 2.0).outputs == [2, 8, 2]


@pytest.mark.parametrize(
    "begin, end",
    [
        (0.0, 2.0),  # over before the fault
        (2.0, 6.0),  # 1 s of work, then 1 s of work in 3 s
        (3.0, 9.0),  # 3 to 9 at a third of the speed
        (5.0, 9 + 2 / 3),  # 4/3 s of work in the 4 s until 9.0, the rest at full speed
        (9.0, 11.0),  # begins when the fault is over
    ],
)
def test_a_kernel_that_crosses_the_edge_of_a_slow_time_is_slow_in_that_part_only(begin, end):
    run = mesh(1, SlowDevice(0, factor=3, start=3.0, end=9.0)).run(one_kernel, 2.0, begin)
    assert run.makespan == pytest.approx(end, rel=1e-12)


def test_two_slow_times_of_one_device_multiply():
    faults = SlowDevice(0, factor=2), SlowDevice(0, factor=3, start=4.0)
    assert mesh(1, *faults).run(one_kernel, 3.0).makespan == pytest.approx(4 + 6, rel=1e-12)


def test_a_ring_is_as_slow_as_its_slowest_member():
    def program(comm, x):
        for _ in range(5):
            x = work(comm.ishift(x).wait(), 1.0)

    cluster = Cluster(topology.ring(4, WIRE), SECOND, faults=[SlowDevice(2, factor=3)])
    assert cluster.run(program, np.zeros(0)).makespan == pytest.approx(15.0, rel=1e-12)


# ---- slow and dead links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, end",
    [
        (SlowLink(0, 1, factor=4), 4.0),
        (SlowLink(0, 1, factor=4, start=0.25), 0.25 + 3.0),
        (SlowLink(0, 1, factor=4, start=0.25, end=1.25), 1.25 + 0.5),
        (SlowLink(0, 1, factor=4, start=7.0), 1.0),
        (SlowLink(1, 0, factor=4), 1.0),  # the other direction
        (DeadLink(0, 1, start=0.25, end=2.0), 2.75),
        (DeadLink(0, 1, end=3.0), 4.0),
        (DeadLink(0, 1, start=1.0), 1.0),  # the message has just arrived
    ],
)
def test_a_flow_moves_at_the_bandwidth_of_each_moment(fault, end):
    assert mesh(2, fault).run(one_message).makespan == pytest.approx(end, rel=1e-12)


def test_a_flapping_link_passes_bytes_while_it_is_up():
    flapping = [DeadLink(0, 1, start=t, end=t + 0.5) for t in (0.25, 1.0, 1.75)]  # up for 0.25 s between
    assert mesh(2, *flapping).run(one_message).makespan == pytest.approx(2.25 + 0.25, rel=1e-12)


def test_flows_share_anew_when_a_link_changes():
    """Two flows into one switch port: 50 B/s each until the sender's port of one falls to 20 B/s; the other gets 80."""

    def program(comm):
        if comm.rank:
            comm.send(like((100,), np.uint8), dest=0)
        else:
            first, second = comm.irecv(source=1), comm.irecv(source=2)
            first.wait()
            early = comm.now
            second.wait()
            return early

    cluster = Cluster(topology.switch(3, WIRE), SECOND, [SlowLink(2, "switch", factor=5, start=1.0)])
    run = cluster.run(program)
    assert run.outputs[0] == pytest.approx(1 + 50 / 80, rel=1e-12)
    assert run.makespan == pytest.approx(1 + 50 / 20, rel=1e-12)


def test_a_link_that_is_slow_before_its_first_message_is_slow_for_it():
    def program(comm):
        comm.sleep(5.0)
        one_message(comm)

    assert mesh(2, SlowLink(0, 1, factor=2, start=1.0)).run(program).makespan == pytest.approx(7.0, rel=1e-12)


def test_a_half_duplex_medium_is_slow_in_both_directions():
    bus = hardware.Link(bandwidth=100.0, duplex=False)
    assert mesh(2, SlowLink(1, 0, factor=2), link=bus).run(one_message).makespan == pytest.approx(2.0, rel=1e-12)


def test_a_change_after_the_last_message_does_not_prolong_the_run():
    assert mesh(2, SlowLink(0, 1, factor=2, start=50.0, end=90.0)).run(one_message).makespan == 1.0


def test_a_message_on_a_link_that_stays_dead_names_the_link_and_both_ranks():
    with pytest.raises(LinkDown) as error:
        mesh(2, DeadLink(0, 1, start=0.5)).run(one_message)
    for words in ("link 0 → 1 is dead", "rank 0   send(dest=1)", "rank 1   recv(source=0)", "test_faults.py:"):
        assert words in str(error.value)


def test_a_message_that_nobody_waits_for_is_missed_too():
    def program(comm):
        if comm.rank == 0:
            comm.isend(like((9,), np.uint8), dest=1)
        else:
            comm.irecv(source=0)

    with pytest.raises(LinkDown, match="link 0 → 1"):
        mesh(2, DeadLink(0, 1)).run(program)


def test_a_timeout_ends_the_wait_on_a_dead_link_and_the_rank_goes_on():
    def program(comm):
        if comm.rank == 0:
            request = comm.isend(like((100,), np.uint8), dest=1)
        else:
            request = comm.irecv(source=0)
        with pytest.raises(RequestTimeout):
            request.wait(timeout=3.0)
        assert comm.now == 3.0
        request.wait()

    assert mesh(2, DeadLink(0, 1, end=10.0)).run(program).makespan == pytest.approx(11.0, rel=1e-12)


# ---- crashes -----------------------------------------------------------------------------------------------------


def test_a_rank_that_waits_for_a_crashed_one_is_told_who_and_when():
    def program(comm):
        if comm.rank == 0:
            comm.recv(source=2)
        comm.sleep(9.0)

    with pytest.raises(PeerCrashed) as error:
        mesh(3, Crash(2, time=4.0)).run(program)
    told = "\n".join([str(error.value), *error.value.__notes__])
    for words in ("recv(source=2)", "rank 2, which crashed at 4 s", "raised on rank 0 at 4 s", "test_faults.py:"):
        assert words in told


@pytest.mark.parametrize("asks_at", [1.0, 6.0], ids=["before", "after"])
@pytest.mark.parametrize("operation", ["send", "recv", "sendrecv", "wait_any", "ishift"])
def test_the_others_catch_it_and_go_on(operation, asks_at):
    def ask(comm, x):
        if operation == "send":
            comm.send(x, dest=2)
        elif operation == "recv":
            comm.recv(source=2)
        elif operation == "sendrecv":
            comm.sendrecv(x, 2, 2)
        elif operation == "wait_any":
            wait_any([comm.irecv(source=2)])
        else:
            comm.ishift(x, by=1).wait()

    def program(comm, x):
        if comm.rank == 2:
            comm.sleep(99.0)
        comm.sleep(asks_at)
        if comm.rank == 0:
            with pytest.raises(PeerCrashed, match="rank 2, which crashed at 4 s"):
                ask(comm, x)
            assert comm.now == max(asks_at, 4.0)
        comm.sleep_until(10.0)
        return comm.group([0, 1]).all_reduce(x)

    run = mesh(3, Crash(2, time=4.0)).run(program, np.ones(2))
    assert run.outputs[2] is None
    assert_array_equal(run.outputs[:2], [[2, 2], [2, 2]])


@pytest.mark.parametrize(
    "wait",
    [
        lambda comm: comm.recv(),
        lambda comm: comm.split(0),
        lambda comm: comm.barrier(),
        lambda comm: comm.all_gather(np.zeros(3)),
    ],
    ids=["recv from anybody", "split", "barrier", "all_gather"],
)
def test_nothing_hangs_when_a_crash_leaves_nobody_to_wait_for(wait):
    def program(comm):
        if comm.rank == 1:
            comm.sleep(99.0)
        wait(comm)

    with pytest.raises(PeerCrashed, match=r"(?i)rank 1,? (which )?crashed at 4 s"):
        mesh(3, Crash(1, time=4.0)).run(program)


def test_a_crash_at_the_first_moment_leaves_nothing_of_the_rank():
    run = mesh(2, Crash(1, time=0.0)).run(lambda comm: work(np.zeros(1), 1.0))
    assert run.outputs[1] is None
    assert {event.rank for event in run.trace} == {0}


def test_a_crash_in_a_kernel_ends_the_rank_there_and_not_the_run():
    run = mesh(2, Crash(1, time=1.5)).run(lambda comm: [one_kernel(comm, 1.0) for _ in range(comm.rank * 8 + 1)])
    assert [event.rank for event in run.trace if event.kind == "compute"] == [0, 1]
    assert run.makespan == 1.5


def test_a_rank_that_has_returned_cannot_crash_and_the_clock_does_not_wait_for_it():
    run = mesh(2, Crash(1, time=50.0)).run(one_kernel, 2.0)
    assert run.outputs == [2.0, 2.0] and run.makespan == 2.0


def test_a_transfer_under_way_arrives():
    def program(comm, x):
        if comm.rank == 0:
            comm.send(x, dest=1)
        return comm.recv(source=0) if comm.rank == 1 else None

    run = mesh(2, Crash(0, time=0.5)).run(program, np.arange(100.0))
    assert_array_equal(run.outputs[1], np.arange(100.0))
    assert run.makespan == pytest.approx(8.0)


def test_cleaning_up_still_happens_on_the_rank_that_crashes():
    seen = []

    def program(comm):
        try:
            comm.sleep(9.0)
        finally:
            seen.append(comm.rank)

    mesh(2, Crash(0, time=1.0)).run(program)
    assert seen == [0, 1]


def test_a_deadlock_without_a_crash_keeps_its_name():
    with pytest.raises(DeadlockError):
        mesh(2, SlowDevice(0, factor=2)).run(lambda comm: comm.recv())


def test_a_forgotten_message_is_still_an_error_when_nobody_crashed():
    with pytest.raises(UnreceivedMessage):
        mesh(2, SlowDevice(0, factor=2)).run(lambda comm: comm.irecv() and None)


# ---- jitter ------------------------------------------------------------------------------------------------------


def durations(jitter, ranks=1, kernels=400):
    run = mesh(ranks, jitter).run(lambda comm: [work(np.zeros(0), 1.0) for _ in range(kernels)])
    return np.array([[e.end - e.start for e in run.trace if e.rank == rank] for rank in range(ranks)])


@pytest.mark.parametrize("kind, mean, smallest", [("lognormal", 1.0, 0.0), ("pareto", 1.2, 1.0)])
def test_jitter_multiplies_kernels_by_factors_of_the_mean_that_is_written(kind, mean, smallest):
    found = durations(Jitter(seed=3, sigma=0.2, kind=kind), kernels=4000)
    assert found.mean() == pytest.approx(mean, rel=0.03)
    assert found.min() >= smallest - 1e-9 and found.std() > 0.1


def test_lognormal_factors_are_those_of_the_seed_and_the_rank():
    expected = np.exp(0.3 * np.random.default_rng((7, 1, 0)).standard_normal(50) - 0.3**2 / 2)
    np.testing.assert_allclose(durations(Jitter(seed=7, sigma=0.3), ranks=2, kernels=50)[1], expected, rtol=1e-9)


def test_two_ranks_and_two_seeds_draw_different_factors():
    a, b = durations(Jitter(seed=1, sigma=0.2), ranks=2), durations(Jitter(seed=2, sigma=0.2), ranks=2)
    assert len(np.unique(np.concatenate([a, b])[:, 0])) == 4


def test_jitter_of_messages_multiplies_their_latency_only():
    def program(comm):
        for _ in range(20):
            one_message(comm, nbytes=0)
            one_message(comm, nbytes=100)

    run = mesh(2, Jitter(seed=5, sigma=0.4, kernels=False, messages=True), link=LINK).run(program)
    taken = np.array([e.end - e.start for e in run.trace if e.kind == "send"]) - np.tile([0.0, 1.0], 20)
    random = np.random.default_rng((5, 0, 1))
    np.testing.assert_allclose(taken, 0.5 * random.lognormal(-0.08, 0.4, size=40), rtol=1e-9)


JITTERED = """
import numpy as np
from toolkit.runtime import Cluster, hardware, topology
from toolkit.runtime.faults import *
from toolkit.sequence_parallel import ring_attention
from toolkit.runtime import like, shard
faults = [Jitter(11, 0.3, "pareto", messages=True), SlowDevice(1, 2.0), DeadLink(0, 1, 1e-5, 2e-5), SlowLink(2, 3, 3.0)]
q = like((2, 4096, 64), np.float16)
cluster = Cluster(topology.ring(4, hardware.PCIE4), hardware.H100, faults)
print(cluster.run(ring_attention.attention, *[shard(q, axis=1)] * 3).trace)
"""


def test_the_same_seed_gives_the_same_trace_in_two_processes():
    root = Path(toolkit.__file__).parents[1]
    outputs = [
        subprocess.run([sys.executable, "-c", JITTERED], cwd=root, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1] and outputs[0].count("\n") > 20


# ---- all together ------------------------------------------------------------------------------------------------


def exchange(comm, x):
    for _ in range(4):
        x = work(comm.all_reduce(x) / comm.size, 1e-3)
    return x


ALL = SlowDevice(1, 3.0), SlowLink(0, 1, 5.0), DeadLink(1, 2, 0.5, 1.0), Jitter(4, 0.5, "pareto", messages=True)


def test_faults_of_time_change_no_number():
    x = per_rank([np.random.default_rng(rank).normal(size=40) for rank in range(4)])
    sound, faulty = mesh(4).run(exchange, x), mesh(4, *ALL).run(exchange, x)
    assert_array_equal(sound.outputs, faulty.outputs)
    assert faulty.makespan > sound.makespan and faulty.traffic.total == sound.traffic.total


@pytest.mark.parametrize(
    "idle",
    [SlowDevice(0, 1.0), SlowLink(0, 1, 1.0, start=1.0), DeadLink(0, 1, start=1e6), Crash(0, 1e6), Jitter(0, 0.0)],
    ids=lambda fault: type(fault).__name__,
)
def test_a_fault_that_does_nothing_leaves_the_trace_as_it_is(idle):
    assert repr(mesh(4, idle).run(exchange, np.ones(40)).trace) == repr(mesh(4).run(exchange, np.ones(40)).trace)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: mesh(2, SlowDevice(2, 2.0)), "has ranks 0 … 1"),
        (lambda: mesh(2, Crash(-1, 2.0)), "has ranks 0 … 1"),
        (lambda: mesh(2, DeadLink(0, 0)), "has no such link"),
        (lambda: mesh(2, SlowLink(0, "switch", 2.0)), "has no such link"),
        (lambda: mesh(2, "slow"), "'slow' is no fault"),
        (lambda: SlowDevice(0, 0.0), "above 0"),
        (lambda: SlowLink(0, 1, float("nan")), "above 0"),
        (lambda: DeadLink(0, 1, 2.0, 2.0), "before end"),
        (lambda: SlowDevice(0, 2.0, start=-1.0), "at least 0 s"),
        (lambda: Crash(0, float("inf")), "finite"),
        (lambda: Jitter(0, -0.1), "sigma"),
        (lambda: Jitter(0, 0.1, "normal"), "'lognormal' or 'pareto'"),
        (lambda: Jitter(0.5, 0.1), "seed"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused_by_name(make, words):
    with pytest.raises(InvalidFault, match=words) as error:
        make()
    assert isinstance(error.value, (RuntimeFault, ValueError))
