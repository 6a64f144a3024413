"""Real MPI processes give what the virtual machine gives, and end with a clear word when something goes wrong."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from runtime import real_programs
from toolkit.runtime import Cluster, hardware, topology

pytest.importorskip("mpi4py", reason="real processes need pip install '.[mpi]'")
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
if MPIEXEC is None:
    pytest.skip("no mpiexec here: pip install '.[mpi]'", allow_module_level=True)

ENVIRONMENT = {**os.environ, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# Sums in MPI's own order, or in that of arrival; sums of ranks in systems that leave them to the engine.
REORDERED = ("all_reduce, None", "reduce, None", "reduce_scatter, None", "anyone", "all-gather, backward", "ByteScale",
             "FSMoE", "GNNPipe", "ladder residual", "LASP-2H", "LightSeq, layers", "Megatron-LM", "ring self-attention",
             "three-level partitioning", "TransMLA", "vocabulary", "ZeRO")  # fmt: skip


def mpiexec(ranks, *command, timeout=300):
    """(exit status, what was printed, seconds)."""
    start = monotonic()
    done = subprocess.run(
        [MPIEXEC, "-n", str(ranks), sys.executable, *map(str, command)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, monotonic() - start


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def real(request, tmp_path_factory):
    """(ranks, outputs of every program on so many processes)."""
    file = tmp_path_factory.mktemp("mpi") / "outputs"
    status, said, _ = mpiexec(request.param, real_programs.__file__, "mpi", file)
    assert status == 0, said
    return request.param, pickle.loads(file.read_bytes())


@pytest.mark.parametrize("name", real_programs.programs(1))
def test_processes_give_the_bits_of_the_virtual_machine(real, name):
    ranks, outputs = real
    ours, theirs = real_programs.flat(real_programs.virtual(name, ranks)), real_programs.flat(outputs[name])
    assert [np.shape(a) for a in ours] == [np.shape(a) for a in theirs]
    tolerance = 1e-12 if name.startswith(REORDERED) else 0
    for mine, other in zip(ours, theirs, strict=True):
        if mine is None:
            assert other is None
        else:
            np.testing.assert_allclose(other, mine, rtol=tolerance, atol=tolerance)
            assert other.dtype == mine.dtype


MISTAKES = {
    "raise": ("if comm.rank == 1:\n        raise ValueError('boom')", "rank 1 of 2", "ValueError: boom"),
    "mismatch": (
        "comm.all_reduce(x) if comm.rank else comm.broadcast(x)",
        "CollectiveMismatch",
        "rank 0   broadcast()   mistake.py:8",
    ),
    "different shapes": ("comm.all_reduce(x[comm.rank :])", "CollectiveMismatch", "shape=(9,)"),
    "one does not enter": ("if comm.rank:\n        comm.barrier()", "DeadlockError", "recv(source=0) in signatures"),
    "deadlock": ("comm.recv(1 - comm.rank)", "DeadlockError", "mistake.py:8"),
    "killed": ("if comm.rank == 1:\n        os.kill(os.getpid(), 9)", "EXIT CODE: 9", "EXIT CODE: 9"),
    "written while sent": ("comm.isend(x, 1 - comm.rank)\n    x[0] = 2", "BufferInUse", "posted at mistake.py:8"),
    "never received": ("comm.isend(x[:2], 1 - comm.rank)\n    return", "UnreceivedMessage", "mistake.py:8"),
    "shape-only": ("comm.isend(like(x), 1 - comm.rank)", "DtypeError", "real processes need data"),
}
PROGRAM = """import os
import numpy as np
from toolkit.runtime import like, mpi


def program(comm):
    x = np.ones(10)
    {}
    comm.recv(1 - comm.rank)


mpi.Cluster(debug=True, patience=3).run(program)
"""


@pytest.mark.parametrize(("mistake", "error", "place"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_all_processes_with_its_name_and_place(tmp_path, mistake, error, place):
    file = tmp_path / "mistake.py"
    file.write_text(PROGRAM.format(mistake))
    status, said, seconds = mpiexec(2, file, timeout=60)
    assert status != 0
    assert error in said and place in said
    assert seconds < 30  # patience is 3 s; start-up on a busy machine takes the rest


def test_exflow_refuses_a_store_that_would_have_to_lie_in_one_process():
    program, args, options = real_programs.programs(2)["ExFlow, kv"]
    cluster = Cluster(topology.full_mesh(2, hardware.NVLINK4))
    with pytest.raises(ValueError, match="a store that all ranks share"):
        cluster.run(program, *args, **options | {"coherence": "ids"})


def test_the_command_line_runs_a_system_on_processes():
    status, said, _ = mpiexec(2, "-m", "toolkit", "run", "token_ring", "--backend", "mpi", "--tokens", "64")
    assert status == 0, said
    assert "2 real processes" in said and said.count("largest difference to one device") == 1


def test_the_command_line_refuses_another_number_of_devices():
    status, said, _ = mpiexec(2, "-m", "toolkit", "run", "token_ring", "--backend", "mpi", "--devices", "3")
    assert status != 0 and "2 processes were started" in said
