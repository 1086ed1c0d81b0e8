"""The chart's alerts and dashboard, judged by Prometheus' own promtool: each alert fires at some series, and at others not."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from test_chart_monitoring import ON, Render, queries
from test_chart_values import Manifest, of_kind, render  # noqa: F401  (a fixture)

from binaries import BinaryError
from promtool import promtool

pytestmark = pytest.mark.cluster

Series = Mapping[str, str]
"""Metric with the labels that matter -> values, one a minute, as promtool writes them: `0+1x3` is 0 1 2 3, `_x3` is three times none."""

LAST = 40
"""Minutes that are played."""
TARGET = {"namespace": "system", "service": "one-kompressor-metrics"}
"""What every alert says of where it comes from, also one of series that are not there."""


@dataclass(frozen=True)
class Case:
    """Fires from this minute on, until that one if at all; the silent ones never do."""

    fires: Series
    at: int
    until: int = LAST + 1
    labels: Mapping[str, str] = field(default_factory=dict)
    severity: str = "warning"
    after: int = 0
    """The first minute that is looked at."""
    silent: tuple[Series, ...] = ()
    since: int = 0
    """The first minute that is judged."""


def late(timers: int) -> Series:
    """Of a hundred timers a minute so many are between one second and two and a half late."""
    counts = {"1.0": 100 - timers, "2.5": 100, "+Inf": 100}
    return {f'kompressor_loop_lag_seconds_bucket{{le="{le}"}}': f"0+{count}x{LAST}" for le, count in counts.items()}


def born(counter: str, labels: str, other: str, told: Mapping[str, str]) -> Case:
    """A counter that is born with its first count, in minute 3, is noticed and not for ever; one with another label is another matter."""
    silent = {f"{counter}{{{other}}}": f"_x3 1+1x{LAST}"}
    return Case({f"{counter}{{{labels}}}": f"_x3 1x{LAST}"}, 3, 18, told, silent=(silent,))


def moved(counter: str, labels: str, told: Mapping[str, str]) -> Case:
    """A counter that has been there for long moves. In its first quarter of an hour it looks as if it were born."""
    return Case({f"{counter}{{{labels}}}": "7x29 8x10"}, 30, labels=told, since=16)


REFUSED = ("kompressor_api_requests_total", 'verb="POST", kind="Job", code="403"'), {"verb": "POST", "kind": "Job"}
FAILED = ("kompressor_jobs_finished_total", 'reason="CorruptSource", outcome="failed"'), {"reason": "CorruptSource"}
LEFT: tuple[tuple[str, str], dict[str, str]] = ("kompressor_cleanup_total", 'outcome="failed"'), {}
HELD_UP = (
    *("ImagePullFailed", "Unschedulable", "SecretMissing", "QuotaExceeded", "NodeLost", "NameConflict", "PodRefused"),
    *("ContainerNotStarted", "ContainerFailed", "ContainerLingers", "VolumeNotMounted", "RecipeNotFound", "OperatorOutdated", "Forbidden"),
)
LOOKS = "kompressor_reconciles_total"
TABLE: dict[str, list[Case]] = {
    "KompressorOperatorDown": [
        Case(
            {"up": "1 1 0x38"},
            7,
            severity="critical",
            silent=({"up": "1x40"}, {"up": "1 0 0 0 0 0 1x34"}, {'up{pod="a"}': "0x40", 'up{pod="b"}': "1x40"}),
        ),
        Case({"up": "1 1 0x3 _x35"}, 7, severity="critical"),  # down, then gone: one alert
        Case({}, 5, severity="critical"),
    ],
    "KompressorNoLeader": [
        Case(
            {'kompressor_leader{pod="a"}': "1x2 0x40", 'kompressor_leader{pod="b"}': "0x40"},
            5,
            severity="critical",
            silent=({'kompressor_leader{pod="a"}': "1x5 0x40", 'kompressor_leader{pod="b"}': "0x6 1x40"},),
        )
    ],
    "KompressorReconcileErrors": [
        Case(
            {f'{LOOKS}{{outcome="error"}}': "0x4 1x40"},
            5,
            19,
            silent=(
                {f'{LOOKS}{{outcome="retry"}}': "0+5x40", f'{LOOKS}{{outcome="ok"}}': "0+5x40"},
                {f'{LOOKS}{{outcome="error"}}': "7x10 0x40"},  # a new process
            ),
        )
    ],
    "KompressorQueueStuck": [
        Case(
            {"kompressor_queue_depth": "3x40", f'{LOOKS}{{outcome="ok"}}': "0+9x5 45x40"},
            24,
            severity="critical",
            silent=(
                {"kompressor_queue_depth": "900x40", f'{LOOKS}{{outcome="retry"}}': "0+0.5x40"},
                {"kompressor_queue_depth": "0x40", f'{LOOKS}{{outcome="ok"}}': "45x40"},
            ),
        )
    ],
    "KompressorWatchOwes": [Case({"kompressor_watch_owed_seconds": "0+30x40"}, 8, silent=({"kompressor_watch_owed_seconds": "60x40"},))],
    "KompressorLoopLag": [Case(late(2), 11, silent=(late(0),))],
    "KompressorForbidden": [born(*REFUSED[0], 'verb="POST", kind="Job", code="409"', REFUSED[1]), moved(*REFUSED[0], REFUSED[1])],
    "KompressorJobFailed": [born(*FAILED[0], 'reason="Completed", outcome="complete"', FAILED[1]), moved(*FAILED[0], FAILED[1])],
    "KompressorJobHeldUp": [
        Case(
            {f'kompressor_jobs{{phase="Pending", reason="{reason}"}}': "0 0 1x38"},
            17,
            labels={"reason": reason},
            silent=({f'kompressor_jobs{{reason="{usual}"}}': "9x40" for usual in ("Compressing", "Queued", "Retrying", "New")},),
        )
        for reason in HELD_UP
    ],
    "KompressorCleanupFailed": [born(*LEFT[0], 'outcome="cleaned"', LEFT[1]), moved(*LEFT[0], LEFT[1])],
}


@pytest.fixture(scope="module")
def judge() -> Path:
    try:
        return promtool()
    except BinaryError as error:
        pytest.skip(f"no promtool: {error}")


def asked(judge: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([judge, *words], capture_output=True, text=True)


def group_of(objects: list[Manifest]) -> Manifest:
    (rules,) = of_kind(objects, "PrometheusRule")
    spec: Manifest = rules["spec"]
    return spec


def played(series: Series, release: str = "one") -> list[Manifest]:
    """With the labels that a scrape adds."""
    found = []
    for metric, values in series.items():
        name, _, labels = metric.partition("{")
        own = labels.rstrip("}").split(", ") if labels else []
        pod = [] if "pod=" in labels else ['pod="a"']
        all_labels = ", ".join([*own, *pod, 'namespace="system"', f'service="{release}-kompressor-metrics"'])
        found.append({"series": f"{name}{{{all_labels}}}", "values": values})
    return found


def filled(text: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)


def questions(alert: str, rule: Manifest, case: Case) -> Iterator[Manifest]:
    """promtool's tests of one case: just before it fires, when it does, when it does no more; and the silent ones all the time."""
    told = {
        "exp_labels": {**case.labels, **TARGET, "severity": case.severity},
        "exp_annotations": {name: filled(text, case.labels) for name, text in rule["annotations"].items()},
    }

    def of(series: list[Manifest], fires: Mapping[int, bool]) -> Manifest:
        moments = [{"eval_time": f"{at}m", "alertname": alert, "exp_alerts": [told] if on else []} for at, on in fires.items()]
        return {"interval": "1m", "input_series": series, "alert_rule_test": moments}

    beside = played({"up": f"1x{LAST}"}, "two")  # another release, which is well
    yield of([*played(case.fires), *beside], {at: case.at <= at < case.until for at in range(case.since, LAST + 1)})
    for quiet in case.silent:
        yield of(played(quiet), dict.fromkeys(range(LAST + 1), False))
    if case.fires and alert != "KompressorOperatorDown":  # for which others are no help
        yield of(played(case.fires, "two"), dict.fromkeys(range(LAST + 1), False))


