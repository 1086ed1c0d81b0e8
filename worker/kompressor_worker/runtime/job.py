"""What a job does to measure: both checkpoints laid out, the worker's memory given back, the engine's figures, or why there are none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kompressor_api.datasets import RUNTIME_METRICS
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.assignment import Assignment
from kompressor_worker.calibration import Rows
from kompressor_worker.distil.lesson import StoredModel
from kompressor_worker.errors import EngineFailed
from kompressor_worker.runtime import Installed
from kompressor_worker.runtime.asked import cache_bytes, price, runtime_of
from kompressor_worker.runtime.checkpoints import Files, lay_out, scratch_folder, weight_files
from kompressor_worker.runtime.measure import Side, prompts_of, timed, with_costs
from kompressor_worker.runtime.original_gguf import plan_original, write_original
from kompressor_worker.runtime.room import give_back
from kompressor_worker.storage import Output

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """Where a job's models are measured."""

    installed: Installed
    environ: Mapping[str, str]
    original: StoredModel
    output: Output
    stop: threading.Event

    def measured(self, spec: CompressionJobSpec, assigned: Assignment, result: Files, rows: Rows) -> tuple[dict[str, Any], list[str]]:
        """The report's `runtime`, and warnings. `result`: the output's files, all of them whole there.

        Raises EngineFailed where a gate waits for the figures; without one the result is as good, and only says that they are missing."""
        runtime = runtime_of(spec)
        assert runtime is not None and spec.evaluation is not None
        give_back()
        try:
            with scratch_folder(self.output.uri) as folder:
                before, size = self._lay_out_original(spec, folder / "original")
                after = lay_out(folder / "result", self.output.as_source(), result, self.stop)
                sides = [
                    Side("original", before, size, cache_bytes(self.original.layout, runtime)),
                    Side("result", after, assigned.plan.tensor_bytes, cache_bytes(assigned.layout, runtime)),
                ]
                found = timed(sides, runtime, prompts_of(rows, runtime), self.installed, self.environ, folder, self.stop)
        except EngineFailed as error:
            if any(gate.metric in RUNTIME_METRICS for gate in spec.evaluation.gates):
                raise EngineFailed(
                    f"{error}; nothing was published, and all of it is kept: applied again, the job only measures"
                ) from error
            log.warning("%s", error)
            return {"engine": self.installed.engine.name, "failed": str(error)}, [str(error)]
        return with_costs(found, price(spec)), []

    def _lay_out_original(self, spec: CompressionJobSpec, folder: Path) -> tuple[Path, int]:
        """In the format that the engine opens; and bytes of its weights."""
        layout, source = self.original.layout, self.original.source
        if spec.output.format == "gguf":
            plan = plan_original(spec, layout)
            return write_original(folder, self.original, plan, self.stop), plan.tensor_bytes
        files = Files(weight_files(layout), source.read("config.json"))
        return lay_out(folder, source, files, self.stop), layout.source_bytes
