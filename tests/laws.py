"""Independent references in float64 numpy: truncated distributions and the output law of speculative sampling."""

import dataclasses
import itertools

import numpy as np

EDGE = 1e-5
"""How close to the ends of an interval of uniforms the rule is evaluated; also the error of an integrated law."""


@dataclasses.dataclass(frozen=True)
class RowParams:
    """Sampling parameters of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def truncated(logits: np.ndarray, params: RowParams) -> np.ndarray:
    """float64[V]: temperature, then top-k, top-p, min-p, each on the renormalised rest; written with sorts."""
    logits = np.asarray(logits, np.float64)
    if params.temperature < 1e-5:
        return np.eye(logits.size)[np.argmax(logits)]
    probs = np.exp((logits - logits.max()) / params.temperature)
    probs /= probs.sum()
    if params.top_k:
        probs = np.where(probs >= np.sort(probs)[::-1][min(params.top_k, probs.size) - 1], probs, 0.0)
        probs /= probs.sum()
    if params.top_p < 1:
        ranked = np.sort(probs)[::-1]
        last = np.argmax(np.cumsum(ranked) >= params.top_p)
        probs = np.where(probs >= ranked[last], probs, 0.0)
        probs /= probs.sum()
    if params.min_p > 0:
        probs = np.where(probs >= params.min_p * probs.max(), probs, 0.0)
        probs /= probs.sum()
    return probs


def joint(tables: np.ndarray, params: RowParams, position: int, token: int, num: int) -> dict[tuple[int, ...], float]:
    """The target's own law of the next num tokens: tables[position % len, token] are the logits of the next one."""
    law = {(): 1.0}
    for step in range(num):
        extended = {}
        for sequence, mass in law.items():
            last = sequence[-1] if sequence else token
            probs = truncated(tables[(position + step) % len(tables), last], params)
            for following, prob in enumerate(probs):
                if prob > 0:
                    extended[*sequence, following] = mass * prob
        law = extended
    return law


EVERYWHERE = (0.0, 1.0)


def drawn(weights):
    """Each token and the interval of uniforms that draws it."""
    marks = np.concatenate([[0], np.cumsum(weights) / weights.sum()])
    return [(token, (marks[token], marks[token + 1])) for token in range(len(weights)) if weights[token] > 1e-9]


def residual_cells(target, draft, drafts):
    """Boxes of coins and drawing uniforms on which the rule is constant, from its formulas in float64."""
    limits = [min(1.0, p[d] / q[d]) for p, q, d in zip(target, draft, drafts, strict=False)]
    for n in range(len(drafts) + 1):
        coins = [(0.0, limit) for limit in limits[:n]]
        coins += [(limits[n], 1.0)] if n < len(drafts) else []
        coins += [EVERYWHERE] * (len(drafts) - len(coins))
        if all(high - low > 1e-12 for low, high in coins):
            for _, interval in drawn(np.maximum(target[n] - draft[n], 0)):
                yield coins, [interval] * (len(drafts) + 1)


def matching_cells(target, draft, drafts):
    """The same for token matching, whose drawing numbers are one for each position."""
    for n in range(len(drafts) + 1):
        intervals = [dict(drawn(target[i])) for i in range(n + 1)]
        if any(drafts[i] not in intervals[i] for i in range(n)):
            return
        for token, interval in intervals[n].items():
            if n == len(drafts) or token != drafts[n]:
                before = [intervals[i][drafts[i]] for i in range(n)]
                yield [EVERYWHERE] * len(drafts), [*before, interval, *[EVERYWHERE] * (len(drafts) - n)]


def block_cells(target, draft, drafts):
    """The same for block verification."""
    scales = [1.0]
    for p, q, d in zip(target, draft, drafts, strict=False):
        scales.append(min(1.0, scales[-1] * p[d] / q[d]))
    rests = [np.maximum(scale * p - q, 0) for scale, p, q in zip(scales, target, draft, strict=True)]
    limits = [
        1.0 if scale == 1 else rest.sum() / (rest.sum() + 1 - scale) for scale, rest in zip(scales, rests, strict=True)
    ]
    for passes in itertools.product((True, False), repeat=len(drafts)):
        coins = [(0.0, h) if yes else (h, 1.0) for yes, h in zip(passes, limits[1:], strict=True)]
        if all(high - low > 1e-12 for low, high in coins):
            n = max([0, *(i + 1 for i, yes in enumerate(passes) if yes)])
            for _, interval in drawn(rests[n] if rests[n].sum() > 1e-9 else target[n]):
                yield coins, [interval] * (len(drafts) + 1)


def evaluated(cells, side):
    """Coins [R, G] and drawing numbers [R, G + 1, 3] next to one end of each box, given as its two lists of intervals.

    A rule with other ends gives another law or another value at one of them.
    """

    def near(low, high):
        margin = min(EDGE, (high - low) / 4)
        return low + margin if side == 0 else high - margin

    accept = np.array([[near(*coin) for coin in coins] for coins, _ in cells], np.float32)
    recover = np.zeros((*accept.shape[:1], accept.shape[1] + 1, 3), np.float32)
    recover[:, :, 2] = [[near(*interval) for interval in draws] for _, draws in cells]
    return accept, recover
