"""How often to draw from each of several data sets."""

from __future__ import annotations

from collections.abc import Mapping

EXPONENT = 0.3


def mixture_rates(
    counts: Mapping[str, int],
    *,
    exponent: float = EXPONENT,
) -> dict[str, float]:
    """The share of each data set, all of them together 1.

    A data set of n records is drawn in proportion to n ** exponent; 0.3 is that of the MT3 paper
    (section 3.3; T5's temperature 10 / 3). 1 draws each record equally often, 0 each data set.

    Args:
      counts: records of each data set.
      exponent: of the number of records.

    Raises:
      ValueError: a count or the exponent is out of range.
    """
    if not counts or min(counts.values()) < 1:
        raise ValueError(f"every data set must have records: got {dict(counts)}")
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent must be 0 to 1: got {exponent}")
    weights = {name: count**exponent for name, count in counts.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
