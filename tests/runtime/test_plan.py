"""The plan says what a run sends: every message of the trace, channel by channel, and each rank's order of sending."""

from collections import Counter
from functools import partial

import numpy as np
import pytest

from runtime import real_programs
from toolkit.runtime import Cluster, errors, hardware, like, shard, topology
from toolkit.runtime.plan import form, plan

UNPLANNED = ("anyone", "ExFlow")  # take what comes first; send as many tokens as the gate says
PROGRAMS = [name for name in real_programs.programs(1) if not name.startswith(UNPLANNED)]


def bytes_of(wire):
    return sum(np.prod(a.shape, dtype=int) * a.itemsize for a in real_programs.flat(wire))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_plan_has_the_bytes_of_every_message_of_the_run(ranks, name):
    program, args, options = real_programs.programs(ranks)[name]
    specs, _, orders = plan(program, args, options, ranks)
    run = Cluster(topology.full_mesh(ranks, hardware.NVLINK4)).run(program, *args, **options)
    sent = Counter((int(row[0]), int(row[1]), int(row[3])) for row in run.trace.messages)
    planned = Counter((c[0], c[1], bytes_of(wire)) for c, found in specs.items() for wire, _ in found)
    assert planned == sent
    assert Counter(c for order in orders for c in order) == Counter({c: len(found) for c, found in specs.items()})


def both_ways(comm, x):
    """A sub-task that sends in two steps, and a program that sends in between."""
    task = comm.spawn(lambda: [comm.ishift(x, tag="task").wait(), comm.ishift(x, tag="task").wait()])
    comm.ishift(x, tag="program").wait()
    return task.wait()


def test_a_rank_that_never_waits_sends_what_a_sub_task_sends_first():
    _, _, orders = plan(both_ways, [like(4)], {}, 3)
    assert [channel[-1] for channel in orders[0]] == ["task", "task", "program"]


def test_a_plan_needs_to_know_who_sends():
    with pytest.raises(errors.RuntimeFault, match="name the source"):
        plan(real_programs.from_anyone, [like(4)], {}, 2)


def test_a_program_that_deadlocks_has_no_plan():
    with pytest.raises(errors.DeadlockError):
        plan(lambda comm: comm.recv(1 - comm.rank), [], {}, 2)


def test_runs_of_the_same_shapes_have_the_same_plan():
    one, other = (shard(np.full((2, 8), fill), 1) for fill in (1.0, 2.0))
    assert form(one) == form(other) != form(shard(np.zeros((2, 6)), 1))
    assert form((one, partial)) == form((other, partial))
