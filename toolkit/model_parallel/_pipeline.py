"""Runs any pipeline schedule over a communicator.

Outputs go to the next stage and gradients to the one before, without waiting; a rank asks for what its next pass needs
before it starts on the present one. Between the same two ranks messages keep the order in which they are sent, so a
schedule must use them in that order: `check_order` says so before anything moves.
Chapter: model_parallel/megatron.
"""

from itertools import zip_longest
from math import inf

from toolkit.runtime.hardware import Device
from toolkit.runtime.kernel import Cost, kernel

from ._schedule import ScheduleError, by_stage, check

CHANNELS = {"F": "activations", "B": "gradients"}


def run(pp, schedule, forward, backward, *, others=None, pack=None, unpack=None, overlap=True):
    """This rank's part of a schedule.

    pp         communicator of the stages, one rank each
    forward    (chunk, microbatch, x) -> (y, saved)          x is None in the model's first stage
    backward   (chunk, microbatch, saved, grad) -> dx        grad is None in the model's last stage
    others     {kind: (chunk, microbatch) -> None} for W and passes of other kinds, in their place
    pack       what is sent of y and dx, and `unpack` what the receiver makes of it; None: all of it
    overlap    False: a rank waits until what it sends has arrived. Receives are then all posted at the start, so that
               nobody waits for a receiver
    returns    the most chunk activations kept at once, from F to the last of B and W
    sends      one message a pass, but for the two ends of the model and between chunks of one rank
    raises     ScheduleError
    """
    if len(schedule.passes) != pp.size:
        raise ScheduleError(f"{schedule.name} has {len(schedule.passes)} ranks, the communicator {pp.size}")
    coming, here, saved, sent, order = {}, {}, {}, [], schedule.passes[pp.rank]
    live, peak, last = 0, 0, "W" if schedule.split else "B"

    def ask(step):
        needs = schedule.needs(pp.rank, step)
        if needs is not None and needs[0] != pp.rank:
            coming[step] = pp.irecv(needs[0], CHANNELS[step.kind])

    def take(step):
        if step in coming:
            message = coming.pop(step).wait()
            return unpack(message) if unpack else message
        return here.pop(step, None)

    def give(step, x):
        feeds = schedule.feeds(pp.rank, step)
        if feeds is None:
            return
        if feeds[0] == pp.rank:
            here[feeds[1]] = x
        else:
            sent.append(pp.isend(pack(x) if pack else x, feeds[0], CHANNELS[step.kind]))
            if not overlap:
                sent.pop().wait()

    for step in order[:1] if overlap else order:
        ask(step)
    for step, after in zip_longest(order, order[1:]):
        if overlap and after:
            ask(after)
        if step.kind == "F":
            y, saved[step.chunk, step.microbatch] = forward(step.chunk, step.microbatch, take(step))
            live += 1
            peak = max(peak, live)
            give(step, y)
            y = None  # the message alone keeps it now
        elif step.kind == "B":
            kept = saved.pop((step.chunk, step.microbatch))
            give(step, backward(step.chunk, step.microbatch, kept, take(step)))
            kept = None
        else:
            others[step.kind](step.chunk, step.microbatch)
        live -= step.kind == last
    for message in sent:
        message.wait()
    return peak


# ---- a schedule whose passes take given times ------------------------------------------------------------------------

CLOCK = Device("as long as it is told", flops=1.0, memory_bandwidth=inf)  # one operation a second


@kernel(cost=lambda x, seconds: Cost(seconds), out=lambda x, seconds: x)
def forward_pass(x, seconds):
    return x


@kernel(cost=lambda x, seconds: Cost(seconds), out=lambda x, seconds: x)
def backward_pass(x, seconds):
    return x


@kernel(cost=lambda x, seconds: Cost(seconds), out=lambda x, seconds: x)
def other_pass(x, seconds):
    return x


def replay(pp, schedule, seconds, message, **options):
    """`run` with passes that take given times, on devices like CLOCK: what messages do to a schedule.

    seconds   as for `_schedule.times`          message   array, what a stage sends
    options   of `run`
    """
    lasts, stages = by_stage(seconds), schedule.where[pp.rank]

    def other(kind):
        return lambda c, k: other_pass(message, lasts(kind, stages[c]))

    kinds = {step.kind for step in schedule.passes[pp.rank]} - {"F", "B"}
    return run(
        pp,
        schedule,
        forward=lambda c, k, x: (forward_pass(message, lasts("F", stages[c])), None),
        backward=lambda c, k, saved, grad: backward_pass(message, lasts("B", stages[c])),
        **{"others": {kind: other(kind) for kind in kinds}, **options},
    )


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def check_order(schedule):
    """The schedule itself, if it can run here: complete, without a circle, its messages used in the order of sending.

    raises   ScheduleError
    """
    check(schedule)
    sent, used = {}, {}
    for rank, order in enumerate(schedule.passes):
        for step in order:
            feeds, needs = schedule.feeds(rank, step), schedule.needs(rank, step)
            if feeds is not None:
                sent.setdefault((rank, feeds[0], step.kind), []).append(feeds[1])
            if needs is not None:
                used.setdefault((needs[0], rank, step.kind), []).append(step)
    for channel, messages in sent.items():
        if channel[0] != channel[1] and messages != used[channel]:
            source, dest, kind = channel
            raise ScheduleError(
                f"{schedule.name}: rank {dest} does not use the {CHANNELS[kind]} of rank {source} in the order in "
                "which they are sent; reorder the passes of one of the two"
            )
    return schedule
