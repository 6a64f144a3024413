"""The command line: `python -m toolkit systems | run | recommend | place | claims | calibrate`."""

import argparse
import inspect
import sys
from dataclasses import replace
from functools import partial

import numpy as np

from toolkit import place, recommend
from toolkit.runtime import Cluster, hardware, like, shard, topology
from toolkit.runtime.errors import RuntimeFault
from toolkit.runtime.units import seconds, size
from toolkit.systems import find, systems


class Parser(argparse.ArgumentParser):
    """Bad arguments: one clear line, exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments=None):
    parser = Parser(prog="python -m toolkit", description="The Communication Bottleneck, from the command line.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("systems", help="every system: part, paper, chapter").set_defaults(go=list_systems)
    _add_run(commands)
    recommend.add_command(commands)
    place.add_command(commands)
    claims = commands.add_parser("claims", help="what the papers claim beside what we measure")
    claims.add_argument("--system", help="only this system")
    claims.set_defaults(go=run_claims)
    calibrate = commands.add_parser("calibrate", help="fit a machine to timings, and print how far off every row stays")
    calibrate.add_argument("file", metavar="FILE", help="measurements as JSON; see toolkit/runtime/measurements.py")
    calibrate.set_defaults(go=run_calibrate)
    options = parser.parse_args(arguments)
    try:
        options.go(options)
    except (RuntimeFault, ValueError) as error:
        parser.error(str(error).replace("\n", "; "))


def list_systems(_):
    from toolkit.show import text

    print(
        text.table(
            [(s.title, s.part, s.source.split("; ")[0], s.chapter) for s in systems()],
            ("system", "part", "paper", "chapter"),
        )
    )


def run_claims(options):
    from toolkit.claims import run_claims
    from toolkit.show import text

    system = find(options.system).name if options.system else None
    print(text.claims(run_claims(system)))


def run_calibrate(options):
    from toolkit.runtime.calibration import run_calibrate

    run_calibrate(options.file)


# ---- run -----------------------------------------------------------------------------------------------------------


def _add_run(commands):
    run = commands.add_parser("run", help="run one system on a machine you describe")
    run.add_argument("system", help="for example token_ring, or ring_attention:bidirectional_attention")
    run.add_argument("--compare", nargs="+", default=[], metavar="SYSTEM", help="other systems on the same machine")
    run.add_argument("--devices", type=_count, help="ranks; 4 if not given, and with --backend mpi what mpiexec starts")
    run.add_argument("--backend", choices=["virtual", "mpi", "nccl"], default="virtual",
                     help="mpi: real processes of mpiexec; nccl: GPUs of torchrun")
    run.add_argument("--debug", action="store_true", help="with mpi: check that all ranks agree on each collective")
    run.add_argument("--tokens", type=_count, default=4096, help="of all ranks together")
    run.add_argument("--heads", type=_count, default=8)
    run.add_argument("--kv-heads", type=_count, help="fewer than --heads: grouped queries (default: as many)")
    run.add_argument("--head-dim", type=_count, default=64)
    run.add_argument("--dtype", choices=["float16", "float32", "float64"], help="float32 if not given, on GPUs float16")
    run.add_argument("--causal", action="store_true")
    run.add_argument("--layout", choices=["contiguous", "zigzag", "striped"], default="contiguous")
    run.add_argument("--device", type=_one_of(hardware.devices()), default="H100", help=", ".join(hardware.devices()))
    run.add_argument("--topology", choices=list(MACHINES), default="mesh")
    run.add_argument("--link", type=_one_of(hardware.links()), help=", ".join(hardware.links()))
    run.add_argument(
        "--bandwidth", type=float, metavar="GB/S", help="of the link in each direction, instead of its own"
    )
    run.add_argument("--shape-only", action="store_true", help="no data: any size runs in seconds")
    run.add_argument("--perfetto", metavar="FILE", help="write the first system's trace for ui.perfetto.dev")
    run.set_defaults(go=run_system)


def _count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _one_of(known):
    def choose(name):
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return name

    return choose


def _pairs(n, link):
    if n % 2:
        raise ValueError(f"--topology pcie has 2 GPUs a switch, so --devices must be even, not {n}")
    return topology.pcie_tree(n // 2, 2, link)


def _nodes(n, link):
    if n % 8:
        raise ValueError(f"--topology nodes has 8 GPUs a node, so --devices must be a multiple of 8, not {n}")
    return topology.two_level(n // 8, 8, link, hardware.IB_NDR, inside="switch")


MACHINES = {  # name -> (builder, default link)
    "mesh": (topology.full_mesh, "NVLINK4"),
    "switch": (topology.switch, "NVLINK4"),
    "ring": (topology.ring, "NVLINK4"),
    "pcie": (_pairs, "PCIE4"),
    "nodes": (_nodes, "NVLINK4"),
}


def run_system(options):
    from toolkit.show import text

    programs = {name: _program(name, options) for name in [options.system, *options.compare]}
    cluster = (_cluster if options.backend == "virtual" else _processes)(options)
    options.dtype = options.dtype or ("float16" if getattr(cluster, "cuda", False) else "float32")
    arrays = _arrays(options)
    shards = [shard(a, axis=1, layout=options.layout) for a in arrays]
    for _ in range(1 if options.backend == "virtual" else 2):  # real kernels compile in a first run
        runs = {name: cluster.run(program, *shards) for name, program in programs.items()}
    if None in runs.values():
        return  # rank 0 tells
    machine = f"{cluster.topology.name} of {cluster.device.name}" if options.backend == "virtual" else cluster
    print(f"{machine}, {options.tokens:,} tokens, {options.heads} heads of "
          f"{options.head_dim}, {options.dtype}{', causal ' + options.layout if options.causal else ''}\n")  # fmt: skip
    print(text.table([_row(name, run) for name, run in runs.items()], HEADERS))
    if not options.shape_only:
        print("\n" + "\n".join(_check(name, programs[name], run, arrays, options) for name, run in runs.items()))
    for name, run in runs.items():
        print(f"\n{name}\n{text.timeline(run)}")
    if options.perfetto:
        runs[options.system].save_perfetto(options.perfetto)
        print(f"\nwrote {options.perfetto}: open it at ui.perfetto.dev")


def _program(name, options):
    """The system's program with mask and layout set, as far as it takes them."""
    system, _, function = name.partition(":")
    program = getattr(find(system).module(), function or "attention", None)
    takes = inspect.signature(program).parameters if callable(program) else {}
    needs = [name for name, value in takes.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD]
    if needs != ["comm", "q", "k", "v"]:
        raise ValueError(f"{system} has no program {function or 'attention'!r} that ranks run on q, k and v")
    asked = {"causal": options.causal, "layout": options.layout}
    for option, usual in (("causal", False), ("layout", "contiguous")):
        if option not in takes and asked.pop(option) != usual:
            raise ValueError(f"{name} does not take --{option}: leave it out")
    return partial(program, **asked)


