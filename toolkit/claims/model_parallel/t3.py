"""T3's claims, on sublayers of the paper's models: GEMM, reduce-scatter, all-gather; memory as a queue of requests.

Of the paper only the abstract was at hand. Numbers marked *secondary* come from a detailed account by others, which
agrees with the abstract where both speak. What is assumed and what is fitted: `toolkit.model_parallel._t3_scale`.
Chapter: model_parallel/t3.
"""

from toolkit.claims import claim
from toolkit.model_parallel import _t3_scale as scale

PAPER = "t3"
WHERE = "Mega-GPT-2 and T-NLG, TP 8 and 16, simulated GPU"


def percent(gains):
    """Geometric mean of speed-ups, as percent."""
    return 100 * (scale.geomean(gains) - 1)


def gains(scheme, **options):
    """Of each of the 16 sublayers, all-gather included."""
    return [scale.gain(layer, scheme, **options) for layer in scale.sublayers()]


@claim(
    says="Sublayers that communicate much are 30 % faster, geometric mean",
    value=30,
    unit="%",
    where=f"abstract; {WHERE}",
    same_side_of=0,
    paper=PAPER,
)
def t3():
    return percent(gains("T3-MCA"))


@claim(
    says="Such sublayers are up to 47 % faster",
    value=47,
    unit="%",
    where=f"abstract; {WHERE}",
    same_side_of=0,
    paper=PAPER,
)
def t3_at_best():
    return percent([max(gains("T3-MCA"))])


@claim(
    says="Without priority in the memory controller they are 20 % faster",
    value=20,
    unit="%",
    where=f"secondary; {WHERE}",
    same_side_of=0,
    why="our GEMMs leave memory idle most of the time, so the streams rarely meet; a real one reads in sharper bursts",
    paper=PAPER,
)
def without_mca():
    return percent(gains("T3"))


@claim(
    says="Priority in the memory controller gains a further 8 % (1.30 / 1.20)",
    value=100 * (1.30 / 1.20 - 1),
    unit="%",
    where=f"secondary; {WHERE}",
    same_side_of=0,
    why="as above. In the queue alone, beside GEMMs that use more of the memory, it gains up to a fifth",
    paper=PAPER,
)
def mca():
    return percent(with_it / without for with_it, without in zip(gains("T3-MCA"), gains("T3"), strict=True))


@claim(
    says="An ideal overlap, with nothing shared, is 35 % faster",
    value=35,
    unit="%",
    where=f"secondary; {WHERE}",
    same_side_of=0,
    paper=PAPER,
)
def ideal():
    return percent(gains("ideal"))


@claim(
    says="An ideal overlap is up to 50 % faster",
    value=50,
    unit="%",
    where=f"secondary; {WHERE}",
    same_side_of=0,
    paper=PAPER,
)
def ideal_at_best():
    return percent([max(gains("ideal"))])


@claim(
    says="Models of about 500 billion parameters: 29 % faster",
    value=29,
    unit="%",
    where="abstract; PALM and MT-NLG, TP 32",
    same_side_of=0,
    paper=PAPER,
)
def large_models():
    return percent(scale.gain(layer, "T3-MCA") for layer in scale.sublayers(*scale.LARGE))


def saved(layer):
    """Percent of the bytes to and from memory that T3 saves."""
    return 100 * (1 - layer.moved("t3") / layer.moved("sequential"))


@claim(
    says="22 % less data moves to and from memory, geometric mean",
    value=22,
    unit="%",
    where=f"abstract; {WHERE}",
    tolerance=0.05,
    same_side_of=0,
    why="inputs are read 1.56 times less often when stores pass the cache by (secondary): we model no cache",
    paper=PAPER,
)
def data_moved():
    return 100 * (1 - scale.geomean(1 - saved(layer) / 100 for layer in scale.sublayers()))


@claim(
    says="Up to 36 % less data moves",
    value=36,
    unit="%",
    where=f"abstract; {WHERE}",
    same_side_of=0,
    why="as above: the reduce-scatter's part alone, which does not depend on the cache, gives no more",
    paper=PAPER,
)
def data_moved_at_best():
    return max(saved(layer) for layer in scale.sublayers())


@claim(
    says="GEMM and reduce-scatter at once could be 1.67 times as fast as one after the other",
    value=1.67,
    unit="×",
    where=f"secondary; {WHERE}",
    same_side_of=1,
    paper=PAPER,
)
def potential():
    return scale.geomean(gains("ideal", gather=False))


@claim(
    says="With 8 of 80 compute units for the reduce-scatter 1.18 times remain (we fit on this)",
    value=1.18,
    unit="×",
    where=f"secondary; {WHERE}",
    tolerance=0.05,
    same_side_of=1,
    paper=PAPER,
)
def on_8_units():
    return scale.geomean(gains(8, gather=False))


@claim(
    says="With 16 of 80 compute units 1.49 times remain",
    value=1.49,
    unit="×",
    where=f"secondary; {WHERE}",
    tolerance=0.05,
    same_side_of=1,
    why="our GEMM slows by 80/64 without its units; one that waits for memory or has few waves slows less",
    paper=PAPER,
)
def on_16_units():
    return scale.geomean(gains(16, gather=False))


@claim(
    says="Training is up to 12 % faster, end to end",
    value=12,
    unit="%",
    where=f"secondary; {WHERE}",
    same_side_of=0,
    why="we count products and their sums only; norms, element-wise kernels and the optimiser dilute the gain",
    paper=PAPER,
)
def training():
    return _end_to_end(training=True)


@claim(
    says="The prompt phase of inference is up to 15 % faster, end to end",
    value=15,
    unit="%",
    where=f"secondary; {WHERE}",
    same_side_of=0,
    why="as for training",
    paper=PAPER,
)
def prompts():
    return _end_to_end(training=False)


def _end_to_end(training):
    cases = ((model, tp) for model in ("Mega-GPT-2", "T-NLG") for tp in (8, 16))
    return percent([max(scale.end_to_end(model, tp, training) for model, tp in cases)])
