"""Mistakes teach: every misuse that the vocabulary can express is named, with rank, operation, source line and advice.

Each case is one small program with a wrong and a right form. A line marked `# here` must be in the message by number.
The kinds follow the MPI Bugs Initiative (Laurent, Saillard and Quinson 2021): calls in a wrong order, unmatched calls,
invalid and mismatched arguments, requests and buffers used too early, resources exceeded.
"""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

import toolkit
from toolkit.runtime import Cluster, Cost, errors, hardware, kernel, like, topology, wait_all, wait_any
from toolkit.runtime.errors import (
    BufferInUse,
    CollectiveMismatch,
    DeadlockError,
    DtypeError,
    OutOfDeviceMemory,
    RequestCancelled,
    RequestTimeout,
    RuntimeFault,
    ShapeError,
    UnknownRank,
    UnreceivedMessage,
)
from toolkit.runtime.requests import site_text

ROOT = Path(toolkit.__file__).parents[1]
LINK = hardware.Link(bandwidth=1e9, latency=2e-6)


def mesh(ranks, device=hardware.IDEAL):
    return Cluster(topology.full_mesh(ranks, LINK), device=device)


def told(error):
    """All that a reader sees: the message and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def lines_marked(program):
    """Numbers of the lines of `program` marked `# here`."""
    source, first = inspect.getsourcelines(program)
    return [first + i for i, line in enumerate(source) if line.rstrip().endswith("# here")]


CASES = {}


def case(error, *words, ranks=2):
    """Register a program(comm, wrong): its wrong form raises `error` with `words` in what it tells."""

    def register(program):
        CASES[program.__name__.replace("_", " ")] = (program, error, words, ranks)
        return program

    return register


def every(select):
    return pytest.mark.parametrize("program, error, words, ranks", CASES.values(), ids=CASES)(select)


# ---- nobody can go on --------------------------------------------------------------------------------------------


@case(
    DeadlockError,
    "both ranks wait to receive and nobody sends",
    "rank 0   recv(source=1)",
    "rank 1   recv(source=0)",
    "isend",
)
def both_receive_first(comm, wrong):
    if comm.rank == 0:
        if not wrong:
            comm.send(np.zeros(1), dest=1)
        comm.recv(source=1)  # here
    else:
        comm.recv(source=0)  # here
        if not wrong:
            comm.send(np.zeros(1), dest=0)


@case(DeadlockError, "both ranks wait to send and nobody receives", "send(dest=1)", "send(dest=0)", "isend", "ishift")
def both_send_first(comm, wrong):
    other = 1 - comm.rank
    if wrong:
        comm.send(np.zeros(1), dest=other)  # here
        comm.recv(source=other)
    else:
        sent = comm.isend(np.zeros(1), dest=other)
        comm.recv(source=other)
        sent.wait()


@case(DeadlockError, "5 of 5 ranks wait to send", "rank 4   send(dest=0)", ranks=5)
def a_ring_of_sends(comm, wrong):
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if wrong:
        comm.send(np.zeros(1), dest=after)  # here
        comm.recv(source=before)
    else:
        comm.sendrecv(np.zeros(1), after, before)


@case(DeadlockError, "rank 0   send(dest=0)")
def a_send_to_oneself(comm, wrong):
    if wrong and comm.rank == 0:
        comm.send(np.zeros(1), dest=0)  # here
    elif not wrong:
        comm.sendrecv(np.zeros(1), comm.rank, comm.rank)


@case(DeadlockError, "send(dest=1, tag='keys')", "recv(source=0, tag='values')")
def two_names_for_one_channel(comm, wrong):
    if comm.rank == 0:
        comm.send(np.zeros(1), dest=1, tag="keys")  # here
    else:
        comm.recv(source=0, tag="values" if wrong else "keys")  # here


@case(DeadlockError, "rank 1   send(dest=0)", "rank 0   recv(source=2)", ranks=3)
def a_receive_from_the_wrong_rank(comm, wrong):
    if comm.rank == 0:
        comm.recv(source=2 if wrong else 1)  # here
    if comm.rank == 1:
        comm.send(np.zeros(1), dest=0)  # here


@case(DeadlockError, "1 of 3 ranks wait", "rank 2   recv(source=ANY)", ranks=3)
def a_receive_from_anybody_when_all_have_left(comm, wrong):
    if comm.rank == 2:
        comm.recv()  # here
    if comm.rank == 0 and not wrong:
        comm.send(np.zeros(1), dest=2)


@case(DeadlockError, "wait_any of", "recv(source=1, tag=1)", "recv(source=1, tag=2)")
def a_wait_for_any_of_what_never_comes(comm, wrong):
    if comm.rank == 0:
        requests = [comm.irecv(source=1, tag=tag) for tag in (1, 2)]
        wait_any(requests)  # here
        requests[1].cancel()
    elif not wrong:
        comm.send(np.zeros(1), dest=0, tag=1)


@case(DeadlockError, "in barrier", "rank 0", ranks=2)
def a_rank_that_skips_a_barrier(comm, wrong):
    if comm.rank == 0 or not wrong:
        comm.barrier()  # here


@case(DeadlockError, "2 of 3 ranks wait", "in all_gather", "same collectives", ranks=3)
def a_rank_that_skips_a_collective(comm, wrong):
    if comm.rank != 1 or not wrong:
        comm.all_gather(np.zeros(2))  # here


@case(DeadlockError, "in all_reduce", "recv(source=0)")
def a_collective_against_a_receive(comm, wrong):
    if comm.rank == 0 or not wrong:
        comm.all_reduce(np.zeros(2))  # here
    else:
        comm.recv(source=0)  # here


@case(DeadlockError, "split", "rank 0", "rank 1")
def a_split_that_one_rank_forgets(comm, wrong):
    if comm.rank == 0 or not wrong:
        comm.split(0)  # here
    else:
        comm.recv(source=0)  # here


@case(DeadlockError, "in broadcast", "rank 0", "rank 1")
def one_collective_in_two_communicators(comm, wrong):
    part = comm.split(0)
    if comm.rank == 0 or not wrong:
        part.broadcast(np.zeros(1), root=0)  # here
    else:
        comm.broadcast(np.zeros(1), root=0)  # here


@case(DeadlockError, "rank 1   recv(source=0)")
def a_queue_that_waits_for_nothing(comm, wrong):
    if comm.rank == 1:
        with comm.stream("copy") as copy:
            comm.irecv(source=0)
        copy.wait()  # here
    elif not wrong:
        comm.send(np.zeros(1), dest=1)


# ---- collectives that do not fit together ------------------------------------------------------------------------


@case(CollectiveMismatch, "rank 0   all_reduce", "rank 1   all_gather", "same operation")
def two_collectives(comm, wrong):
    x = np.zeros(2)
    if comm.rank == 0 or not wrong:
        comm.all_reduce(x)  # here
    else:
        comm.all_gather(x)  # here


@case(CollectiveMismatch, "collective number 2", "barrier", "broadcast")
def two_collectives_in_another_order(comm, wrong):
    comm.barrier()
    if comm.rank == 0 or not wrong:
        comm.broadcast(np.zeros(1), root=0)  # here
        comm.barrier()
    else:
        comm.barrier()  # here
        comm.broadcast(np.zeros(1), root=0)


@case(CollectiveMismatch, "root=0", "root=1", "same root")
def two_roots(comm, wrong):
    comm.broadcast(np.zeros(1), root=comm.rank if wrong else 0)  # here


@case(CollectiveMismatch, "op='sum'", "op='max'", "same op")
def two_operators(comm, wrong):
    comm.all_reduce(np.zeros(2), op="max" if wrong and comm.rank == 1 else "sum")  # here


@case(CollectiveMismatch, "shape=(2,)", "shape=(3,)", "same shape")
def two_shapes(comm, wrong):
    comm.all_reduce(np.zeros(2 + (wrong and comm.rank)))  # here


@case(CollectiveMismatch, "dtype='float64'", "dtype='float32'", "same dtype")
def two_dtypes(comm, wrong):
    comm.reduce_scatter(np.zeros(2, np.float32 if wrong and comm.rank else np.float64))  # here


@case(CollectiveMismatch, "algorithm='ring'", "algorithm='recursive_doubling'", "same algorithm")
def two_algorithms(comm, wrong):
    comm.all_reduce(np.zeros(2), algorithm="recursive_doubling" if wrong and comm.rank else "ring")  # here


@case(CollectiveMismatch, "all_gather(shape=(None, 2))", "all_gather(shape=(None, 3))")
def a_gather_of_rows_of_two_widths(comm, wrong):
    comm.all_gather(np.zeros((1 + comm.rank, 2 + (wrong and comm.rank))))  # here


@case(CollectiveMismatch, "shape=(None, 2)", "shape=(2, None)")
def a_gather_along_two_axes(comm, wrong):
    comm.all_gather(np.zeros((2, 2)), axis=1 if wrong and comm.rank else 0)  # here


@case(CollectiveMismatch, "iall_reduce", "all_reduce")
def a_collective_started_here_and_called_there(comm, wrong):
    if wrong and comm.rank:
        comm.all_reduce(np.zeros(2))  # here
    else:
        comm.iall_reduce(np.zeros(2)).wait()  # here


@case(CollectiveMismatch, "shape=(2,)", "shape=(3,)")
def two_shapes_of_a_started_collective(comm, wrong):
    comm.iall_reduce(np.zeros(2 + (wrong and comm.rank))).wait()  # here


# ---- messages with one side only ---------------------------------------------------------------------------------


@case(UnreceivedMessage, "rank 0   send(dest=1)", "never received", "Post a receive")
def a_message_that_nobody_receives(comm, wrong):
    if comm.rank == 0:
        comm.isend(np.zeros(1), dest=1)  # here
    elif not wrong:
        comm.recv(source=0)


@case(UnreceivedMessage, "rank 1   recv(source=0, tag='b')", "never served", "cancel()")
def a_receive_that_is_left_over(comm, wrong):
    if comm.rank == 1:
        left_over = comm.irecv(source=0, tag="b")  # here
        if not wrong:
            left_over.cancel()


@case(UnreceivedMessage, "never received: 2", "rank 0   send(dest=1, tag=7)")
def messages_one_too_many(comm, wrong):
    if comm.rank == 0:
        for _ in range(3 if wrong else 1):
            comm.isend(np.zeros(1), dest=1, tag=7)  # here
    else:
        comm.recv(source=0, tag=7)


# ---- arguments that make no sense --------------------------------------------------------------------------------


@case(UnknownRank, "dest=2 is not a rank", "0 … 1", "rank 1")
def a_destination_that_does_not_exist(comm, wrong):
    if comm.rank == 1:
        comm.isend(np.zeros(1), dest=2 if wrong else 0).wait()
    else:
        comm.recv(source=1) if not wrong else None


@case(UnknownRank, "source=-1 is not a rank", "rank 0")
def a_source_below_zero(comm, wrong):
    if comm.rank == 0:
        comm.irecv(source=-1 if wrong else 1).cancel()


@case(UnknownRank, "dest=0.0 is not a rank", "rank 0")
def a_destination_that_is_no_whole_number(comm, wrong):
    if comm.rank == 0:
        comm.isend(np.zeros(1), dest=0.0 if wrong else np.int64(1)).cancel()


@case(UnknownRank, "root=2 is not a rank", "raised on rank 0")
def a_root_that_does_not_exist(comm, wrong):
    comm.broadcast(np.zeros(1), root=2 if wrong else 1)


@case(UnknownRank, "dest=2 is not a rank of this communicator", ranks=4)
def a_rank_of_the_world_in_a_part_of_it(comm, wrong):
    part = comm.split(comm.rank // 2)
    if comm.rank == 0:
        part.send(np.zeros(1), dest=2 if wrong else 1)
    if comm.rank == 1:
        part.recv(source=0)


@case(DtypeError, "arrays", "not float", "np.array", "raised on rank 0")
def a_number_as_a_message(comm, wrong):
    comm.sendrecv(3.0 if wrong else np.array(3.0), comm.rank, comm.rank)


@case(DtypeError, "not str", "raised on rank 0")
def a_text_inside_a_tuple(comm, wrong):
    comm.sendrecv((np.zeros(1), "k" if wrong else np.zeros(2)), comm.rank, comm.rank)


@case(DtypeError, "not dict", "raised on rank 0")
def a_dictionary_as_a_message(comm, wrong):
    comm.sendrecv({"k": np.zeros(1)} if wrong else (np.zeros(1),), comm.rank, comm.rank)


@case(DtypeError, "all_reduce takes an array", "not list")
def a_list_in_a_collective(comm, wrong):
    comm.all_reduce([1.0, 2.0] if wrong else np.array([1.0, 2.0]))


@case(DtypeError, "all_gather takes an array", "not float")
def a_number_in_a_collective(comm, wrong):
    comm.all_gather(1.0 if wrong else np.array(1.0))


@case(DtypeError, "all_to_all takes an array", "not int")
def a_part_that_is_no_array(comm, wrong):
    comm.all_to_all([1 if wrong else np.zeros(1)] * comm.size)


@case(ShapeError, "reduce_scatter", "(5, 3)", "2 equal parts", "pad it")
def rows_that_do_not_divide(comm, wrong):
    comm.reduce_scatter(np.zeros((5 if wrong else 6, 3)))


@case(ShapeError, "all_to_all", "3 parts", "2 ranks")
def parts_one_too_many(comm, wrong):
    comm.all_to_all([np.zeros(1)] * (3 if wrong else 2))


@case(ShapeError, "axis 2", "(4, 4)")
def an_axis_that_does_not_exist(comm, wrong):
    comm.all_gather(np.zeros((4, 4)), axis=2 if wrong else 1)


@case(ShapeError, "-1 bytes", "raised on rank 0")
def a_size_below_zero(comm, wrong):
    if comm.rank == 0:
        comm.isend(np.zeros(1), dest=1, nbytes=-1 if wrong else 0).cancel()


@case(ValueError, "all_reduce", "op='mean'", "sum, max, min, prod")
def an_operator_that_does_not_exist(comm, wrong):
    comm.all_reduce(np.zeros(2), op="mean" if wrong else "sum")


@case(ValueError, "all_gather has no algorithm 'bruck'", "ring, recursive_doubling")
def an_algorithm_that_does_not_exist(comm, wrong):
    comm.all_gather(np.zeros(2), algorithm="bruck" if wrong else "ring")


@case(UnknownRank, "rank 1 must be in the group", "(0,)")
def a_group_without_oneself(comm, wrong):
    if comm.rank == 1:
        comm.group([0] if wrong else [0, 1])


# ---- requests and buffers used too early -------------------------------------------------------------------------


@case(RequestCancelled, "recv(source=1)", "was cancelled", "raised on rank 0")
def a_wait_for_what_was_taken_back(comm, wrong):
    if comm.rank == 0:
        request = comm.irecv(source=1)  # here
        request.cancel()
        if wrong:
            request.wait()


@case(RequestTimeout, "recv(source=1)", "within 0.5 s", "raised on rank 0")
def a_wait_that_runs_out_of_time(comm, wrong):
    if comm.rank == 0:
        comm.irecv(source=1).wait(timeout=0.5 if wrong else 2.0)  # here
    else:
        comm.sleep(1.0)
        comm.send(np.zeros(1), dest=0)


@case(BufferInUse, "rank 0 wrote to an array that is being sent", "send(dest=1)", "Wait for the request first", "copy")
def a_write_before_the_send_is_done(comm, wrong):
    if comm.rank == 0:
        x = np.zeros(1000)
        request = comm.isend(x, dest=1)  # here
        if wrong:
            x[0] = 1
        request.wait()
    else:
        comm.recv(source=0)


@case(BufferInUse, "rank 0 wrote", "send(dest=1)")
def a_write_before_anybody_receives(comm, wrong):
    if comm.rank == 0:
        x = np.zeros(1000)
        request = comm.isend(x, dest=1)  # here
        comm.sleep(1.0)
        if wrong:
            x += 1
        request.wait()
    else:
        comm.sleep(2.0)
        comm.recv(source=0)


@case(BufferInUse, "rank 0 wrote", "send(dest=1)")
def a_write_through_the_whole_array(comm, wrong):
    if comm.rank == 0:
        x = np.zeros(1000)
        request = comm.isend(x[:10], dest=1)  # here
        x[3 if wrong else 30] = 1
        request.wait()
    else:
        comm.recv(source=0)


@case(BufferInUse, "rank 0 wrote", "send(dest=1)")
def a_write_through_an_older_view(comm, wrong):
    if comm.rank == 0:
        x = np.zeros(1000)
        view = x[5:]
        request = comm.isend(x, dest=1)  # here
        if wrong:
            view[0] = 1
        request.wait()
    else:
        comm.recv(source=0)


@case(BufferInUse, "rank 1 wrote", "send(dest=0)", ranks=3)
def a_write_while_one_of_two_sends_is_open(comm, wrong):
    if comm.rank == 1:
        x = np.zeros(1000)
        requests = [comm.isend(x, dest=0), comm.isend(x, dest=2)]
        requests[1].wait()
        if not wrong:
            requests[0].wait()
        x[0] = 1
        wait_all(requests)
    else:
        comm.sleep(0.0 if comm.rank == 2 else 1.0)
        comm.recv(source=1)


@case(BufferInUse, "rank 1 wrote", "send(dest=0)")
def a_kernel_that_writes_in_place(comm, wrong):
    x = np.zeros(1000)
    request = comm.ishift(x)  # here
    if not wrong:
        request.wait()
    if comm.rank == 1:
        increment(x)
    request.wait()


@kernel(cost=lambda x: Cost(0, 2 * x.nbytes), out=lambda x: x)
def increment(x):
    x += 1
    return x


# ---- limits ------------------------------------------------------------------------------------------------------


@case(RuntimeFault, "cluster.run was called inside", "raised on rank 0")
def a_run_inside_a_run(comm, wrong):
    if wrong:
        mesh(2).run(lambda inner: None)


@case(RuntimeFault, "forget", "out=", "like(x)", "raised on rank 0")
def a_kernel_that_does_not_say_what_it_returns(comm, wrong):
    forget(like(3) if wrong else np.zeros(3))


@kernel(cost=lambda x: Cost(1, 1))
def forget(x):
    return x + 1


# ---- the tests ---------------------------------------------------------------------------------------------------


@every
def test_the_mistake_is_named(program, error, words, ranks):
    with pytest.raises(error) as caught:
        mesh(ranks).run(program, wrong=True)
    text = told(caught.value)
    for expected in [*words, *(f"test_mistakes.py:{line}" for line in lines_marked(program))]:
        assert expected in text


@every
def test_its_correct_twin_raises_nothing(program, error, words, ranks):
    mesh(ranks).run(program, wrong=False)


@every
def test_the_error_is_of_the_runtimes_own_family_or_a_value_error(program, error, words, ranks):
    assert issubclass(error, (RuntimeFault, ValueError))


def test_a_deadlock_of_two_ranks_is_reported_within_a_second():
    since = perf_counter()
    with pytest.raises(DeadlockError):
        mesh(2).run(both_receive_first, wrong=True)
    assert perf_counter() - since < 1.0


def test_a_deadlock_says_when_and_since_when():
    def program(comm):
        comm.sleep(1.5 if comm.rank else 0.25)
        comm.recv(source=1 - comm.rank)

    with pytest.raises(DeadlockError, match=r"Deadlock at 1\.5 s") as caught:
        mesh(2).run(program)
    row_0, row_1 = str(caught.value).splitlines()[1:3]
    assert "since 250 ms" in row_0
    assert "since 1.5 s" in row_1


def test_a_deadlock_of_many_ranks_stays_readable():
    with pytest.raises(DeadlockError, match="100 of 100 ranks wait") as caught:
        mesh(100).run(lambda comm: comm.recv(source=0))
    assert str(caught.value).count("\n") < 20
    assert "84 more" in str(caught.value)


def test_a_sub_task_that_is_stuck_is_named():
    def program(comm):
        if comm.rank == 0:
            comm.spawn(lambda: comm.recv(source=1), name="listener").wait()  # here

    with pytest.raises(DeadlockError) as caught:
        mesh(2).run(program)
    assert "listener" in str(caught.value)
    assert f"test_mistakes.py:{lines_marked(program)[0]}" in str(caught.value)


@pytest.mark.parametrize("sleep", [float("inf"), float("nan")])
def test_a_sleep_without_end_is_refused(sleep):
    with pytest.raises(ValueError, match=r"rank 0 .* finite"):
        mesh(2).run(lambda comm: comm.sleep(sleep))


# ---- exceptions of the program itself ----------------------------------------------------------------------------


class Broken(Exception):
    """An exception that the runtime has never heard of."""


def fail_directly(comm):
    raise Broken("the program's own words")


def fail_in_a_sub_task(comm):
    comm.spawn(fail_directly, comm).wait()


def fail_in_a_kernel(comm):
    broken(np.zeros(1))


@kernel(cost=lambda x: Cost(1, 1))
def broken(x):
    raise Broken("the program's own words")


@pytest.mark.parametrize("fail", [fail_directly, fail_in_a_sub_task, fail_in_a_kernel])
def test_an_exception_keeps_its_type_and_words_and_names_the_rank(fail):
    def program(comm):
        if comm.rank == 2:
            comm.sleep(0.5)
            fail(comm)
        comm.recv(source=2)

    with pytest.raises(Broken, match="the program's own words") as caught:
        mesh(4).run(program)
    assert "rank 2" in told(caught.value)
    assert "500 ms" in told(caught.value)


def test_after_an_error_a_new_run_works():
    with pytest.raises(DeadlockError):
        mesh(2).run(both_send_first, wrong=True)
    mesh(2).run(both_send_first, wrong=False)


def test_the_other_ranks_are_unwound():
    unwound = []

    def program(comm):
        try:
            comm.sleep(1.0 - comm.rank)
            if comm.rank == 0:
                raise Broken
            comm.recv(source=0)
        finally:
            unwound.append(comm.rank)

    with pytest.raises(Broken):
        mesh(3).run(program)
    assert sorted(unwound) == [0, 1, 2]


# ---- memory ------------------------------------------------------------------------------------------------------


@kernel(cost=lambda n: Cost(), out=lambda n: like(n, np.uint8))
def allocate(n):
    return np.zeros(n, np.uint8)


def test_going_over_the_devices_memory_names_rank_device_and_largest_arrays():
    small = replace(hardware.IDEAL, name="tiny", memory_capacity=1000)

    def program(comm, x):
        held = [allocate(n) for n in (100, 300, 200)]
        return held, increment(allocate(500 if comm.rank == 1 else 1))

    with pytest.raises(OutOfDeviceMemory) as caught:
        mesh(2, small).run(program, np.zeros(7, np.uint8))
    text = told(caught.value)
    for words in ("rank 1", "tiny", "1 kB", "1.11 kB", "allocate", "shape (500,)", "argument", "Use more ranks"):
        assert words in text
    sizes = [line.split()[0] for line in text.splitlines() if "   shape (" in line]
    assert sizes == ["500", "300", "200", "100", "7"]


def test_exactly_the_devices_memory_is_enough():
    small = replace(hardware.IDEAL, memory_capacity=1000)
    assert mesh(1, small).run(lambda comm: allocate(1000)).peak_memory == [1000]
    with pytest.raises(OutOfDeviceMemory):
        mesh(1, small).run(lambda comm: allocate(1001))


@pytest.mark.parametrize("shape_only", [False, True])
def test_a_received_message_can_be_what_does_not_fit(shape_only):
    small = replace(hardware.IDEAL, memory_capacity=1000)

    def program(comm, x):
        return x, comm.ishift(x).wait()

    x = like(600, np.uint8) if shape_only else np.zeros(600, np.uint8)
    with pytest.raises(OutOfDeviceMemory, match="receive from rank"):
        mesh(2, small).run(program, x)


# ---- buffers -----------------------------------------------------------------------------------------------------


def test_after_completion_an_array_may_be_written_again():
    def program(comm, x):
        request = comm.ishift(x)
        request.wait()
        x += 1
        comm.ishift(x).wait()
        x += 1
        return x

    assert mesh(2).run(program, np.zeros(3)).outputs[0].tolist() == [2, 2, 2]


def test_reading_what_is_being_sent_is_allowed():
    def program(comm, x):
        request = comm.ishift(x)
        total = x.sum()
        request.wait()
        return total

    assert mesh(2).run(program, np.ones(3)).outputs == [3, 3]


def test_an_array_that_was_read_only_before_stays_so():
    def program(comm, x):
        x.flags.writeable = False
        comm.ishift(x).wait()
        return x.flags.writeable

    assert mesh(2).run(program, np.zeros(3)).outputs == [False, False]


def test_a_write_to_something_else_that_is_read_only_is_not_blamed_on_the_network():
    def program(comm):
        fixed = np.zeros(3)
        fixed.flags.writeable = False
        fixed[0] = 1

    with pytest.raises(ValueError, match="read-only") as caught:
        mesh(1).run(program)
    assert not isinstance(caught.value, BufferInUse)


def test_all_errors_are_runtime_faults():
    own = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(own) >= 11
    assert all(issubclass(e, RuntimeFault) for e in own)


CELLS = '''
from IPython.core.interactiveshell import InteractiveShell
from ipykernel.compiler import XCachingCompiler
shell = InteractiveShell.instance()
shell.compile = XCachingCompiler()  # a kernel's: it names cells /tmp/ipykernel_…/2572871998.py
shell.run_cell("from toolkit.runtime import Cluster, hardware, topology", store_history=True)
shell.run_cell("def program(comm):\\n    comm.recv(source=1 - comm.rank)", store_history=True)
shell.run_cell("""try:
    Cluster(topology.full_mesh(2, hardware.PCIE4)).run(program)
except Exception as error:
    print(error)""", store_history=True)
'''


def test_in_a_notebook_the_place_is_the_number_and_line_of_the_cell():
    told = subprocess.run([sys.executable, "-c", CELLS], capture_output=True, text=True, cwd=ROOT).stdout
    assert "rank 0   recv(source=1)   since 0 s   cell [2] line 2\n" in told
    assert "rank 1   recv(source=0)   since 0 s   cell [2] line 2\n" in told


def test_a_cell_of_a_kernel_that_is_gone_is_still_called_a_cell():
    code = compile("x = 1", "/elsewhere/ipykernel_77/2572871998.py", "exec")
    assert site_text((code, 4)) == "cell, line 1"
