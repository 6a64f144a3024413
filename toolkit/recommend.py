"""Which sequence parallelism for this model, this length, this cluster: run them all, rank them, say why.

    python -m toolkit recommend --model llama-7b --tokens 1M --cluster h100x64

What runs, and what is assumed: `toolkit.sequence_parallel._compare`. Models and clusters: `toolkit.catalogue`.
Chapter: sequence_parallel/which_sequence_parallelism.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tqdm import tqdm

from toolkit import catalogue
from toolkit.runtime.units import seconds, size
from toolkit.sequence_parallel._compare import Refusal, Result, attempt, compare, nodes_of, ranked
from toolkit.sequence_parallel._methods import methods

__all__ = ["Refusal", "Result", "add_command", "compare", "reason", "report", "run_recommend"]

# ---- reasons ---------------------------------------------------------------------------------------------------------


def reason(result, frugal=None):
    """One sentence: where the time of a layer goes.

    frugal   the Result that computes least; None: not compared
    """
    lost, total = max(result.imbalance, result.waiting), result.seconds
    if lost < 0.05 * total:
        return _of_compute(result, frugal or result)
    if result.imbalance >= result.waiting:
        rank = result.computed.index(max(result.computed))
        computes = f"rank {rank} computes {seconds(result.computed[rank])}, the average {seconds(result.work)}"
        return f"unbalanced: {computes}, and all wait for it"
    link = result.busiest
    carries = f"{link.name} carries {size(link.bytes)}"
    if link.seconds > 0.8 * total:
        return f"bound by one link: {carries} and is busy {link.seconds / total:.0%} of the time"
    waits = f"waits {seconds(result.waiting)}, {result.waiting / total:.0%} of the time"
    if link.seconds > 0.5 * result.waiting:
        hides = "computation hides in part" if link.seconds > 1.25 * result.waiting else "nothing hides"
        return f"{waits}, for messages that {hides}: {carries}, {seconds(link.seconds)} at its speed"
    return f"{waits}, for messages that depend on each other: {carries}, only {seconds(link.seconds)} at its speed"


def _of_compute(result, frugal):
    link, share = result.busiest, result.work / result.seconds
    if result.work > 1.05 * frugal.work:
        more = f"{seconds(result.work - frugal.work)} more than {frugal.method}"
        return f"computes {share:.0%} of the time, {more}: smaller kernels, copies and merges"
    if not link.bytes:
        return f"computes {share:.0%} of the time and sends nothing"
    busy = f"busy {link.seconds / result.seconds:.0%} of it"
    return f"computes {share:.0%} of the time; {link.name} carries {size(link.bytes)} meanwhile, {busy}"


# ---- the command line ------------------------------------------------------------------------------------------------


def add_command(commands):
    """`recommend` among the subcommands of argparse."""
    parser = commands.add_parser("recommend", help="which sequence parallelism for a model, a length and a cluster")
    parser.add_argument("--model", required=True, help=", ".join(catalogue.MODELS))
    parser.add_argument("--tokens", required=True, help="of one sequence: 131072, 128k, 1M (k = 1 024, M = 1 024²)")
    parser.add_argument("--cluster", required=True, help=f"device x count, as h100x64: {', '.join(catalogue.DEVICES)}")
    parser.add_argument("--forward", action="store_true", help="a forward pass only, as for a prompt; else training")
    parser.set_defaults(go=run_recommend)


def run_recommend(options):
    """Print the ranked table, a reason for each row, and what is refused. Methods run on as many cores as there are."""
    model, tokens = catalogue.model(options.model), catalogue.tokens(options.tokens)
    cluster, training = catalogue.cluster(options.cluster), not options.forward
    names = [method.name for method in methods(nodes_of(cluster))]
    work = partial(_attempt, model=model, tokens=tokens, cluster=options.cluster, training=training)
    with ProcessPoolExecutor() as pool:
        found = tqdm(pool.map(work, names), total=len(names), desc="methods", leave=False, disable=None)
        results, refusals = ranked(found)
    print(report(model, tokens, cluster, results, refusals, training))


def _attempt(name, model, tokens, cluster, training):
    """`attempt` in another process, which builds the cluster from its name."""
    cluster = catalogue.cluster(cluster)
    method = next(method for method in methods(nodes_of(cluster)) if method.name == name)
    return attempt(method, model, tokens, cluster, training)


HEADERS = ("", "method", "a layer", "× best", "work", "imbalance", "waits", "sent by a rank", "busiest link", "memory")


def report(model, tokens, cluster, results, refusals, training=True):
    """What `run_recommend` prints, as text."""
    from toolkit.show import text

    device, capacity = cluster.device, size(cluster.device.memory_capacity)
    head = (
        f"{model.name} ({model.parameters / 1e9:.1f} billion weights), {tokens:,} tokens on {cluster.size} × "
        f"{device.name} ({cluster.topology.name}), {'training' if training else 'forward only'}, float16, causal"
    )
    lines = [head, ""]
    others, results = [one for one in results if not one.softmax], [one for one in results if one.softmax]
    if results:
        best, frugal = results[0], min(results, key=lambda result: result.work)
        rows = [_row(place, result, best) for place, result in enumerate(results, 1)]
        rows += [_row("*", result, best) for result in others]
        lines.append(text.table(rows, HEADERS))
        if others:
            lines.append("*  linear attention: another function, so it is not ranked; compare its time and bytes only")
        lines += ["", *(f"{i}  {r.method}: {reason(r, frugal)}." for i, r in enumerate(results, 1))]
        step = model.layers * best.seconds
        lines += ["", f"Best: {best.method}, {seconds(step)} for {model.layers} layers, {tokens / step:,.0f} tokens/s; "
                      f"{size(best.memory)} of {capacity} a device."]  # fmt: skip
    else:
        lines.append("No method can run this.")
    if refusals:
        together = {}
        for refusal in refusals:
            together.setdefault(refusal.why, []).append(refusal.method)
        lines += ["", "Refused:", *(f"-  {'; '.join(names)}: {why}." for why, names in together.items())]
    return "\n".join(lines)


def _row(place, result, best):
    link = result.busiest
    return (
        place, result.method, seconds(result.seconds), f"{result.seconds / best.seconds:.2f}", seconds(result.work),
        seconds(result.imbalance), seconds(result.waiting), size(result.sent),
        f"{size(link.bytes)}, busy {link.seconds / result.seconds:.0%}", size(result.memory),
    )  # fmt: skip
