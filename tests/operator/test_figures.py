"""What the benchmarks of scale make of what they measure, beside numpy; and what the bare client makes of a recorded call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from bare_client import Call
from crowd import Times, delays
from figures import percentile, slope, table

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(values=st.lists(numbers, min_size=1), percent=st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


@given(points=st.lists(st.tuples(st.integers(0, 1000), st.integers(-1000, 1000)), min_size=2))
def test_slopes_are_numpys(points: list[tuple[float, float]]) -> None:
    x, y = np.array(points, float).T
    assume(np.ptp(x) > 0)
    assert slope(points) == pytest.approx(float(np.polyfit(x, y, 1)[0]), rel=1e-6, abs=1e-6)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing has been measured"):
        percentile([], 50)
    for points in ([], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]):
        with pytest.raises(ValueError, match="measure for longer"):
            slope(points)


def test_a_table() -> None:
    told = table(["", "1,000 jobs"], [["rate", 12.345], ["memory", 1234.5], ["jobs", 3]])
    assert told == "|  | 1,000 jobs |\n| --- | --- |\n| rate | 12.3 |\n| memory | 1,234 |\n| jobs | 3 |"


def test_delays_are_from_apply_to_the_first_job_and_from_the_end_to_complete() -> None:
    times = {"one": Times(applied=1, first_job=3, ended=10, complete=10.5), "two": Times(applied=2, first_job=3, ended=9, complete=8)}
    assert list(delays(times, ["two", "one"])) == [(1, 0.0), (2, 0.5)]


def test_a_recorded_call_is_made_for_another_job() -> None:
    recorded = [("ns-1", "ns-2"), ("recorded-life", "bare-7"), ("uid-1", "uid-2")]
    body = {"metadata": {"resourceVersion": "5"}, "status": {"jobName": "recorded-life-abc-1"}}
    call = Call("PATCH", "/apis/x/namespaces/ns-1/compressionjobs/recorded-life/status", "merge", json.dumps(body)).of(recorded)
    assert call.path == "/apis/x/namespaces/ns-2/compressionjobs/bare-7/status"
    assert json.loads(call.body) == {"metadata": {}, "status": {"jobName": "bare-7-abc-1"}}, "on condition of nothing"
    owned = Call("POST", "/", "json", json.dumps({"metadata": {"ownerReferences": [{"uid": "uid-1"}], "resourceVersion": "5"}})).of(
        recorded
    )
    assert json.loads(owned.body)["metadata"] == {"ownerReferences": [{"uid": "uid-2"}], "resourceVersion": "5"}