def test_every_alert_fires_when_it_should_and_only_then(render: Render, judge: Path, tmp_path: Path) -> None:  # noqa: F811
    spec = group_of(render(*ON))
    rules = {rule["alert"]: rule for group in spec["groups"] for rule in group["rules"]}
    assert rules.keys() == TABLE.keys()
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    tests = [test for alert, rule in rules.items() for case in TABLE[alert] for test in questions(alert, rule, case)]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    checked = asked(judge, "check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yaml")
    assert checked.returncode == 0 and f"{len(rules)} rules found" in checked.stdout, checked.stdout + checked.stderr
    tested = asked(judge, "test", "rules", tmp_path / "tests.yaml")
    assert tested.returncode == 0, (tested.stdout + tested.stderr)[:4000]


def test_every_query_of_the_dashboard_can_be_asked(render: Render, judge: Path, tmp_path: Path) -> None:  # noqa: F811
    """As recording rules, which promtool parses as the server would."""
    boards = [one for one in render(*ON) if one["kind"] != "PrometheusRule"]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries(boards))]
    assert len(rules) > 10
    for more, code in (([], 0), ([{"record": "panel:broken", "expr": "sum by (le (up)"}], 1)):
        file = tmp_path / "panels.yaml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules + more}]}))
        checked = asked(judge, "check", "rules", file)
        assert checked.returncode == code, checked.stdout + checked.stderr
