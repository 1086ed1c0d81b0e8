"""A job that gives layers a window, cut off in its survey and in its stream, goes on to the same bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from nursery import Nursery
from test_resume import TRIES, files_of
from test_structured_resume import GOES_ON, blocks, cut_off, job, nursery  # noqa: F401  (fixtures)

from kompressor_worker.journal import State

PASSES = [
    {"pruneLayers": {"layers": 10}},
    {"hybridAttention": {"window": 6, "kvBudget": 0.4, "context": 24, "samples": 4}},
    {"gptq": {"scheme": "W4A16", "groupSize": 32, "ignore": ["re:.*(q|k|v|gate|up)_proj"]}},
    {"kvCache": {}},
]


def moments(chance: random.Random) -> list[Callable[[State], bool]]:
    """Twice in the survey that both passes share, twice in the stream."""
    early, late = chance.randint(2, 5), chance.randint(6, 10)
    first, last = chance.randint(1, 4), chance.randint(6, 9)
    return [
        lambda state: (state.survey or 0) >= early,
        lambda state: (state.survey or 0) >= late or state.surveys > 0,
        lambda state: state.unit >= first,
        lambda state: state.unit >= last,
    ]


def test_killed_anywhere_the_same_bytes_come_out(nursery: Nursery, blocks: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = nursery.worker(job(tmp_path, blocks, "whole", PASSES))
    said = whole.communicate()[1]
    assert whole.returncode == 0, said
    wanted = files_of(tmp_path / "whole")
    report, config = json.loads(wanted["kompressor.json"]), json.loads(wanted["config.json"])
    assert report["evaluation"]["kl"] > 0 and report["attention"]["kvCache"]["fullLayers"] == [12, 2]
    assert config["layer_types"].count("full_attention") == 2 and len(config["layer_types"]) == 10
    seen: set[str] = set()
    for number, out in enumerate(TRIES):
        cut = job(tmp_path, blocks, out, PASSES)
        heard = "".join(cut_off(nursery, cut, moment) for moment in moments(random.Random(number)))
        last = nursery.worker(cut)
        heard += last.communicate()[1]
        assert last.returncode == 0, heard
        made = files_of(tmp_path / out)
        assert made.keys() == wanted.keys()
        assert [name for name in wanted if name != "report.html" and made[name] != wanted[name]] == []
        seen |= {"survey" if survey else "stream" for survey, _, _ in GOES_ON.findall(heard)}
        if {"survey", "stream"} <= seen:
            return
    pytest.fail(f"workers were only ever killed in {sorted(seen)}")
