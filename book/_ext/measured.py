"""Measure the claims of every system, in parallel, and again only when a claim or the toolkit under it has changed."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context

import freshness
from chapters import ROOT
from toolkit.claims import Verdict, run_claims, systems


@cache
def measured():
    """Verdicts of every system that has claims: {(part, system): list of Verdict}."""
    paths = {place: cached(*place) for place in systems()}
    stale = [place for place, path in paths.items() if not path.exists()]
    if stale:
        print(f"claims: {len(stale)} of {len(paths)} systems to measure", flush=True)
        fresh = get_context("spawn")  # a fork would inherit numba's threads
        with ProcessPoolExecutor(max_workers=min(len(stale), os.cpu_count() or 1), mp_context=fresh) as pool:
            jobs = {place: pool.submit(_measure, place, paths[place]) for place in stale}
            for place, job in jobs.items():
                _finish(place, job)
    return {place: [Verdict(**verdict) for verdict in json.loads(path.read_text())] for place, path in paths.items()}


def _finish(place, job):
    try:
        job.result()
    except BrokenProcessPool:  # killed, most likely for its memory; a claim that only raises is a verdict
        raise SystemExit(f"measuring died, look at: python -m toolkit claims --system {place[1]}") from None


def cached(part, system, root=ROOT):
    """Where the verdicts of a system, as everything is now, lie or will lie."""
    digest = freshness.digest(b"", f"import toolkit.claims.{part}.{system}", root)
    return root / "_build" / "claims" / f"{part}-{system}-{digest}.json"


def _measure(place, target):
    part, system = place
    verdicts = [asdict(verdict) for verdict in run_claims(system, progress=False)]
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{part}-{system}-*.json"):
        old.unlink()
    target.write_text(json.dumps(verdicts))
