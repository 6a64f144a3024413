"""Virtual time, streams, determinism, shape-only runs and the count of memory, on programs to be done by hand."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import toolkit
from toolkit.runtime import Cluster, Cost, errors, hardware, is_shape_only, kernel, like, per_rank, shard, topology

LATENCY, BANDWIDTH = 2e-6, 1e9
LINK = hardware.Link(bandwidth=BANDWIDTH, latency=LATENCY)
TERA = 1e12
DEVICE = hardware.Device(
    "by hand",
    flops={"float16": 4 * TERA, "float32": 2 * TERA, "int8": 8 * TERA},
    memory_bandwidth=0.1 * TERA,
    launch_overhead=3e-6,
)


def mesh(ranks, device=hardware.IDEAL):
    return Cluster(topology.full_mesh(ranks, LINK), device=device)


@kernel(cost=lambda x, flops=0.0, nbytes=0.0, dtype=None: Cost(flops, nbytes, dtype), out=lambda x, *_, **__: like(x))
def work(x, flops=0.0, nbytes=0.0, dtype=None):
    """A kernel that costs what one says."""
    return x + 1


SECOND = hardware.Device("a flop a second", flops=1.0, memory_bandwidth=float("inf"))


def compute(seconds):
    """Occupy the compute engine of SECOND."""
    work(np.zeros(0), flops=seconds)


# ---- the time of a kernel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, rate",
    [("float16", 4 * TERA), ("float32", 2 * TERA), ("int8", 8 * TERA), ("float64", 2 * TERA), ("complex64", 2 * TERA)],
)
def test_compute_bound_time_is_overhead_plus_flops_over_the_rate_of_the_dtype(dtype, rate):
    run = mesh(1, DEVICE).run(lambda comm, x: work(x, flops=1e9), np.zeros(2, dtype))
    assert run.makespan == pytest.approx(3e-6 + 1e9 / rate, rel=1e-12)


@pytest.mark.parametrize("flops, nbytes, body", [(0, 1e8, 1e-3), (2e9, 1e8, 1e-3), (4e9, 1e8, 2e-3), (0, 0, 0)])
def test_time_is_the_larger_of_compute_and_memory(flops, nbytes, body):
    run = mesh(1, DEVICE).run(lambda comm, x: work(x, flops, nbytes), np.zeros(2, np.float32))
    assert run.makespan == pytest.approx(3e-6 + body, rel=1e-12)


def test_a_cost_may_name_the_dtype_whose_rate_applies():
    run = mesh(1, DEVICE).run(lambda comm, x: work(x, 1e9, dtype="float16"), np.zeros(2, np.float32))
    assert run.makespan == pytest.approx(3e-6 + 1e9 / (4 * TERA), rel=1e-12)


@pytest.mark.parametrize("flops, nbytes, body", [(2e9, 0, 2e-3), (0, 1e8, 4e-3)])
def test_efficiencies_stretch_the_time(flops, nbytes, body):
    device = replace(DEVICE, compute_efficiency=0.5, memory_efficiency=0.25)
    run = mesh(1, device).run(lambda comm, x: work(x, flops, nbytes), np.zeros(2, np.float32))
    assert run.makespan == pytest.approx(3e-6 + body, rel=1e-12)


def test_kernels_of_one_rank_follow_one_another_and_are_in_the_trace():
    def program(comm, x):
        work(work(x, flops=2e9), nbytes=5e8)

    run = mesh(1, DEVICE).run(program, np.zeros(2, np.float32))
    first, second = run.trace
    assert (first.rank, first.stream, first.kind, first.name, first.peer) == (0, "compute", "compute", "work", -1)
    assert (first.start, first.flops, second.bytes) == (0.0, 2e9, 5e8)
    assert first.end == pytest.approx(1.003e-3, rel=1e-12)
    assert second.start == first.end
    assert second.end == run.makespan == pytest.approx(1.003e-3 + 5.003e-3, rel=1e-12)


def test_ranks_compute_at_once_each_on_its_own_device():
    cluster = Cluster(topology.full_mesh(2, LINK), device=[SECOND, replace(SECOND, flops=4.0)])

    def program(comm):
        compute(2.0)
        return comm.now

    assert cluster.run(program).outputs == [2.0, 0.5]


def test_devices_must_be_one_or_one_a_rank():
    with pytest.raises(errors.ShapeError, match=r"2 devices .* 3 ranks"):
        Cluster(topology.full_mesh(3, LINK), device=[SECOND, SECOND])


def test_outside_a_cluster_a_kernel_is_just_its_function():
    assert_array_equal(work(np.zeros(3), flops=1e30), [1, 1, 1])
    assert is_shape_only(work(like(3), flops=1e30))
    assert work.__name__ == "work" and "costs what one says" in work.__doc__


def test_a_kernel_inside_a_kernel_costs_nothing_more():
    @kernel(cost=lambda x: Cost(1.0, 0.0))
    def twice(x):
        return work(work(x, flops=5.0), flops=5.0)

    assert mesh(1, SECOND).run(lambda comm: twice(np.zeros(1))).makespan == 1.0


def test_numerics_run_once_and_shape_only_not_at_all():
    calls = []

    @kernel(cost=lambda x: Cost(1.0, 0.0), out=lambda x: like(x))
    def counted(x):
        calls.append(1)
        return x

    assert mesh(2, SECOND).run(lambda comm, x: counted(x), like(4)).makespan == 1.0
    assert calls == []
    mesh(2, SECOND).run(lambda comm, x: counted(x), np.zeros(4))
    assert len(calls) == 2


def test_a_kernel_may_declare_its_result_by_a_shape():
    @kernel(cost=lambda x: Cost(), out=lambda x: (2, x.size))
    def two_rows(x):
        return np.stack([x, x])

    got = mesh(1).run(lambda comm, x: two_rows(x), like(5, np.float32)).outputs[0]
    assert (got.shape, got.dtype, is_shape_only(got)) == ((2, 5), np.float32, True)


# ---- sleeping, sub-tasks, streams --------------------------------------------------------------------------------


def test_sleep_lets_time_pass_and_a_time_that_has_passed_is_now():
    def program(comm):
        comm.sleep(2.0)
        comm.sleep_until(1.0)
        comm.sleep(0.0)
        return comm.now

    assert mesh(2).run(program).outputs == [2.0, 2.0]


def test_ranks_that_wake_at_one_instant_go_on_in_rank_order():
    went_on = []

    def program(comm):
        comm.sleep(comm.size - comm.rank)  # the last rank goes to sleep first
        comm.sleep_until(10.0)
        went_on.append(comm.rank)

    mesh(5).run(program)
    assert went_on == [0, 1, 2, 3, 4]


def test_a_sub_task_runs_beside_the_program_and_gives_its_result():
    def program(comm):
        def listen(seconds, *, answer):
            comm.sleep(seconds)
            return answer

        request = comm.spawn(listen, 2.0, answer=42)
        comm.sleep(1.5)
        return comm.now, request.wait(), comm.now

    assert mesh(1).run(program).outputs == [(1.5, 42, 2.0)]


def test_the_run_lasts_until_its_last_sub_task_ends():
    assert mesh(1).run(lambda comm: comm.spawn(comm.sleep, 3.0) and None).makespan == 3.0


@pytest.mark.parametrize("how", ["sub-task", "stream"])
def test_kernels_of_one_device_take_turns(how):
    def program(comm):
        if how == "stream":
            with comm.stream("side") as side:
                compute(1.0)
            compute(2.0)
            side.wait()
        else:
            other = comm.spawn(compute, 1.0)
            compute(2.0)
            other.wait()
        return comm.now

    run = mesh(1, SECOND).run(program)
    assert run.outputs == [3.0]
    busy = sorted((e.start, e.end) for e in run.trace if e.kind == "compute")
    assert all(first[1] <= second[0] for first, second in pairwise(busy))


def test_work_on_a_stream_is_done_in_order_while_the_program_goes_on():
    def program(comm):
        with comm.stream("side") as side:
            compute(1.0)
            compute(1.0)
        queued_at = comm.now
        side.wait()
        return queued_at, comm.now

    run = mesh(1, SECOND).run(program)
    assert run.outputs == [(0.0, 2.0)]
    assert {e.stream for e in run.trace if e.kind == "compute"} == {"side"}


def test_a_message_on_a_stream_waits_for_the_kernel_before_it():
    def program(comm):
        if comm.rank == 0:
            with comm.stream("copy") as copy:
                packed = work(np.zeros(125), flops=1.0)  # 1 kB
                comm.isend(packed, dest=1)
            copy.wait()
        else:
            comm.recv(source=0)
        return comm.now

    assert mesh(2, SECOND).run(program).outputs == pytest.approx([1.0 + LATENCY + 1e-6] * 2, rel=1e-12)


@pytest.mark.parametrize("kernel_time, expected", [(0.5, 1.0), (1.0, 1.0), (2.0, 2.0)])
def test_transfers_overlap_compute(kernel_time, expected):
    def program(comm):
        request = comm.ishift(np.zeros(1), by=1)
        compute(kernel_time)
        request.wait()

    slow = hardware.Link(bandwidth=8.0)  # a float64 takes a second
    run = Cluster(topology.full_mesh(2, slow), device=SECOND).run(program)
    assert run.makespan == expected
    assert run.exposed() == expected - kernel_time


@pytest.mark.parametrize(
    "kernel_time, slowdown, expected",
    [(2.0, 0.0, 2.0), (2.0, 0.25, 2.25), (0.5, 0.5, 1.0), (2.0, 0.5, 2.5)],
    ids=["no contention", "a quarter lost for 1 s", "hidden behind the transfer", "half lost for 1 s"],
)
def test_compute_is_slower_while_a_transfer_touches_the_device(kernel_time, slowdown, expected):
    def program(comm):
        request = comm.ishift(np.zeros(1), by=1)  # takes a second
        compute(kernel_time)
        request.wait()

    device = replace(SECOND, overlap_slowdown=slowdown)
    run = Cluster(topology.full_mesh(2, hardware.Link(bandwidth=8.0)), device=device).run(program)
    assert run.makespan == pytest.approx(expected, rel=1e-9)


def test_a_transfer_between_others_does_not_slow_a_device_down():
    def program(comm):
        if comm.rank == 2:
            compute(2.0)
        else:
            comm.sendrecv(np.zeros(1), 1 - comm.rank, 1 - comm.rank)
        return comm.now

    device = replace(SECOND, overlap_slowdown=0.5)
    run = Cluster(topology.full_mesh(3, hardware.Link(bandwidth=8.0)), device=device).run(program)
    assert run.outputs == [1.0, 1.0, 2.0]


def test_time_after_a_slowed_kernel_is_whole_though_a_transfer_ended_with_it():
    def program(comm):
        request = comm.ishift(np.zeros(1), by=1)  # ends at 1 s, as the kernel does: 0.5 s at half speed
        compute(0.5)
        before = comm.now
        comm.sleep(1.0)
        request.wait()
        return comm.now - before

    device = replace(SECOND, overlap_slowdown=0.5)
    run = Cluster(topology.full_mesh(2, hardware.Link(bandwidth=8.0)), device=device).run(program)
    assert run.outputs == pytest.approx([1.0, 1.0], rel=1e-9)


def test_exposed_communication_is_what_a_rank_waited():
    def program(comm):
        if comm.rank == 0:
            comm.sleep(3.0)
            comm.send(np.zeros(0), dest=1)
        else:
            comm.recv(source=0)

    run = mesh(2).run(program)
    assert run.exposed(1) == run.exposed() == 3.0 + LATENCY
    assert run.exposed(0) == pytest.approx(LATENCY, rel=1e-9)


def test_sub_tasks_that_wait_at_once_and_waits_beside_a_kernel_are_not_exposed_twice():
    def program(comm):
        if comm.rank == 0:
            comm.sleep(3.0)
            comm.send(np.zeros(0), dest=1, tag="a")
            comm.send(np.zeros(0), dest=1, tag="b")
        else:
            tasks = [comm.spawn(comm.recv, 0, tag) for tag in "ab"]  # both wait for 3 s and more
            compute(1.0)
            for task in tasks:
                task.wait()

    run = mesh(2, SECOND).run(program)
    assert run.exposed(1) == pytest.approx(2.0 + 2 * LATENCY, rel=1e-9)


def test_events_of_one_rank_and_stream_never_overlap():
    def program(comm):
        requests = [comm.irecv(source=r) for r in range(comm.size) if r != comm.rank]
        requests += [comm.isend(np.zeros(100 * (r + 1)), dest=r) for r in range(comm.size) if r != comm.rank]
        for request in requests:
            request.wait()

    rows = {}
    for event in mesh(5).run(program).trace:
        rows.setdefault((event.rank, event.stream), []).append(event)
    assert {"send", "send 2", "send 3", "send 4"} <= {stream for _, stream in rows}
    for events in rows.values():
        assert all(a.end <= b.start for a, b in pairwise(events))


# ---- the same program, again and without data --------------------------------------------------------------------


def ring(comm, x):
    """Pass a block round; add up what passes."""
    total, passing = work(x, flops=1e6), x
    for _ in range(comm.size - 1):
        request = comm.ishift(passing)
        total = work(total, nbytes=3 * total.nbytes)
        passing = request.wait()
    return total


def all_collectives(comm, x):
    """One of each, one after another."""
    x = comm.all_reduce(x)
    part = comm.reduce_scatter(x[: x.shape[0] // comm.size * comm.size], algorithm="recursive_halving")
    whole = comm.all_gather(part, axis=1, algorithm="recursive_doubling")
    comm.barrier()
    x = comm.broadcast(comm.all_reduce(x, algorithm="recursive_doubling"), root=comm.size - 1)
    gathered = comm.gather(x, root=0)
    return whole, comm.scatter(gathered, root=0), comm.reduce(x)


def streams_and_tasks(comm, x):
    """Two streams, a sub-task, a collective under way, a part of the ranks."""
    with comm.stream("copy") as copy:
        packed = work(x, flops=3e8)
        sent = comm.isend(packed, dest=(comm.rank + 1) % comm.size, tag="copies")
    got = comm.irecv(source=(comm.rank - 1) % comm.size, tag="copies")
    under_way = comm.iall_reduce(x)
    other = comm.spawn(work, x, flops=1e9)
    part = comm.split(comm.rank % 2, key=-comm.rank)
    summed = part.all_reduce(work(x, nbytes=1e6))
    copy.wait()
    sent.wait()
    return got.wait(), under_way.wait(), other.wait(), summed


def views_and_tuples(comm, x):
    """Views are sent, wire types differ, names are rebound."""
    k, v = work(x), work(x)
    for step in range(3):
        k, (v, _) = comm.ishift((k[1:].T, (v, x[:0])), by=step + 1, wire=(np.float16, None)).wait()
        k = work(k.T.reshape(-1, x.shape[1]))
    return k, v


def parts_of_any_size(comm, x):
    """Uneven all-to-all, after which every rank has its own amount of work."""
    received = comm.all_to_all([x[: (comm.rank * j) % 3] for j in range(comm.size)])
    for part in received:
        work(part, flops=1e6 * part.size)
    return received


PROGRAMS = [ring, all_collectives, streams_and_tasks, views_and_tuples, parts_of_any_size]
TOPOLOGIES = {
    "mesh": topology.full_mesh(6, LINK),
    "ring": topology.ring(6, LINK),
    "pcie": topology.pcie_tree(2, 3, LINK),
    "two level": topology.two_level(2, 3, LINK, replace(LINK, bandwidth=0.1 * BANDWIDTH)),
}
BLOCK = np.ones((12, 4), np.float32)


def everything(run):
    """All that a run tells but its values, as bytes."""
    memory = [tuple(map(tuple, run.memory(rank))) for rank in range(run.cluster.size)]
    return repr((run.makespan, run.peak_memory, run.traffic.by_pair.tolist(), list(run.trace), memory)).encode()


@pytest.mark.parametrize("machine", TOPOLOGIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_program_gives_the_same_bytes_twice(program, machine):
    cluster = Cluster(TOPOLOGIES[machine], device=hardware.A10)
    assert everything(cluster.run(program, BLOCK)) == everything(cluster.run(program, BLOCK))


@pytest.mark.parametrize("machine", TOPOLOGIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_without_data_has_the_same_times_bytes_memory_and_trace(program, machine):
    cluster = Cluster(TOPOLOGIES[machine], device=hardware.A10)
    numeric, shapes = cluster.run(program, BLOCK), cluster.run(program, like(BLOCK))
    assert shapes.makespan == numeric.makespan > 0
    assert shapes.traffic.total == numeric.traffic.total > 0
    assert_array_equal(shapes.traffic.by_pair, numeric.traffic.by_pair)
    assert shapes.traffic.by_link == numeric.traffic.by_link
    assert shapes.peak_memory == numeric.peak_memory
    assert list(shapes.trace) == list(numeric.trace)


def test_two_processes_with_other_hash_seeds_give_the_same_bytes():
    def told(seed):
        home = str(Path(toolkit.__file__).parents[1])
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": home}
        return subprocess.run(
            [sys.executable, __file__], env=environment, capture_output=True, check=True, timeout=120
        ).stdout

    first, second = told(1), told(2)
    assert first == second
    assert len(first) > 10_000


TINY = """\
0 compute    work     0.0 1.0 bytes=0   peer=-1 posted=0.0
1 compute    work     0.0 2.0 bytes=0   peer=-1 posted=0.0
0 wait       rows     1.0 4.0 bytes=0   peer=-1 posted=1.0
0 rows recv  rows     2.0 4.0 bytes=16  peer=1 posted=1.0
0 rows send  rows     2.0 4.0 bytes=16  peer=1 posted=1.0
1 rows recv  rows     2.0 4.0 bytes=16  peer=0 posted=2.0
1 rows send  rows     2.0 4.0 bytes=16  peer=0 posted=2.0
1 wait       rows     2.0 4.0 bytes=0   peer=-1 posted=2.0
0 compute    work     4.0 4.5 bytes=0   peer=-1 posted=4.0
1 compute    work     4.0 4.5 bytes=0   peer=-1 posted=4.0
"""


def test_the_trace_of_a_tiny_run_is_this_text():
    def program(comm, x):
        work(x, flops=1.0 + comm.rank)
        got = comm.ishift(x, tag="rows").wait()  # 16 bytes at 8 bytes a second
        work(got, flops=0.5)

    run = Cluster(topology.full_mesh(2, hardware.Link(bandwidth=8.0)), device=SECOND).run(program, np.zeros(2))
    rows = [
        f"{e.rank} {e.stream:<10} {e.name:<8} {e.start} {e.end} bytes={e.bytes:<3} peer={e.peer} posted={e.posted}\n"
        for e in run.trace
    ]
    assert "".join(rows) == TINY


def test_another_program_gives_other_bytes():
    cluster = mesh(6, hardware.A10)
    assert everything(cluster.run(ring, BLOCK)) != everything(cluster.run(ring, BLOCK[:11]))


# ---- memory ------------------------------------------------------------------------------------------------------


def bytes_of(n):
    return np.zeros(n, np.uint8)


@pytest.mark.parametrize("block", [bytes_of(1000), like(1000, np.uint8)], ids=["numeric", "shape-only"])
class TestPeakMemory:
    """Every number below is counted by hand; x is an argument of 1000 bytes a rank."""

    def peak(self, program, block, ranks=1):
        run = mesh(ranks).run(program, block)
        assert len(set(run.peak_memory)) == 1
        return run.peak_memory[0]

    def test_arguments_count(self, block):
        assert self.peak(lambda comm, x: None, block) == 1000

    def test_a_result_counts_beside_its_argument(self, block):
        def program(comm, x):
            y = work(x)
            return x, y

        assert self.peak(program, block) == 2000

    def test_a_rebound_name_frees_its_array(self, block):
        def program(comm, x):
            for _ in range(5):
                x = work(x)  # old and new live at once, never more
            return x

        assert self.peak(program, block) == 2000

    def test_a_name_that_is_kept_does_not(self, block):
        def program(comm, x):
            y = work(x)
            z = work(y)
            return x, y, z

        assert self.peak(program, block) == 3000

    def test_del_frees(self, block):
        def program(comm, x):
            y = work(x)
            del x, y
            return work(np.zeros(0)) if not is_shape_only(block) else work(like(0))

        assert self.peak(program, block) == 2000

    def test_views_cost_nothing(self, block):
        def program(comm, x):
            views = [x[::2], x.reshape(10, 100).T, x[None]]
            return work(views[0])

        assert self.peak(program, block) == 1500

    def test_a_kernel_that_returns_its_argument_adds_nothing(self, block):
        @kernel(cost=lambda x: Cost(), out=lambda x: x)
        def same(x):
            return x

        assert self.peak(lambda comm, x: same(x), block) == 1000

    def test_a_kernel_that_returns_a_view_of_its_argument_adds_nothing(self, block):
        @kernel(cost=lambda x: Cost(), out=lambda x: x[:500])
        def first_half(x):
            return x[:500]

        assert self.peak(lambda comm, x: (x, first_half(x)), block) == 1000

    def test_a_receive_counts_from_the_start_of_its_transfer(self, block):
        def program(comm, x):
            for _ in range(3):
                x = comm.ishift(x).wait()
            return x

        assert self.peak(program, block, ranks=3) == 2000

    def test_two_blocks_under_way_are_two_blocks(self, block):
        def program(comm, x):
            requests = [comm.ishift(x, tag=tag) for tag in (1, 2)]
            got = [request.wait() for request in requests]
            return x, got

        assert self.peak(program, block, ranks=2) == 3000

    def test_a_ring_all_gather_holds_its_parts_and_their_join(self, block):
        assert self.peak(lambda comm, x: comm.all_gather(x), block, ranks=4) == 1000 + 3 * 1000 + 4000

    def test_a_tuple_counts_each_array_once(self, block):
        @kernel(cost=lambda x: Cost(), out=lambda x: (like(x), (like(x[:500]), x)))
        def pair(x):
            return x + 1, (x[:500] + 1, x)

        assert self.peak(lambda comm, x: pair(x), block) == 2500


def test_memory_over_time_is_a_step_function_that_ends_with_what_is_returned():
    def program(comm, x):
        y = work(x, flops=1.0)
        del x
        z = work(y[:100], flops=1.0)
        del y
        comm.sleep(1.0)
        return z

    run = mesh(1, SECOND).run(program, bytes_of(1000))
    times, live = run.memory(0)
    assert live.max() == run.peak_memory[0] == 2000
    assert live[times <= 0.0][-1] == 2000
    assert live[times <= 1.0].tolist()[-2:] == [1000, 1100]
    assert live[-1] == 100
    assert (np.diff(times) >= 0).all()


def test_each_rank_counts_its_own_arrays():
    run = mesh(3).run(lambda comm, x: work(x), shard(bytes_of(7)))
    assert run.peak_memory == [6, 4, 4]


def test_arrays_of_an_earlier_run_count_as_arguments_of_the_next():
    cluster = mesh(2)
    first = cluster.run(lambda comm, x: (work(x), x), bytes_of(50))
    assert cluster.run(lambda comm, x: work(x), first.output(0)).peak_memory == [100, 100]
    assert cluster.run(lambda comm, x: None, per_rank([bytes_of(3), bytes_of(4)])).peak_memory == [3, 4]


def test_arguments_are_copies_and_the_callers_array_stays_as_it_is():
    x = bytes_of(4)

    def program(comm, mine):
        mine[:] = comm.rank + 1
        return mine

    assert [int(got[0]) for got in mesh(2).run(program, x).outputs] == [1, 2]
    assert x.tolist() == [0, 0, 0, 0]


if __name__ == "__main__":  # a second process tells what it sees
    for told in PROGRAMS:
        print(everything(Cluster(TOPOLOGIES["two level"], device=hardware.A10).run(told, BLOCK)))
