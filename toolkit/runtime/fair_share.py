"""The arithmetic of the fluid network: max-min fair rates by progressive filling, in numba.

Plain functions over columns: flows (state, route, bytes left, rate, time of the last change, next time due), routes
(links, the share of the flow that each carries, latency, cap) and, for each link, a doubly linked list of its flows.
A share below 1 is a flow that is sprayed over several paths.
"""

import numpy as np
from numba import njit

INFINITY = float("inf")
FREE, LATENT, ACTIVE = 0, 1, 2

HOP = 1024  # more hops than any route has


@njit(cache=True)
def begin(
    now,
    slots,
    routes,
    nbytes,
    capacity,
    hops,
    share,
    first,
    latency,
    cap,
    state,
    route,
    left,
    rate,
    last,
    due,
    head,
    after,
    before,
):
    entering = np.empty(len(slots), np.int64)
    count = 0
    for i in range(len(slots)):
        s, r = slots[i], routes[i]
        route[s], left[s], rate[s], last[s] = r, nbytes[i], 0.0, now
        state[s], due[s] = LATENT, now + latency[r]
        if latency[r] == 0.0:
            entering[count] = s
            count += 1
    links = np.empty(0, np.int64)
    new = entering[:count]
    _share(now, new, links, capacity, hops, share, first, cap, state, route, left, rate, last, due, head, after, before)
    return due.min()


@njit(cache=True)
def advance(now, capacity, hops, share, first, latency, cap, state, route, left, rate, last, due, head, after, before):
    ended, entering = np.empty(len(state), np.int64), np.empty(len(state), np.int64)
    freed, n_ended, n_entering, n_freed = np.empty(before.size, np.int64), 0, 0, 0
    for s in range(len(state)):
        if due[s] > now or state[s] == FREE:
            continue
        if state[s] == LATENT and left[s] > 0:
            entering[n_entering] = s
            n_entering += 1
            continue
        if state[s] == ACTIVE:
            for h in range(first[route[s] + 1] - first[route[s]]):  # leave the links
                link = hops[first[route[s]] + h]
                b, a = before[s, h], after[s, h]
                if b < 0:
                    head[link] = a
                else:
                    after[b // HOP, b % HOP] = a
                if a >= 0:
                    before[a // HOP, a % HOP] = b
                freed[n_freed] = link
                n_freed += 1
        state[s], due[s] = FREE, INFINITY
        ended[n_ended] = s
        n_ended += 1
    new, links = entering[:n_entering], freed[:n_freed]
    _share(now, new, links, capacity, hops, share, first, cap, state, route, left, rate, last, due, head, after, before)
    return ended[:n_ended], due.min()


@njit(cache=True)
def share_anew(
    now, links, capacity, hops, share, first, latency, cap, state, route, left, rate, last, due, head, after, before
):
    """New rates after the capacities of `links` have changed."""
    new = np.empty(0, np.int64)
    _share(now, new, links, capacity, hops, share, first, cap, state, route, left, rate, last, due, head, after, before)


@njit(cache=True)
def _share(
    now, entering, freed, capacity, hops, share, first, cap, state, route, left, rate, last, due, head, after, before
):
    """Let flows in, then recompute the rates of every flow connected to a changed link."""
    seen_link, seen_flow = np.zeros(len(capacity), np.bool_), np.zeros(len(state), np.bool_)
    links, flows = np.empty(len(capacity), np.int64), np.empty(len(state), np.int64)
    n_links = n_flows = 0
    for s in entering:
        state[s], last[s] = ACTIVE, now
        seen_flow[s] = True
        flows[n_flows] = s
        n_flows += 1
        if left[s] == 0.0:  # pays latency only and takes no bandwidth
            state[s], due[s] = LATENT, now
            n_flows -= 1
            continue
        for h in range(first[route[s] + 1] - first[route[s]]):  # join the links
            link = hops[first[route[s]] + h]
            after[s, h], before[s, h] = head[link], -1
            if head[link] >= 0:
                before[head[link] // HOP, head[link] % HOP] = s * HOP + h
            head[link] = s * HOP + h
            if not seen_link[link]:
                seen_link[link] = True
                links[n_links] = link
                n_links += 1
    for link in freed:
        if not seen_link[link]:
            seen_link[link] = True
            links[n_links] = link
            n_links += 1
    i = 0
    while i < n_links:  # everything reachable through shared links
        entry = head[links[i]]
        while entry >= 0:
            s = entry // HOP
            if not seen_flow[s]:
                seen_flow[s] = True
                flows[n_flows] = s
                n_flows += 1
            for k in range(first[route[s]], first[route[s] + 1]):
                if not seen_link[hops[k]]:
                    seen_link[hops[k]] = True
                    links[n_links] = hops[k]
                    n_links += 1
            entry = after[s, entry % HOP]
        i += 1
    fair = fill(links[:n_links], flows[:n_flows], capacity, hops, share, first, cap, route)
    for i in range(n_flows):
        s = flows[i]
        if fair[i] == rate[s]:
            continue  # an unchanged rate keeps its finish time to the bit
        if last[s] < now:
            left[s] = max(0.0, left[s] - rate[s] * (now - last[s]))
        rate[s], last[s] = fair[i], now
        due[s] = now + left[s] / fair[i]


@njit(cache=True)
def fill(links, flows, capacity, hops, share, first, cap, route):
    """Progressive filling: raise all rates together; whoever meets a full link or its own cap stays there."""
    room, weight, users = np.zeros(len(capacity)), np.zeros(len(capacity)), np.zeros(len(capacity), np.int64)
    fair, fixed = np.zeros(len(flows)), np.zeros(len(flows), np.bool_)
    for link in links:
        room[link] = capacity[link]
    for s in flows:
        for k in range(first[route[s]], first[route[s] + 1]):
            users[hops[k]] += 1
            weight[hops[k]] += share[k]
    stops, open_flows = np.empty(len(flows), np.int64), len(flows)
    while open_flows > 0:
        n_stops = 0
        level = INFINITY
        for link in links:
            if users[link] > 0:
                level = min(level, room[link] / weight[link])
        for i in range(len(flows)):
            if not fixed[i]:
                level = min(level, cap[route[flows[i]]])
        limit = level * (1 + 1e-10)  # rounding must not split flows that tie
        for i in range(len(flows)):
            if fixed[i]:
                continue
            r = route[flows[i]]
            full = cap[r] <= limit or level == INFINITY
            for k in range(first[r], first[r + 1]):
                full = full or room[hops[k]] <= limit * weight[hops[k]]
            if full:
                fair[i] = level
                stops[n_stops] = i
                n_stops += 1
        for i in stops[:n_stops]:
            fixed[i] = True
            open_flows -= 1
            for k in range(first[route[flows[i]]], first[route[flows[i]] + 1]):
                users[hops[k]] -= 1
                weight[hops[k]] -= share[k]
                if room[hops[k]] < INFINITY:
                    room[hops[k]] = max(0.0, room[hops[k]] - share[k] * fair[i])
    return fair
