"""What the virtual machine says of the rows that benchmarks/gpus.py times.

    python benchmarks/predict.py results/x2_nvlink.json        fit to the file's "micro" rows, compare with the others
    python benchmarks/predict.py nvlink --world 4 --out FILE   before a run: from a fit that the book ships

A prediction knows nothing of the rows it predicts: kernels, messages and copies are fitted to "micro" alone.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from toolkit.runtime import calibration, measurements
from toolkit.runtime.measurements import Row
from toolkit.sequence_parallel._real_machines import ALGORITHMS, ALL_REDUCE, predicted, rows

TOKENS = [8192, 16384, 32768, 65536, 131072]

def predict(calibrated, asked, world):
    """The rows with "predicted" and "predicted exposed" seconds."""
    found = []
    for row in asked:
        run = predicted(calibrated, row, world)
        found.append({**row, "predicted": run.makespan, "predicted exposed": run.exposed()})
    return found


def all_reduce(calibrated, world):
    """Seconds of an all-reduce of so many bytes on each rank."""
    machine, sizes = replace(calibrated, world=world), [{"bytes_per_rank_input": n} for n in ALL_REDUCE]
    return [{**size, "predicted": machine.predict(Row("all_reduce", size, 1.0, 1.0, 1.0))} for size in sizes]


def compare(path):
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    calibrated = calibration.fit(measurements.load(path))
    timed = predict(calibrated, content["algorithms"], content["world"])
    print(f"{'algorithm':28}{'tokens':>8}{'kv':>4}   measured  predicted  ratio   exposed (predicted), ms")
    for row in timed:
        name = row["algorithm"] + " backward" * row["backward"]
        keys = ("median", "predicted", "exposed", "predicted exposed")
        seen, said, bare, said_bare = (1e3 * row[key] for key in keys)
        print(f"{name:28}{row['tokens']:8}{row['kv_heads']:4}{seen:11.3f}{said:11.3f}{said / seen:7.2f}", end="")
        print(f"{bare:10.3f} ({said_bare:.3f})")
    for name in ALGORITHMS:
        ratios = [abs(np.log(r["predicted"] / r["median"])) for r in timed if r["algorithm"] == name]
        print(f"{name:28} geometric mean error {np.expm1(np.mean(ratios)):.1%}, largest {np.expm1(max(ratios)):.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", help="a file that gpus.py wrote, or a fit of the book: nvlink, host_memory, one_channel"
    )
    parser.add_argument("--world", type=int, help="predict a run on so many GPUs")
    parser.add_argument("--out", help="where to write that prediction")
    options = parser.parse_args()
    if not options.world:
        return compare(options.source)
    if not options.out or options.source not in measurements.shipped():
        parser.error(f"--world needs --out and a fit of the book, one of {', '.join(measurements.shipped())}")
    calibrated = calibration.fit(measurements.shipped()[options.source])
    result = {
        "fit": f"two H200, {options.source}", "world": options.world, "units": "seconds",
        "algorithms": predict(calibrated, rows(TOKENS), options.world),
        "all_reduce": all_reduce(calibrated, options.world),
    }  # fmt: skip
    text = json.dumps(result).replace("}, {", "},\n{").replace("[{", "[\n{")  # a row a line
    Path(options.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
