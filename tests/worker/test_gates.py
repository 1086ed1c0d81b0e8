"""What a gate lets through, and what the job says when it does not."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from kompressor_api.datasets import Gate
from kompressor_api.names import ENV_TERMINATION_LOG, ExitCode, Reason
from kompressor_worker import gates
from kompressor_worker.cli import failed
from kompressor_worker.errors import GateFailed
from kompressor_worker.logs import JsonFormatter

PERPLEXITY = Gate.model_validate({"metric": "perplexity", "maxIncrease": "3%"})
KL = Gate.model_validate({"metric": "kl", "maxKL": 0.05})


def evaluation(increase: float, kl: float) -> dict[str, Any]:
    return {"perplexityBefore": 8.0, "perplexityAfter": 8 * (1 + increase), "perplexityIncrease": increase, "kl": kl}


@pytest.mark.parametrize(
    "increase, kl, met",
    [
        (0.03, 0.05, [True, True]),
        (-0.2, 0.0, [True, True]),
        (0.0301, 0.01, [False, True]),
        (0.01, 0.051, [True, False]),
        (math.nan, math.nan, [False, False]),
    ],
)
def test_limits_are_included_and_nan_is_never_met(increase: float, kl: float, met: list[bool]) -> None:
    verdicts = gates.check([PERPLEXITY, KL], evaluation(increase, kl))
    assert [v["met"] for v in verdicts] == met
    if all(met):
        gates.enforce(verdicts)
    else:
        with pytest.raises(GateFailed):
            gates.enforce(verdicts)


def test_one_line_names_metric_value_limit_and_remedy_of_all_that_failed() -> None:
    with pytest.raises(GateFailed) as caught:
        gates.enforce(gates.check([PERPLEXITY, KL], evaluation(0.0412, 0.0812)))
    said = str(caught.value)
    assert (caught.value.exit_code, caught.value.reason) == (ExitCode.GATE_FAILED, Reason.GATE_FAILED)
    assert "\n" not in said
    for part in ("perplexity rises by 4.12 % (from 8 to 8.3296), allowed are 3 %", "0.0812 nats", "allowed are 0.05", "smaller groups"):
        assert part in said
    gates.enforce(gates.check([], evaluation(9, 9)))


def test_what_was_measured_goes_to_the_terminal_to_programs_and_to_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (log := tmp_path / "termination-log").touch()
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(log))
    verdicts = gates.check([PERPLEXITY, KL], evaluation(0.0412, 0.03))
    result = {
        "perplexityBefore": "8", "perplexityAfter": "8.3296", "kl": "0.03", "topOneAgreement": "97%", "evaluatedTokens": 8128,
        "gates": gates.status(verdicts),
    }  # fmt: skip
    with pytest.raises(GateFailed) as caught:
        gates.enforce(verdicts, result, "s3://models/out/.kompressor/report.html")
    assert failed(caught.value, Namespace(json=False, in_cluster=True)) == ExitCode.GATE_FAILED
    logged = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert (logged["level"], logged["reason"], logged["exitCode"], logged["result"]) == ("error", "GateFailed", 67, result)
    assert failed(caught.value, Namespace(json=True, in_cluster=False)) == ExitCode.GATE_FAILED
    printed, said = capfd.readouterr()
    assert json.loads(printed) == {"error": {"reason": "GateFailed", "message": str(caught.value), "exitCode": 67}, "result": result}
    told = json.loads(log.read_text())
    assert (told["reason"], told["summary"]) == ("GateFailed", result)
    for part in (
        "8 -> 8.3296",
        "NOT met: perplexity rises by 4.12%, allowed 3%",
        "met: KL divergence 0.03, allowed 0.05",
        ".kompressor/report.html",
    ):
        assert part in said
