"""Each feature once, in three seconds: what to run before every commit, by `make tiny`."""

import numpy as np
import pytest

from toolkit.classroom import NotYet, check
from toolkit.runtime import Cluster, Cost, errors, hardware, kernel, like, shard, topology
from toolkit.systems import systems

LINK = hardware.Link(bandwidth=1e9, latency=1e-6)
X = np.arange(32.0).reshape(4, 8)  # 4 rows of 64 bytes


def ring(ranks, device=hardware.IDEAL):
    return Cluster(topology.ring(ranks, LINK), device=device)


def shift(comm, x):
    return comm.ishift(x, by=1).wait()


@kernel(cost=lambda x: Cost(flops=x.size, bytes=0), out=lambda x: like(x))
def double(x):
    return 2 * x


def test_a_message_takes_its_latency_and_its_bytes_over_the_bandwidth():
    assert ring(4).run(shift, shard(X, axis=0)).makespan == pytest.approx(1e-6 + 64 / 1e9)


def test_messages_arrive_at_the_next_rank():
    assert np.array_equal(ring(4).run(shift, shard(X, axis=0)).gather(axis=0), np.roll(X, 1, axis=0))


def test_bytes_are_counted_once_a_message():
    assert ring(4).run(shift, shard(X, axis=0)).traffic.total == X.nbytes


def test_a_shape_only_run_takes_the_same_time():
    numeric, shapes = (ring(4).run(shift, shard(x, axis=0)) for x in (X, like(X)))
    assert numeric.makespan == shapes.makespan


def test_a_kernel_advances_the_clock_by_its_cost():
    device = hardware.Device("slow", flops=8e6, memory_bandwidth=1e12, memory_capacity=1e9)
    assert ring(4, device).run(lambda comm, x: double(x), shard(X, axis=0)).makespan == pytest.approx(1e-6)


def test_all_reduce_adds():
    run = ring(4).run(lambda comm, x: comm.all_reduce(x), shard(X, axis=0))
    assert np.array_equal(run.outputs[2], X.sum(axis=0, keepdims=True))


def test_a_deadlock_is_an_error():
    with pytest.raises(errors.DeadlockError):
        ring(2).run(lambda comm: comm.recv(source=1 - comm.rank))


def test_a_check_names_its_question():
    with pytest.raises(NotYet, match="Two"), check("1. Two") as answer:
        answer(lambda: None)


def test_systems_are_found():
    assert "token_ring" in [system.name for system in systems()]