def _cluster(options):
    build, default = MACHINES[options.topology]
    link = hardware.links()[options.link or default]
    if options.bandwidth is not None:
        link = replace(link, bandwidth=options.bandwidth * 1e9)
    return Cluster(build(options.devices or 4, link), device=hardware.devices()[options.device])


def _processes(options):
    """The ranks that mpiexec or torchrun started."""
    if options.shape_only:
        raise ValueError(f"--shape-only runs on the virtual machine; --backend {options.backend} needs data")
    if options.backend == "mpi":
        from toolkit.runtime import mpi

        cluster = mpi.Cluster(debug=options.debug)
    else:
        from toolkit.runtime import gpu

        cluster = gpu.Cluster()
    if options.devices not in (None, cluster.size):
        raise ValueError(f"--devices {options.devices}, but {cluster.size} processes were started")
    return cluster


def _arrays(options):
    kv_heads = options.kv_heads or options.heads
    shapes = [(h, options.tokens, options.head_dim) for h in (options.heads, kv_heads, kv_heads)]
    if options.shape_only:
        return [like(shape, options.dtype) for shape in shapes]
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(options.dtype) for shape in shapes]


HEADERS = (
    "system",
    "step time",
    "exposed communication",
    "sent by a rank",
    "busiest link, each way",
    "peak memory a rank",
)


def _row(name, run):
    sent = {}
    for event in run.trace:
        if event.kind == "send" and event.rank == 0:
            sent[event.name] = sent.get(event.name, 0) + event.bytes
    links = run.traffic.by_link
    u, v = max(links, key=links.get, default=(None, None))
    nothing = "not recorded" if hasattr(run.cluster, "cuda") else "nothing"  # NCCL does not say when a message moves
    return (
        name,
        seconds(run.makespan),
        seconds(run.exposed()),
        ", ".join(f"{channel} {size(n)}" for channel, n in sent.items()) or nothing,
        f"{size(links[u, v])} / {size(links.get((v, u), 0))}" if links else nothing,
        size(max(run.peak_memory)),
    )


def _check(name, program, run, arrays, options):
    alone = Cluster(topology.full_mesh(1, hardware.NVLINK4)).run(program, *(a.astype(np.float64) for a in arrays))
    error = np.abs(run.gather(axis=1, layout=options.layout) - alone.outputs[0]).max()
    return f"{name}: largest difference to one device in float64: {error:.1e}"


if __name__ == "__main__":
    sys.exit(main())
