"""Sequence lengths with the skew of real training data: a log-normal body and a truncated Pareto tail.

Published for the Byted data, and met exactly by the distribution: 80 % of samples have at most 4K tokens; 1 % have at
least 128K and carry 44.3 % of tokens; 0.05 % have 2M or more and carry 12.1 %. For GitHub: 16.2 % of tokens beyond
128K; more is not at hand, and we keep Byted's body and the shape of its tail.
Chapter: sequence_parallel/byte_scale.
"""

from functools import cache

import numpy as np

K, M = 1024, 1024**2
START, END = 128 * K, 2 * M  # of the tail; longer documents are cut to END
SHORT, FEW, HUGE = 0.80, 0.01, 0.0005  # share of samples ≤ 4K, ≥ START, ≥ END
LONG_TOKENS, HUGE_TOKENS, GITHUB_TOKENS = 0.443, 0.121, 0.162  # share of tokens ≥ START, ≥ END; GitHub ≥ START


@cache
def shape(kind):
    """Parameters of a distribution: (tail weight, exponent, share of the tail at END, μ, σ of the body's logarithm)."""
    from scipy.optimize import brentq, fsolve
    from scipy.stats import norm

    mean = HUGE * END / HUGE_TOKENS  # tokens a sample
    between = (mean * LONG_TOKENS - HUGE * END) / (FEW - HUGE)  # mean length of the tail short of END

    def excess(a):
        """Mean of a Pareto tail on START … END with exponent a, less what it should be."""
        return START * a / (a - 1) * (1 - (START / END) ** (a - 1)) / (1 - (START / END) ** a) - between

    exponent = brentq(excess, 1.01, 5.0)
    body = mean * (1 - LONG_TOKENS) / (1 - FEW)

    def misses(parameters):
        """The body, cut off at START: P(≤ 4K) and the mean, less what they should be."""
        mu, sigma = parameters
        inside = norm.cdf((np.log(START) - mu) / sigma)
        short = norm.cdf((np.log(4 * K) - mu) / sigma) / inside
        average = np.exp(mu + sigma**2 / 2) * norm.cdf((np.log(START) - mu - sigma**2) / sigma) / inside
        return short - SHORT / (1 - FEW), average / body - 1

    mu, sigma = fsolve(misses, (6.6, 1.9))
    if kind == "byted":
        return FEW, exponent, HUGE / FEW, mu, sigma
    tail = mean * LONG_TOKENS / FEW
    odds = GITHUB_TOKENS / (1 - GITHUB_TOKENS) * body / tail
    return odds / (1 + odds), exponent, HUGE / FEW, mu, sigma


def length_sampler(kind="github", max_len=2 * M, seed=0, tokens=32 * M):
    """Lengths of a batch's sequences, in order of arrival.

    kind      "github" or "byted"
    max_len   tokens; longer sequences are cut to it
    tokens    of the whole batch: sequences are drawn until it is full, and the last one is cut
    returns   int64 array
    raises    ValueError  unknown kind; max_len or tokens below 1
    """
    if kind not in ("github", "byted") or max_len < 1 or tokens < 1:
        raise ValueError(f"length_sampler({kind!r}, max_len={max_len}, tokens={tokens}): 'github' or 'byted', above 0")
    random, drawn = np.random.default_rng(seed), np.empty(0, np.int64)
    while drawn.sum() < tokens:
        drawn = np.concatenate([drawn, np.minimum(draw(kind, 1 + tokens // 4096, random), max_len)])
    last = int(np.searchsorted(np.cumsum(drawn), tokens))
    drawn = drawn[: last + 1].copy()
    drawn[-1] -= drawn.sum() - tokens
    return drawn


def draw(kind, n, random):
    """n lengths: int64 array."""
    from scipy.stats import norm

    weight, exponent, at_end, mu, sigma = shape(kind)
    u = random.random((3, n))
    body = np.exp(mu + sigma * norm.ppf(u[1] * norm.cdf((np.log(START) - mu) / sigma)))
    tail = START * (1 - u[1] * (1 - (START / END) ** exponent)) ** (-1 / exponent)
    tail = np.where(u[2] < at_end, END, np.minimum(tail, END - 1))
    return np.where(u[0] < weight, tail, np.clip(body, 1, START - 1)).astype(np.int64)
