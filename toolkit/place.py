"""Where to put a GPT on a cluster: every grid, schedule, recomputation and ZeRO stage; the best, and why.

    python -m toolkit place --model gpt-175b --cluster a100x1024

What is searched and assumed: `toolkit.model_parallel._planner` and `_megatron_scale`. Nothing overlaps, as in the code
of 2021. With --overlap, what ZeRO's stages 2 and 3 move travels beside the products.
Chapter: model_parallel/place_a_model.
"""

import re

from toolkit.model_parallel._megatron_pieces import MACHINES
from toolkit.model_parallel._megatron_scale import Job
from toolkit.model_parallel._planner import EFFICIENCY, GPTS, memory, model_share, search
from toolkit.model_parallel._planner_why import parts, why
from toolkit.runtime.units import seconds, size


def add_command(commands):
    """`place` among the subcommands of argparse."""
    parser = commands.add_parser("place", help="where to put a GPT on a cluster: grid, schedule, recomputation, ZeRO")
    parser.add_argument("--model", required=True, help=", ".join(GPTS))
    parser.add_argument("--cluster", required=True, help=f"device x count, as a100x1024: {', '.join(MACHINES)}")
    parser.add_argument("--batch", type=int, default=1536, help="sequences of 2 048 tokens (default: 1 536)")
    parser.add_argument("--overlap", action="store_true", help="what ZeRO's stages 2 and 3 move hides behind products")
    parser.set_defaults(go=run_place)


def run_place(options):
    """Print the ten fastest placements, why the first is, and what was refused.

    raises   ValueError  unknown model or device, or a number below 1
    """
    if options.model not in GPTS:
        raise ValueError(f"there is no model {options.model!r}; choose from {', '.join(GPTS)}")
    found = re.fullmatch(r"([a-z]+\d+)x([1-9]\d*)", options.cluster)
    if not found or found[1] not in MACHINES:
        known = " or ".join(MACHINES)
        raise ValueError(f"cluster {options.cluster!r}: write {known}, x, and how many, as in a100x1024")
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: give a whole number above 0")
    job = Job(*GPTS[options.model], options.batch, overlap=options.overlap, machine=found[1])
    print(report(options.model, job, int(found[2]), search(job, int(found[2]), EFFICIENCY)))


HEADERS = ("", "t × p × d", "b", "schedule", "run again", "ZeRO", "step", "of peak", "idle", "memory")


def report(name, job, devices, found):
    """What `run_place` prints, as text."""
    from toolkit.show import text

    device, refused = MACHINES[job.machine].device, found.refused
    lines = [f"{name}, {job.batch:,} sequences of {job.s:,} tokens on {devices:,} × {device.name}", ""]
    if found.steps:
        lines.append(text.table([_row(place, step) for place, step in enumerate(found.steps, 1)], HEADERS))
        lines += ["", *(f"1 against {place}: {why(found.steps[0], step, EFFICIENCY)}."
                        for place, step in enumerate(found.steps[1:], 2))]  # fmt: skip
    else:
        lines.append("No placement fits.")
    fit, out = found.bounded, refused.total()
    told = f"{fit + out:,} placements: {out:,} refused, {fit:,} fit, {found.timed:,} timed, the others slower."
    lines += ["", told, "Refused:"]
    lines += [f"-  {count:,}: {reason}" for reason, count in refused.most_common(6)]
    return "\n".join(lines)


def _row(place, step):
    job = step.job
    schedule = "one stage" if job.p == 1 else f"{job.kind}, v = {job.v}" if job.v > 1 else job.kind
    idle = parts(step, EFFICIENCY)["idle"] / step.seconds
    return (
        place, f"{job.t} × {job.p} × {job.d}", job.b, schedule, job.recompute, job.zero, seconds(step.seconds),
        f"{model_share(step):.0%}", f"{idle:.0%}", size(memory(job, EFFICIENCY).total),
    )  # fmt: skip
