"""Why one placement is faster than another: a step's seconds, part by part; and its pipeline replayed on the machine.

    parts(step, efficiency)            # {"work": 20.0, "run again": 6.2, "tensor talk": 2.4, …}: add up to the step
    why(best, other, efficiency)       # "20.70 s instead of 31.08 s: 5.77 s less run again, …"
Chapter: model_parallel/place_a_model.
"""

from dataclasses import replace

from toolkit.runtime import Cluster, like

from . import _pipeline
from ._megatron_pieces import MACHINES, gather_seconds, layer_seconds, nodes_of
from ._megatron_scale import outline, pass_seconds, schedule, shape
from ._planner import passes


def parts(step, efficiency):
    """Seconds of a Step by what its busiest rank does; they add up to `step.seconds`.

    work               what a layer computes once, the model's ends, the optimiser
    run again          what recomputation computes a second time
    tensor talk        all-reduces inside layers
    between stages     messages, and gathers of their parts
    idle               the bubble, and waiting for slower ranks
    between replicas   sums of gradients, and what ZeRO moves, as far as nothing hides it
    """
    job, order = step.job, outline(step.job.kind, step.job.p, step.job.v)

    def busy(job):
        seconds = pass_seconds(job, order, efficiency)
        of_rank = (sum(seconds(kind, stage) for stage in stages for kind in passes(order)) for stages in order.where)
        return [job.microbatches * one for one in of_rank]

    whole = busy(job)
    rank = whole.index(max(whole))
    cost, plain = (layer_seconds(shape(one), efficiency) for one in (job, replace(job, recompute="none")))
    talk, computed, needed = sum(cost.talk.values()), _computed(cost), _computed(plain)
    ends = [cost.embedding, cost.head]
    mine = [end for end, stage in zip(ends, (0, order.stages - 1), strict=True) if order.owner[stage][0] == rank]
    layers, m = job.microbatches * job.layers // job.p, job.microbatches
    work = layers * needed + m * sum(end["F"] + end["B"] for end in mine)
    alone = busy(replace(job, zero=min(job.zero, 1)))[rank]
    return {
        "work": work + step.optimiser,
        "run again": layers * (computed - needed),
        "tensor talk": layers * talk,
        "between stages": alone - work - layers * (computed - needed + talk),
        "idle": step.pipeline - whole[rank],
        "between replicas": step.gradients + whole[rank] - alone,
    }


def _computed(cost):
    """Seconds of a layer's kernels, both ways."""
    return cost.layer["F"] + cost.layer["B"] - sum(cost.talk.values())


def why(step, other, efficiency, least=0.01):
    """One sentence: what `step` saves against `other`, and what it pays. least: share of the step that is told."""
    mine, theirs = parts(step, efficiency), parts(other, efficiency)
    change = {name: mine[name] - theirs[name] for name in mine}
    told = sorted((n for n in change if abs(change[n]) >= least * step.seconds), key=lambda n: -abs(change[n]))
    said = [f"{abs(change[name]):.2f} s {'less' if change[name] < 0 else 'more'} {name}" for name in told]
    return f"{step.seconds:.2f} s instead of {other.seconds:.2f} s: {', '.join(said) or 'no part differs by much'}"


def replayed(job, efficiency):
    """Seconds of the pipeline of a Job on the machine: its passes as clocks, its messages on the network."""
    few = outline(job.kind, job.p, job.v)
    order = schedule(job.kind, job.p, job.microbatches, job.v, pass_seconds(job, few, efficiency))
    seconds = pass_seconds(job, few, efficiency, messages=False)
    message = like((job.b * job.s // (job.t if job.scatter_gather else 1), job.h), "float16")
    gather = gather_seconds(job.t, message.shape, job.machine) if job.scatter_gather else 0.0
    inside = max(1, MACHINES[job.machine].node // (job.t * job.d))
    machine = Cluster(nodes_of(job.p, inside, job.machine), _pipeline.CLOCK)
    options = {"unpack": lambda x: _pipeline.forward_pass(x, gather), "overlap": False}
    return machine.run(_pipeline.replay, order, seconds, message, **options).makespan
