"""Independent references in float64 numpy: truncated distributions and the output law of speculative sampling."""

import dataclasses

import numpy as np


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
