"""The same programs on real GPUs: torch tensors, NCCL, one process a GPU, started by torchrun.

    from toolkit.runtime import gpu
    run = gpu.Cluster().run(program, shard(q, axis=1), causal=True)      # in every process; rank 0 gets the Run

NCCL wants to know every shape beforehand, and it matches messages by their order alone. So the program first runs
without data, on the virtual machine: that run is the plan (`plan`). From then on nothing waits for the host: messages
that are posted together leave as one NCCL group, right before the next kernel is launched or somebody waits, on a
stream of their own; `wait()` makes the next kernel wait, not the program. Since nothing waits for the host, a whole
run can also be recorded once, as a CUDA graph, and then replayed: the host takes no part in it any more.

Times are the GPU's, by events. A machine without GPUs runs the same code with gloo on tensors of the CPU.
Needs: pip install '.[gpu]'. Limits: no source=ANY, no message whose shape depends on data, no timeouts.
"""

import atexit
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from . import topology
from .arrays import like, with_parts
from .cluster import Run, own
from .errors import RuntimeFault
from .gpu_machine import GpuMachine, torch_dtype
from .hardware import IDEAL, NVLINK4
from .plan import execute, form, plan
from .trace import Trace


class Cluster:
    """The processes that torchrun started, one rank and one GPU each."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        self.place = torch.device("cpu")
        if self.cuda:
            self.place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.place)
            urgent = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # before kernels that wait
            dist.init_process_group("nccl", device_id=self.place, pg_options=urgent)
        else:
            dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.topology = topology.switch(self.size, NVLINK4)
        self.device, self.devices = IDEAL, [IDEAL] * self.size
        self._plans = {}

    def run(self, program, *args, **options):
        """Run `program(comm, …)` on every GPU; all processes call this, with arguments as for the virtual cluster.

        returns   Run: outputs as numpy arrays and times of all ranks, in rank 0; None in the others
        raises    whatever the program raises; torchrun then ends the other processes
        """
        machine, output = self.prepare(program, args, options)()
        mine = _to_numpy(output), machine.trace, machine.makespan, machine.peak
        parts = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, parts, 0, group=self._gloo())
        if self.rank:
            return None
        outputs, traces, makespans, peaks = zip(*parts, strict=True)
        trace = Trace()
        for part in traces:
            trace.add(part)
        memories = [SimpleNamespace(peak=peak, history=lambda: (np.zeros(0), np.zeros(0))) for peak in peaks]
        return Run(self, list(outputs), trace, max(makespans), memories)

    def prepare(self, program, args, options, graph=False):
        """Plan a run and bring its arguments to this GPU.

        graph     record the run as a CUDA graph: kernels and messages then start without the host
        returns   a function that runs once: this rank's GpuMachine, its trace complete, and its output as tensors
        """
        key = (program, tuple(form(a) for a in args), tuple((k, form(v)) for k, v in options.items()))
        if key not in self._plans:
            self._plans[key] = plan(program, args, options, self.size)
        mine = [self._placed(own(a, self.rank, self.size)) for a in args]

        def enqueue():
            machine = GpuMachine(self, *self._plans[key])
            self.align()
            machine.begin()
            outputs = execute(machine, [machine.processor], program, mine, options)
            machine.end()
            return machine, outputs[self.rank]

        enqueue = self.recorded(enqueue) if graph else enqueue

        def once():
            dist.barrier()
            machine, output = enqueue()
            machine.read()
            return machine, output

        return once

    def recorded(self, enqueue):
        """What `enqueue` lets the GPU do, as a CUDA graph: a function that replays it and gives the same result.

        `enqueue` runs twice: communicators and compiled kernels must be there before it is recorded.
        """
        if not self.cuda:
            raise RuntimeFault("a CUDA graph needs a GPU: run without graph=True")
        enqueue()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread may go on
            result = enqueue()

        def replay():
            graph.replay()
            return result

        replay.reads = enqueue  # whose tensors must live as long as the graph
        return replay

    def align(self):
        """No GPU goes on before all have come."""
        if self.cuda:
            dist.all_reduce(self.empty(like((1,), "float32")).zero_())
        else:
            dist.barrier()

    def __repr__(self):
        kind = torch.cuda.get_device_name() if self.cuda else "CPU process (no GPU here)"
        return f"{self.size} × {kind}"

    def _placed(self, value):
        if isinstance(value, tuple):
            return with_parts(value, map(self._placed, value))
        return torch.from_numpy(value).to(self.place) if isinstance(value, np.ndarray) else value

    def empty(self, spec):
        """Room for an array of that shape and dtype."""
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=self.place)

    def _gloo(self):
        if not hasattr(self, "_cpu_group"):
            self._cpu_group = dist.new_group(backend="gloo")
        return self._cpu_group


def _to_numpy(value):
    if isinstance(value, (tuple, list)):
        return tuple(map(_to_numpy, value))
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value
