"""What is measured of the inputs of a block's linears: of the calibration rows for passes, of the deployment's for drift."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from kompressor_worker.activations import Activations
from kompressor_worker.batch import Batch
from kompressor_worker.block import Stage
from kompressor_worker.block_work import BlockWork, PartWork, Streams, batch_tokens, size_of
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Step
from kompressor_worker.drift import compare
from kompressor_worker.forward import Projection
from kompressor_worker.mixture import Routing
from kompressor_worker.sites import sites_of
from kompressor_worker.statistics import Statistic, Statistics

DRIFT_STATISTICS: tuple[Statistic, ...] = ("histogram", "range")

Sites = Sequence[Mapping[str, Statistics]]
"""By step, by site."""


class Measuring:
    """Of one job."""

    def __init__(self, streams: Streams, decoder: Decoder, least_tokens: int, heard: Callable[[float], None]) -> None:
        """`least_tokens`: an expert that fewer are routed to is measured on all. `heard` of multiply-adds, and may raise."""
        self._streams, self._decoder, self._least_tokens, self._heard = streams, decoder, least_tokens, heard
        self.drift = frozenset[Statistic](DRIFT_STATISTICS if streams.deployment is not None else ())

    def measure(self, work: BlockWork, part: PartWork, steps: Sequence[Step], stages: Sequence[Stage]) -> None:
        """One forward through these steps but for the last one's linears."""
        if self._streams.calibration is None or not any(site.statistics.wanted for stage in stages for site in stage.sites):
            return
        sites = [{site.name: site.statistics for site in stage.sites} for stage in stages]
        self._observe(work, part, steps, self._streams.calibration, sites)
        for step, seen in zip(steps, sites, strict=True):
            if step.name == "experts_in" and len(step.stages) > len(step.experts):  # with the router: how many go where is known only now
                work.count({expert.number: seen[expert.name].rows for expert in step.experts}, self._least_tokens)
                self._measure_unrouted(work, part, steps, sites)
        if self._streams.deployment is not None:
            apart = [{site.name: site.statistics for site in sites_of(work.block, step, self.drift)} for step in steps]
            self._observe(work, part, steps, self._streams.deployment, apart)
            for calibrated, deployed in zip(sites, apart, strict=True):
                found = {name: compare(calibrated[name], seen) for name, seen in deployed.items()}
                work.drift |= {name: site for name, site in found.items() if site is not None}

    def refresh(
        self, work: BlockWork, part: PartWork, steps: Sequence[Step], stages: Sequence[Stage], wanted: Collection[Statistic]
    ) -> None:
        """Measures again what an earlier pass has made wrong and the next one wants."""
        stale = frozenset(s for stage in stages for site in stage.sites for s in site.statistics.stale) & frozenset(wanted)
        if not stale or self._streams.calibration is None:
            return
        part.take_up()
        fresh = [{site.name: site.statistics for site in sites_of(work.block, step, stale)} for step in steps]
        self._observe(work, part, steps, self._streams.calibration, fresh)
        for stage, measured in zip(stages, fresh, strict=True):
            for site in stage.sites:
                site.statistics.renew(measured[site.name])

    def count(self, work: BlockWork) -> None:
        """The calibration's tokens by expert, once they have met the router."""
        if self._streams.calibration is not None:
            counts = [Routing.of(batch.state).counts(work.block.experts) for batch in self._streams.calibration.batches]
            work.count(dict(enumerate(torch.stack(counts).sum(0).tolist())), self._least_tokens)

    def _measure_unrouted(self, work: BlockWork, part: PartWork, steps: Sequence[Step], sites: Sites) -> None:
        """Again, those experts that few tokens are routed to: on all of them."""
        assert self._streams.calibration is not None
        few = [{expert.name for expert in step.experts if expert.number in work.unrouted} for step in steps]
        if any(few):
            fresh = [
                {name: Statistics(seen[name].columns, seen[name].wanted) for name in names} for seen, names in zip(sites, few, strict=True)
            ]
            self._observe(work, part, steps, self._streams.calibration, fresh)
            for seen, again in zip(sites, fresh, strict=True):
                for name, measured in again.items():
                    seen[name].renew(measured)
                    seen[name].rows = measured.rows

    def _observe(self, work: BlockWork, part: PartWork, steps: Sequence[Step], stream: Activations, sites: Sites) -> None:
        project = Projection.as_a_runtime(part.current, self._decoder.dtype, self._decoder.device)
        for batch in stream.batches:
            shadow = Batch(batch.lengths, dict(batch.state), batch.excluded)
            for number, (step, seen) in enumerate(zip(steps, sites, strict=True)):
                for name, x in work.block.inputs(step, shadow, part.current, project, work.unrouted) if seen else ():
                    if name in seen:
                        seen[name].add(x)
                self._heard(0)
                if number + 1 < len(steps):
                    work.block.advance(step, shadow, part.current, project)
                    self._heard(size_of(step.layout) * batch_tokens(batch))
