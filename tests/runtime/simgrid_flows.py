"""Run flow sets in SimGrid. test_simgrid.py starts this with a Python that has the bindings (Debian: python3-simgrid).

stdin    JSON {"links": {name: [bandwidth, latency]}, "flows": [[link names, bytes, start], …]}
stdout   JSON list of finish times in seconds, in the order of the flows
"""

import json
import sys

from simgrid import Actor, Comm, Engine, LinkInRoute, NetZone, this_actor

# CM02 without its corrections for TCP: bytes / bandwidth + latency, nothing else.
PLAIN = {
    "network/model": "CM02",
    "network/crosstraffic": 0,
    "network/TCP-gamma": 0,
    "network/weight-S": 0,
    "network/bandwidth-factor": 1,
    "network/latency-factor": 1,
    "surf/precision": 1e-12,
    "maxmin/precision": 1e-9,
}


def main():
    problem, finish = json.load(sys.stdin), []
    engine = Engine(["flows", "--log=root.thresh:critical", *(f"--cfg={key}:{value}" for key, value in PLAIN.items())])
    zone = NetZone.create_full_zone("zone")
    links = {
        name: zone.create_link(name, bandwidth).set_latency(latency)
        for name, (bandwidth, latency) in problem["links"].items()
    }

    def send(i, source, dest, nbytes, start):
        this_actor.sleep_until(start)
        Comm.sendto_async(source, dest, nbytes).wait()
        finish[i] = Engine.clock

    for i, (route, nbytes, start) in enumerate(problem["flows"]):
        source, dest = zone.create_host(f"source {i}", 1e9), zone.create_host(f"dest {i}", 1e9)
        hops = [LinkInRoute(links[name]) for name in route]
        zone.add_route(source.netpoint, dest.netpoint, None, None, hops, False)
        finish.append(None)
        Actor.create(f"flow {i}", source, send, i, source, dest, nbytes, start)
    zone.seal()
    engine.run()
    print(json.dumps(finish))


if __name__ == "__main__":
    main()
