"""The engine for GPUs gives the numbers of the virtual machine. Without a GPU it moves tensors of the CPU by gloo."""

import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import real_programs
from toolkit.runtime.errors import RuntimeFault

torch = pytest.importorskip("torch", reason="tensors need pip install '.[gpu]'")
from toolkit.runtime import gpu, gpu_machine  # noqa: E402  torch may be missing

NAMES = [name for name in real_programs.programs(1) if name not in real_programs.NUMPY_ONLY]
RANKS = range(2, torch.cuda.device_count() + 1) if torch.cuda.is_available() else (2, 3)
TOLERANCE = 2e-2 if torch.cuda.is_available() else 2e-6  # weights in float16 against float32 arithmetic


def torchrun(ranks, *command):
    """(exit status, what was printed)."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", params=RANKS)
def real(request, tmp_path_factory):
    """(ranks, outputs of every program on so many processes)."""
    file = tmp_path_factory.mktemp("gpu") / "outputs"
    status, said = torchrun(request.param, real_programs.__file__, "gpu", file)
    assert status == 0, said
    return request.param, pickle.loads(file.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_tensors_give_the_numbers_of_the_virtual_machine(real, name, monkeypatch):
    ranks, outputs = real
    if torch.cuda.is_available():
        monkeypatch.setattr(real_programs, "SHORT", "float16")
    ours, theirs = (real_programs.flat(outputs) for outputs in (real_programs.virtual(name, ranks), outputs[name]))
    assert [np.shape(a) for a in ours] == [np.shape(a) for a in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if mine is None:
            assert other is None
        else:
            tolerance = max(TOLERANCE, 2e-3 if "float16" in name or name == "wire" else 0)
            np.testing.assert_allclose(other, mine, rtol=tolerance, atol=tolerance)


FAILURES = {  # what rank 1 does while the others wait for it; what is said
    "raises": ("raise ValueError('boom')", ["raised on rank 1", "boom"]),
    "is killed": ("os.kill(os.getpid(), 9)", ["rank      : 1", "Signal 9"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_that_fails_ends_all_within_ten_seconds_and_is_named(tmp_path, failure):
    does, words = FAILURES[failure]
    file, last = tmp_path / "fails.py", tmp_path / "last"
    file.write_text(
        "import os, pathlib, time\nimport numpy as np\nfrom toolkit.runtime import gpu\n\n\ndef program(comm, x):\n"
        f"    if comm.rank == 1 and cluster.rank == 1 and running:\n        pathlib.Path({str(last)!r}).touch()\n"
        f"        {does}\n    comm.barrier()\n\n\nrunning = False\ncluster = gpu.Cluster()\n"
        "once = cluster.prepare(program, (np.ones(3),), {})\nrunning = True\nonce()\n"
    )
    status, said = torchrun(2, file)
    assert status != 0 and all(word in said for word in words)
    assert time.time() - last.stat().st_mtime < 10


def test_the_command_line_runs_a_system_on_tensors():
    status, said = torchrun(2, "-m", "toolkit", "run", "token_ring", "--backend", "nccl", "--tokens", "64")
    assert status == 0, said
    assert said.count("largest difference to one device") == 1 and "not recorded" in said


def test_a_graph_without_a_gpu_is_refused():
    with pytest.raises(RuntimeFault, match="needs a GPU"):
        gpu.Cluster.recorded(SimpleNamespace(cuda=False), print)


def test_kernels_that_run_at_the_same_time_count_once():
    kernels = [
        ("a", "compute", 0.0, 2.0),
        ("b", "compute", 1.0, 4.0),
        ("a", "compute", 1.5, 3.0),
        ("a", "compute", 6.0, 7.0),
    ]
    machine = SimpleNamespace(kernels=kernels, seconds=float)
    assert gpu_machine.GpuMachine.busy_seconds(machine) == 5.0
    assert gpu_machine.GpuMachine.kernel_seconds(machine) == {"a": 4.5, "b": 3.0}


def test_a_rank_waits_when_no_kernel_of_any_stream_runs():
    spans = [("side", 3.0, 5.0), ("main", 1.0, 4.0), ("main", 7.0, 8.0)]  # in order of launch
    machine = SimpleNamespace(
        kernels=[(name, "compute", *span) for name, *span in spans], seconds=float, last=9.0,
        cluster=SimpleNamespace(cuda=False, rank=0),
    )  # fmt: skip
    gpu_machine.GpuMachine.read(machine)
    waits = [(event.start, event.end) for event in machine.trace if event.kind == "wait"]
    assert waits == [(0.0, 1.0), (5.0, 7.0), (8.0, 9.0)]


def test_a_stream_waits_once_for_a_group_and_every_stream_does():
    waited = []
    group = gpu_machine.Group([SimpleNamespace(wait=lambda: waited.append(1))])
    for stream in ("main", "main", "side"):
        group.wait(stream)
    assert len(waited) == 2
