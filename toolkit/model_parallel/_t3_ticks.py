"""T3's memory, tick by tick: the compiled part of `_t3_queue`. Chapter: model_parallel/t3."""

import numpy as np
from numba import njit

AHEAD = 8  # requests that the DMA lane reads ahead of the link
# what a tick serves
IDLE, GEMM_READ, GEMM_WRITE, SEND_READ, UPDATE_READ, UPDATE_WRITE, LAST_READ, LAST_WRITE = range(8)
READS, COMPUTES, WRITES = range(3)  # phases of a wave


@njit(cache=True)
def simulate(waves, ready, need, requests, w, stream, rereads, last, link, latency, pace, policy, room, served):
    """One GPU. need: reads served before each request may leave. Returns ticks (-1: too many), ends, sends, …"""
    parcels = len(need)
    ends, wire = np.zeros(len(waves), np.int64), np.empty(parcels)  # wire: when each request arrives
    sends, arrivals = np.zeros((parcels // requests, 2)), np.zeros((parcels // requests, 2), np.int64)
    line = np.empty((need[-1] + parcels * (rereads + 1) + 3 * requests, 2), np.int64)  # communication: (kind, came)
    queue, first, held = np.empty(room, np.int8), 0, 0  # in front of the memory: a ring
    wave, phase, until, came, pending, left = 0, READS, 0, 0, waves[0, READS], waves[0, READS]  # of the GEMM
    head, tail, turn, rested, waited, paced = 0, 0, False, 0, 0, 0.0
    issued, sent, delivered, read, stored, summed, free = requests * stream, 0, 0, 0, 0, -1, 0.0
    for t in range(len(served)):
        while wave < len(waves) and (left == 0 if phase != COMPUTES else t >= until):  # the GEMM goes on
            if phase == WRITES:
                ends[wave], wave, phase = t, wave + 1, READS
            else:
                phase += 1
            if phase == COMPUTES:
                until = t + waves[wave, COMPUTES]
            elif wave < len(waves):
                came, pending, left = t, waves[wave, phase], waves[wave, phase]
        while issued < parcels and issued - sent < AHEAD:  # DMA reads what is complete
            chunk = issued // requests
            if wave <= ready[chunk] or stored < chunk * requests:
                break
            reads = need[issued] - (need[issued - 1] if issued else 0)
            tail = push(line, tail, SEND_READ, reads, t)
            issued += 1
        while sent < parcels and free < t + 1:  # the link takes what was read, or is being produced
            chunk = sent // requests
            if stream and chunk == 0:
                if produced(waves, wave, phase, until, t, requests, w) <= sent:
                    break
            elif sent >= issued or read < need[sent]:
                break
            start = max(free, float(t))
            free = start + link
            if sent % requests == 0:
                sends[chunk, 0] = start
            sends[chunk, 1], wire[sent], sent = free, free + latency, sent + 1
        while delivered < sent and wire[delivered] <= t:  # what leaves here arrives here: all GPUs are equal
            if delivered % requests == 0:
                arrivals[delivered // requests, 0] = t
            tail = push(line, tail, UPDATE_READ, rereads, t)
            tail = push(line, tail, UPDATE_WRITE, 1, t)
            delivered += 1
        if summed < 0 and wave == len(waves) and stored == parcels:
            summed = 3 * requests * last
            tail = push(line, tail, LAST_READ, 2 * requests * last, t)
            tail = push(line, tail, LAST_WRITE, requests * last, t)
        if summed == 0:
            return t, ends, sends, arrivals, waited
        while held < room:  # the controller
            waiting = line[head, 1] if head < tail and paced <= t else -1
            choice = enters(policy, t, pending > 0, came, waiting, rested, held, turn)
            if choice < 0:
                break
            turn, spot, held = choice == 0, (first + held) % room, held + 1
            if choice == 0:
                queue[spot], pending = GEMM_WRITE if phase == WRITES else GEMM_READ, pending - 1
            else:
                queue[spot], rested, waited = line[head, 0], t, max(waited, t - waiting)
                head, paced = head + 1, max(paced, float(t)) + pace
        if held:  # the memory serves one
            kind, first, held = queue[first], (first + 1) % room, held - 1
            served[t] = kind
            left -= kind <= GEMM_WRITE
            read += kind == SEND_READ
            summed -= kind >= LAST_READ
            if kind == UPDATE_WRITE:
                arrivals[stored // requests, 1] = t + 1
                stored += 1
    return -1, ends, sends, arrivals, waited


@njit(cache=True)
def enters(policy, t, compute, came, waiting, rested, held, turn):
    """Who may enter the queue: 0 compute, 1 communication, -1 nobody. waiting: since when, -1: nothing waits."""
    kind, threshold, starvation = policy
    comm = waiting >= 0
    if kind == 2 and comm and t - max(waiting, rested) > starvation:
        return 1
    if not compute:
        return 1 if comm and (kind != 2 or held < threshold) else -1
    if not comm or kind == 2:
        return 0
    return int(turn) if kind == 0 else int(waiting < came)


@njit(cache=True)
def produced(waves, wave, phase, until, t, requests, w):
    """Requests of the first chunk that have been stored by now: evenly over the compute phases of its w waves."""
    if wave >= w or (wave == w - 1 and phase == WRITES):
        return requests
    before, after = wave * requests // w, (wave + 1) * requests // w
    if phase == READS:
        return before
    if phase == WRITES:
        return after
    length = waves[wave, COMPUTES]
    return before + (after - before) * (length - (until - t)) // max(length, 1)


@njit(cache=True)
def push(line, tail, kind, count, t):
    for i in range(tail, tail + count):
        line[i, 0], line[i, 1] = kind, t
    return tail + count
