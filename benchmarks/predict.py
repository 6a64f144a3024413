"""What the virtual machine says of the rows that benchmarks/gpus.py times.

    python benchmarks/predict.py results/h100x2_nvlink.json                       compared with what was measured there
    python benchmarks/predict.py results/h100x2_nvlink.json --world 4 --out FILE  before a run, on so many GPUs

A prediction knows nothing of the rows it predicts: kernels, messages and copies are fitted to "micro" and "beside".
"""

import argparse
from dataclasses import replace

import numpy as np

from toolkit.runtime import calibration, measurements
from toolkit.runtime.measurements import Row
from toolkit.sequence_parallel._real_machines import ALGORITHMS, ALL_REDUCE, FAR, off, predict, results, rows, save

TOKENS = [8192, 16384, 32768, 65536, 131072]


def all_reduce(calibrated, world):
    """Seconds of an all-reduce of so many bytes on each rank."""
    machine, sizes = replace(calibrated, world=world), [{"bytes_per_rank_input": n} for n in ALL_REDUCE]
    return [{**size, "predicted": machine.predict(Row("all_reduce", size, 1.0, 1.0, 1.0))} for size in sizes]


def compare(timed):
    print(f"{'algorithm':28}{'tokens':>8}{'kv':>4}   measured  predicted  ratio   exposed (predicted), ms")
    for row in timed:
        name = row["algorithm"] + " backward" * row["backward"]
        keys = ("median", "predicted", "exposed", "predicted exposed")
        seen, said, bare, said_bare = (1e3 * row[key] for key in keys)
        print(f"{name:28}{row['tokens']:8}{row['kv_heads']:4}{seen:11.3f}{said:11.3f}{said / seen:7.2f}", end="")
        print(f"{bare:10.3f} ({said_bare:.3f})")
    for name in ALGORITHMS:
        errors = [off(row) for row in timed if row["algorithm"] == name]
        mean, worst = (f"{np.expm1(error):6.1%}" for error in (np.mean(errors), max(errors)))
        far = f"{sum(error > FAR for error in errors)} of {len(errors)} rows off by more than a factor of 1.15"
        print(f"{name:20} geometric mean error {mean}, largest {worst}, {far}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help='a file that gpus.py wrote, with "micro"')
    parser.add_argument("--world", type=int, help="predict a run on so many GPUs")
    parser.add_argument("--out", help="where to write that prediction")
    options = parser.parse_args()
    if not options.world:
        return compare(results(options.source)[2])
    if not options.out:
        parser.error("--world needs --out")
    measured = measurements.load(options.source)
    calibrated = calibration.fit(measured)
    save({
        "fit": f"{measured.name}: {measured.world} × {measured.gpu}, {measured.environment}",
        "world": options.world, "units": "seconds", "algorithms": predict(calibrated, rows(TOKENS), options.world),
        "all_reduce": all_reduce(calibrated, options.world),
    }, options.out)  # fmt: skip


if __name__ == "__main__":
    main()
