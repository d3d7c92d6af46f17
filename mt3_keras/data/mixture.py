"""How often to draw from each of several data sets."""

from __future__ import annotations

from collections.abc import Mapping

EXPONENT = 0.3


def mixture_rates(
    counts: Mapping[str, int],
    *,
    exponent: float = EXPONENT,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The share of each data set, all of them together 1.

    A data set of n records is drawn in proportion to n ** exponent; 0.3 is that of the MT3 paper
    (section 3.3; T5's temperature 10 / 3). 1 draws each record equally often, 0 each data set.

    Args:
      counts: records of each data set.
      weights: given ones in place of those, for all data sets; 0 leaves one out.

    Raises:
      ValueError: a count, a weight or the exponent is out of range, or a name is not in both.
    """
    if not counts or min(counts.values()) < 1:
        raise ValueError(f"every data set must have records: got {dict(counts)}")
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent must be 0 to 1: got {exponent}")
    if weights is None:
        weights = {name: count**exponent for name, count in counts.items()}
    if odd := sorted(set(weights) ^ set(counts)):
        raise ValueError(f"weights must name each data set once: {', '.join(odd)} is in one only")
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"weights must be finite, at least 0, and not all 0: got {dict(weights)}")
    return {name: weights[name] / total for name in counts}
