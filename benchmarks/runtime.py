"""Race: messages a second of the virtual runtime, and of SimGrid's SMPI on the same ring, in one run.

    python benchmarks/runtime.py [--ranks 64 256 1024] [--steps 100] [--bytes 1000] [--repetitions 3]

Every rank sends to the next and receives from the last, `--steps` times, through a switch, with the fluid network on:
ranks × steps messages. Ours runs shape-only. SMPI runs a C program with MPI_Sendrecv in rendezvous mode under the plain
CM02 model; its payload is small, so that copying it does not count. The two take turns; times are CPU seconds, user and
system, the best of the repetitions (both use one core), and `ratio` is their quotient: above 1 we are faster. Ours
counts `cluster.run`, theirs the whole of `smpirun` less that of a run without messages. The two virtual times must
agree to 1e-6. A second table runs ring attention once round, shape-only: ranks × (ranks - 1) messages of keys and
values, and twice as many kernel calls. Time per message should not grow with the ranks.
SMPI needs smpicc and smpirun (Debian: libsimgrid-dev); without them ours runs alone.
"""

import argparse
import re
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path
from time import process_time

from toolkit.runtime import Cluster, hardware, like, shard, topology
from toolkit.sequence_parallel import ring_attention

LINK = hardware.Link(bandwidth=50e9, latency=1e-6)
HEADER = 16  # bytes that SMPI adds to every message; ours sends them too

RING_IN_C = r"""
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
    int rank, size, steps = atoi(argv[1]), bytes = atoi(argv[2]);
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    char *out = calloc(bytes, 1), *in = calloc(bytes, 1);
    double start = MPI_Wtime();
    for (int step = 0; step < steps; step++)
        MPI_Sendrecv(out, bytes, MPI_CHAR, (rank + 1) % size, 0, in, bytes, MPI_CHAR, (rank + size - 1) % size, 0,
                     MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    if (rank == 0) printf("virtual %.12e\n", MPI_Wtime() - start);
    MPI_Finalize();
    return 0;
}
"""

PLATFORM = """<?xml version='1.0'?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="switch" prefix="h" suffix="" radical="0-{last}" speed="1Gf" bw="{bandwidth}Bps" lat="{latency}s"/>
</platform>
"""

PLAIN = {  # bytes / bandwidth + latency, rendezvous, and nothing else
    "network/model": "CM02",
    "network/crosstraffic": 0,
    "network/TCP-gamma": 0,
    "network/weight-S": 0,
    "network/bandwidth-factor": 1,
    "network/latency-factor": 1,
    "smpi/async-small-thresh": 0,
    "smpi/send-is-detached-thresh": 0,
    "smpi/simulate-computation": "no",
    "smpi/wtime": 0,
    "surf/precision": 1e-12,
}


def ring(comm, x, *, steps):
    for _ in range(steps):
        x = comm.ishift(x).wait()


def attention_once_round(ranks):
    """(CPU seconds, virtual seconds) of ring attention, shape-only, 1 024 tokens a rank."""
    cluster = Cluster(topology.switch(ranks, hardware.NVLINK4), device=hardware.H100)
    x = shard(like((32, 1024 * ranks, 128), "float16"), axis=1)
    start = process_time()
    run = cluster.run(ring_attention.attention, x, x, x)
    return process_time() - start, run.makespan


def ours(ranks, steps, nbytes):
    """(CPU seconds, virtual seconds) of one shape-only run."""
    cluster = Cluster(topology.switch(ranks, LINK), device=hardware.IDEAL)
    start = process_time()
    run = cluster.run(ring, like(nbytes + HEADER, "uint8"), steps=steps)
    return process_time() - start, run.makespan


def children_seconds():
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Smpi:
    """The C ring, compiled, and a platform for each number of ranks, in a folder that is removed afterwards."""

    def __init__(self, folder):
        self.folder = Path(folder)
        (self.folder / "ring.c").write_text(RING_IN_C)
        subprocess.run(["smpicc", "-O2", "ring.c", "-o", "ring"], cwd=folder, check=True, capture_output=True)

    def run(self, ranks, steps, nbytes):
        """(CPU seconds of all of smpirun, virtual seconds)."""
        (self.folder / "platform.xml").write_text(
            PLATFORM.format(last=ranks - 1, bandwidth=LINK.bandwidth, latency=LINK.latency)
        )
        (self.folder / "hosts").write_text("".join(f"h{rank}\n" for rank in range(ranks)))
        command = ["smpirun", "-np", str(ranks), "-platform", "platform.xml", "-hostfile", "hosts"]
        command += ["--log=root.thresh:critical", *(f"--cfg={key}:{value}" for key, value in PLAIN.items())]
        start = children_seconds()
        done = subprocess.run(
            [*command, "./ring", str(steps), str(nbytes)], cwd=self.folder, check=True, capture_output=True, text=True
        )
        return children_seconds() - start, float(re.search(r"virtual (\S+)", done.stdout)[1])


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--bytes", type=int, default=1000)
    options.add_argument("--repetitions", type=int, default=3)
    options = options.parse_args()
    ours(8, 2, options.bytes)  # compile
    with tempfile.TemporaryDirectory() as folder:
        smpi = Smpi(folder) if shutil.which("smpicc") and shutil.which("smpirun") else None
        print("ranks  messages   ours s  messages/s   SMPI s  messages/s   ratio   virtual ms")
        for ranks in options.ranks:
            messages, mine, theirs, idle = ranks * options.steps, [], [], []
            for _ in range(options.repetitions):
                cpu, virtual = ours(ranks, options.steps, options.bytes)
                mine.append(cpu)
                if smpi:
                    cpu, also_virtual = smpi.run(ranks, options.steps, options.bytes)
                    assert abs(also_virtual / virtual - 1) < 1e-6, f"SMPI says {also_virtual} s, we say {virtual} s"
                    theirs.append(cpu)
                    idle.append(smpi.run(ranks, 0, options.bytes)[0])
            row = f"{ranks:5} {messages:9,} {min(mine):8.2f} {messages / min(mine):11,.0f} "
            if smpi:
                race = min(theirs) - min(idle)
                row += f"{race:8.2f} {messages / race:11,.0f} {race / min(mine):7.2f} "
            else:
                row += f"{'no smpirun here':>28} "
            print(f"{row}{virtual * 1e3:12.3f}", flush=True)
    print("\nring attention\nranks  messages   seconds  messages/s   µs a message   virtual ms")
    for ranks in options.ranks:
        messages, (cpu, virtual) = ranks * (ranks - 1), attention_once_round(ranks)
        row = f"{ranks:5} {messages:9,} {cpu:9.2f} {messages / cpu:11,.0f} {1e6 * cpu / messages:14.1f}"
        print(f"{row} {virtual * 1e3:12.3f}", flush=True)
    print(f"largest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
