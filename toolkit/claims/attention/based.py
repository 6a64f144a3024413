"""BASED's claims. What the state can recall is computed; what models learn to recall is read from a grid that
`benchmarks/train_based.py` trained; speed is a prediction for one described H100.

The paper's own quality figures come from models of 360M and 1.3B parameters and cannot be repeated here.
Chapter: attention/based.
"""

from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from toolkit.attention import _based_recall as recall
from toolkit.attention import _based_throughput as throughput
from toolkit.attention import based
from toolkit.claims import claim
from toolkit.runtime import like
from toolkit.runtime.errors import OutOfDeviceMemory

FACTS, FEATURES, WINDOWS = (8, 32, 64, 128, 256), (4, 8, 16, 24), (0, 16, 64)


# ---- recall without training -----------------------------------------------------------------------------------------


@cache
def recalled(facts, feature_dim=None, window=0, rival=None):
    """Share of facts that come back, 10 trials. feature_dim None: softmax. rival: None, "elu + 1" or "no features"."""
    return recall.recall(facts, feature_dim, window, RIVALS.get(rival, based.taylor_features), trials=10)


RIVALS = {"elu + 1": lambda x: based.elu_features(10 * x), "no features": based.same_features}  # × 10: elu's best


@claim(
    says="The size of the state governs recall: rank correlation over d' and window, 256 facts",
    holds=lambda correlation: correlation > 0.9,
    direction="above 0.9",
    unit="(Spearman)",
    where="Figure 2 shows it for trained models; here random keys, no training",
    paper="based",
)
def state_governs_recall():
    grid = [(recall.state_numbers(d, w), recalled(256, d, w)) for d in FEATURES for w in WINDOWS]
    return float(spearmanr(*zip(*grid, strict=True)).statistic)


@claim(
    says="At a similar state, the Taylor map recalls more than elu + 1: d' = 8 against 64, random keys",
    holds=lambda gain: gain > 0,
    direction="above 0",
    unit="of 256 facts",
    where="comparison of feature maps, in trained models",
    paper="based",
)
def taylor_over_elu():
    return recalled(256, 8) - recalled(256, 64, rival="elu + 1")


@claim(
    says="At a similar state, the Taylor map recalls more than keys without features: d' = 8 against 64, random keys",
    holds=lambda gain: gain > 0,
    direction="above 0",
    unit="of 256 facts",
    where="comparison of feature maps, in trained models",
    why="random keys of 64 channels are nearly orthogonal by themselves; a trained model has to make its keys so",
    paper="based",
)
def taylor_over_wide_keys():
    return recalled(256, 8) - recalled(256, 64, rival="no features")


@claim(
    says="Recall of n bits needs a state of order n bits: largest share of our messages that the bound requires",
    holds=lambda share: share <= 1,
    direction="at most 1",
    unit="of the bits sent",
    where="theorem on recall and state",
    paper="based",
)
def index_bound():
    return max(
        recall.least_bits(count, error) / sent
        for d in (1, 2, 4)
        for bits in (1, 2, 4, 8)
        for count in (8, 64, 256)
        for sent, error in [recall.index_protocol(count, d, bits)]
    )


# ---- recall that is learned ------------------------------------------------------------------------------------------


@cache
def grid():
    """Mixer -> (numbers in its state, accuracy on MQAR, losses at each hundredth of training)."""
    with np.load(Path(__file__).with_suffix(".npz")) as kept:
        columns = kept["states"].tolist(), kept["accuracies"].tolist(), kept["losses"]
        return dict(zip(kept["names"].tolist(), zip(*columns, strict=True), strict=True))


@claim(
    says="BASED recalls more than Mamba at a similar state: points of accuracy on MQAR",
    value=6.22,
    unit="points",
    where="abstract: recall-intensive tasks, 1.3B; version of ICML: 10.36",
    same_side_of=0.0,
    why="another task, a thousandth of the size; in 400 steps, and in 1 200, our selective SSM learns which values "
    "occurred but not whose they are",
    paper="based",
)
def points_over_ssm():
    return 100 * (grid()["Taylor d' = 4"][1] - grid()["selective SSM, 20"][1])


@claim(
    says="The same, learned on MQAR: Taylor with d' = 8 against keys without features, d' = 64",
    holds=lambda points: points > 0,
    direction="above 0",
    unit="points",
    where="comparison of feature maps, in trained models",
    paper="based",
)
def points_over_no_features():
    return 100 * (grid()["Taylor d' = 8"][1] - grid()["no features, d' = 64"][1])


@claim(
    says="Attention recalls more than BASED; on MQAR, d' = 2",
    holds=lambda points: points > 0,
    direction="above 0",
    unit="points",
    where="authors' README, 360M: SWDE 56.26 against 25.65, FDA 57.89 against 14.34",
    paper="based",
)
def points_of_softmax_over_based():
    return 100 * (grid()["softmax"][1] - grid()["Taylor d' = 2"][1])


# ---- bytes and time --------------------------------------------------------------------------------------------------


@claim(
    says="Fusing saves writing and reading the features: words saved, over those of the formula 2 N h D̃",
    holds=lambda share: share >= 1,
    direction="at least 1",
    unit="×",
    where="IO-aware prefill",
    paper="based",
)
def words_saved():
    q, v = like((16, 2048, 16), "float16"), like((16, 2048, 64), "float16")
    bytes_of = [throughput.prefill_bytes(p, q, q, v) for p in (throughput.unfused_prefill, throughput.fused_prefill)]
    return (bytes_of[0] - bytes_of[1]) / (2 * 2 * 2048 * 16 * 273)


def faster(batch, prompt, tokens=1024):
    """BASED's tokens per second over attention's, same batch; None where attention's cache does not fit."""
    try:
        ours = throughput.tokens_per_second(throughput.BASED, batch, prompt, tokens)
        return ours / throughput.tokens_per_second(throughput.TRANSFORMER, batch, prompt, tokens)
    except OutOfDeviceMemory:
        return None


def faster_when_full(prompt, tokens=1024):
    """The same when each takes the largest batch that fits."""
    rates = []
    for model in (throughput.BASED, throughput.TRANSFORMER):
        most = throughput.largest_batch(model, prompt, tokens)
        rates.append(throughput.tokens_per_second(model, most, prompt, tokens))
    return rates[0] / rates[1]


@claim(
    says="Generation is 24 times as fast as with FlashAttention-2",
    value=24.0,
    unit="×",
    where="abstract: 1.3B, 1 024 tokens; ours: after a prompt of 1 024, each with the batch that fills an H100",
    same_side_of=1.0,
    why="the ratio is set by batch and context; from bytes alone, 24 is reached at longer contexts (see the chapter)",
    paper="based",
)
def generation():
    return faster_when_full(1024)


@claim(
    says="The advantage in generation grows with the batch: batch 128 over batch 1, prompt of 1 024",
    holds=lambda growth: growth > 1,
    direction="above 1",
    unit="×",
    where="throughput against batch",
    paper="based",
)
def growth_with_batch():
    return faster(128, 1024) / faster(1, 1024)
