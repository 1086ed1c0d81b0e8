"""Generates docs/failures.md from kompressor_api/failures.py; `--check` compares instead (exit 1 and a diff where it is not up to date)."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable
from pathlib import Path

from kompressor_api.failures import ADVICE, FAILURES, PREFLIGHT_ADVICE, Failure
from kompressor_api.names import Reason

TARGET = Path(__file__).resolve().parents[1] / "docs" / "failures.md"

ALL_IS_WELL: dict[Reason, str] = {
    Reason.PENDING: "its pod is about to run",
    Reason.PREFLIGHT: "a small pod looks at source, data, credentials and output first",
    Reason.QUEUED: "its Job is suspended, by Kueue or whatever else; the message says what it waits for",
    Reason.COMPRESSING: "the worker runs; status.progress says how far it is",
    Reason.RETRYING: "something failed and is tried again; the message says what, and when",
    Reason.SUSPENDED: "spec.suspend is true; set to false, it goes on at its last committed block",
    Reason.RESUMED: "on the condition Suspended, once that is False again",
    Reason.VALID: "on the condition Validated, with what the preflight found",
    Reason.COMPLETED: "the result is published",
    Reason.ALREADY_COMPRESSED: "the output held this very result before; nothing was computed",
    Reason.CLEANED_UP: "an event of a deletion with deletionPolicy Delete: what the job wrote is gone",
}
"""Reasons that ask for nothing."""

HEAD = """\
# Why a job failed, or does not go on

Generated from `kompressor_api/failures.py` by `make docs`; do not edit.

`kubectl get kcj` shows the reason as STATUS, `kubectl describe kcj NAME` the message, which ends with what to do about it. A failed job
has the condition `Failed`; the reason is also that of a Warning event. A job that is held up by something that may pass stays `Reconciling`
and goes on by itself once that is cured.

A job that has failed never starts again: correct the cause, delete it and apply it again. What it had committed at its output is still
there (but with `deletionPolicy: Delete`), so that it goes on at its last block, as long as source, passes and data are the same.
"""

CLASSES = """
## How attempts fail

The worker's exit code decides how it goes on, in this order. "In place" is the next pod of the same Job, a "next attempt" a new Job.

| class | exit code | reason, unless the worker names a more exact one | tried again | what to do |
|---|---|---|---|---|
"""

REASONS = """
## Reasons that ask for something

| reason | what to do |
|---|---|
"""

PREFLIGHT = """
About the pod of a preflight, which has image, size and nodes of its own:

"""

WELL = """
## Reasons that do not

| reason | what it means |
|---|---|
"""


def text() -> str:
    """The whole page."""
    asking = (row(f"`{reason}`", advice) for reason, advice in ADVICE.items())
    looking = (f"- `{reason}`: {advice}\n" for reason, advice in PREFLIGHT_ADVICE.items())
    well = (row(f"`{reason}`", meaning) for reason, meaning in ALL_IS_WELL.items())
    return "".join((HEAD, CLASSES, *map(failure, FAILURES), REASONS, *asking, PREFLIGHT, *looking, WELL, *well))


def failure(one: Failure) -> str:
    codes = ", ".join(map(str, one.codes)) or "any"
    return row(one.title, codes, f"`{one.reason}`", str(one.retry), one.advice)


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def difference(old: str, new: str) -> Iterable[str]:
    return difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(TARGET), "generated")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    wanted, found = text(), TARGET.read_text() if TARGET.exists() else ""
    if not parser.parse_args().check:
        TARGET.write_text(wanted)
    elif wanted != found:
        sys.stdout.writelines(difference(found, wanted))
        print(f"{TARGET.name} is not up to date: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
