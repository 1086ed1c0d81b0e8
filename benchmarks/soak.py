"""Does the operator's memory grow? `python benchmarks/soak.py --minutes 20 --rate 3`: that many CompressionJobs a second, each deleted once
it is complete, on the stage of scale.py. A line through its memory over time, its first quarter left out: the pools fill then.
Exit code 1 at 1 MB a minute or more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable

# crowded_stage makes the rest importable
from crowded_stage import RunningOperator, crowded_stage, running_operator

# isort: split
from crowd import gathered
from figures import slope

FLAT = 1.0
"""MB a minute."""
SAMPLE_SECONDS = 5.0
PATIENCE = 120.0


async def soak(minutes: float, rate: float, say: Callable[[str], None]) -> float:
    """MB (10^6 bytes) a minute that the operator's resident memory grows by."""
    points: list[tuple[float, float]] = []
    wanted = [f"soak-{number}" for number in range(round(60 * minutes * rate))]
    with crowded_stage() as stage:
        async with running_operator(stage) as operator, gathered(stage, operator.needs) as crowd:
            crowd.forget = True
            sampling = asyncio.create_task(sample(operator, points))
            await crowd.apply(wanted, rate)
            sampling.cancel()
            late = len(crowd.times)
            await crowd.complete([name for name in wanted if name in crowd.times], PATIENCE)
    kept = [point for point in points if point[0] >= minutes / 4]
    growth = slope(kept)
    told = {"minutes": minutes, "jobs": len(wanted), "mb_a_minute": growth, "first_mb": kept[0][1], "last_mb": kept[-1][1]}
    say(json.dumps({**told, "not_complete_at_the_end": late, "samples": len(kept), "load": os.getloadavg()[0]}))
    return growth


async def sample(operator: RunningOperator, points: list[tuple[float, float]]) -> None:
    """(minutes, MB), again and again."""
    began = time.monotonic()
    while True:
        points.append(((time.monotonic() - began) / 60, operator.rss))
        await asyncio.sleep(SAMPLE_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=3.0, help="jobs a second")
    options = parser.parse_args()
    growth = asyncio.run(soak(options.minutes, options.rate, print))
    return 0 if growth < FLAT else 1


if __name__ == "__main__":
    sys.exit(main())
