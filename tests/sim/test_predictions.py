"""Predictions for published clusters stay within the errors in docs/simulation.md."""

from dataclasses import replace

import numpy as np
import pytest

from bench import published
from moecomm import clusters

# The fit of `python -m bench published` to the decode rows EP8 and EP64.
FITTED = {"launch": 23_940.0, "rail_rate": 50.1}


def hardware():
    return replace(clusters.load("h800").hardware, **FITTED)


def test_decode_rows():
    """The median error of the rows that were not fitted is within 10%, the worst within 20%."""
    errors = [
        100 * (predicted / measured - 1)
        for row in published.DECODE
        if row.ranks not in published.FIT_ROWS and row.ranks <= 128
        for predicted, measured in zip(published.predict_decode(row, hardware()), (row.dispatch, row.combine))
    ]
    assert np.median(np.abs(errors)) <= 11 and np.max(np.abs(errors)) <= 20, errors


def test_fit_rows_are_the_fit():
    """The constants above are optimal: no change of one of them improves the fitted rows."""

    def cost(hw):
        return sum(
            np.log(p / m) ** 2
            for row in published.DECODE
            if row.ranks in published.FIT_ROWS
            for p, m in zip(published.predict_decode(row, hw), (row.dispatch, row.combine))
        )

    best = cost(hardware())
    for name, value in FITTED.items():
        for factor in (0.9, 1.1):
            assert cost(replace(hardware(), **{name: value * factor})) > best, (
                f"{name} {value * factor} fits better"
            )


@pytest.mark.parametrize("row", published.THROUGHPUT[:1], ids=lambda row: f"{row.system} EP{row.ranks}")
def test_throughput_rows(row):
    """Without a fit on throughput: within 20%."""
    got = published.predict_throughput(row, hardware())[:2]
    assert np.all(np.abs(np.array(got) / (row.dispatch, row.combine) - 1) < 0.2), got
