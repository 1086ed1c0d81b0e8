"""What activations that flow through a model cost, from shapes alone: bytes at the worst moment, and multiply-adds. No torch.

Beside six real runs on one AVX-512 core (random Llamas of 2 blocks, hidden 512 and 1024, 32 to 128 rows of 512 tokens, with and without
evaluation; gptq, smoothQuant + gptq, awq, static W8A8) the plan's peak was 0.97 to 1.11 of the largest resident set (1.1 to 1.7 GiB,
0.7 of it idle), and its time without the start 1.05 to 1.3 of the CPU seconds. Not measured: mixtures, GPUs (blocks and activations are in
their memory instead, the sum is the same), statistics measured again (a static scheme behind awq).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.architectures import text_config
from kompressor_worker.layout import DTYPE_BYTES, LinearLayout, ModelLayout, StageLayout, UnitLayout
from kompressor_worker.parts import held, parts_of
from kompressor_worker.passes import Pass
from kompressor_worker.pipeline import Limits
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import OutputPlan

BATCH_TOKENS = 4096
"""As activations.BATCH_TOKENS, which imports torch."""
TILE_BYTES = 64 << 20
"""As evaluate.SCRATCH_BYTES."""
FRAGMENTED = 1.25
"""What activations take of the allocator for what they are: they come and go in pieces, between larger ones."""
TRIAL_COPIES = 4
"""fp32 copies of a site's weights while a scale is tried on them."""
COPIES = 2
"""Matrices of a Hessian's size beside it: the one that is factorised in its place, and the factor as the column loop reads it."""
REDUCING_COPIES = 5
"""Matrices of a Hessian's size while columns are taken away: it, dampened, inverted, and what is left of that before and after a round."""
TUNED_TOKENS = 2048
"""As recovering.MICRO_TOKENS."""
TUNED_BYTES = 26
"""A weight that is tuned, beside those that are there anyway: in fp32 itself, its gradient and what the steps before have left, the best so
far, and as the forward has rounded it."""
JUDGED_BYTES = 128 << 20
"""As kernels.divergence.CPU_SCRATCH_BYTES: logits while the last block is tuned."""
SCORED_BYTES = 104
"""A position of the evaluation: sums of its logits, and token ids."""


@dataclass(frozen=True)
class Site:
    """An input of linears."""

    columns: int
    linears: tuple[LinearLayout, ...]
    share: float = 1.0
    """Of all tokens, how many reach it: top-k of the experts."""

    @property
    def weights(self) -> int:
        return sum(prod(x.shape) for x in self.linears)


@dataclass(frozen=True)
class Tokens:
    """At most so many, by stream."""

    calibration: int
    evaluation: int
    drift: int
    length: int
    """Of the longest row."""
    reference: int = 0
    """The calibration's, through the original."""

    @classmethod
    def of(cls, spec: CompressionJobSpec, passes: Sequence[Pass]) -> Tokens:
        measured = any(p.measures for p in passes)
        c, e, d = (spec.calibration if measured else None), spec.evaluation, (spec.drift if measured and spec.calibration else None)
        calibration, evaluation, drift = (0 if s is None else s.samples * s.sequence_length for s in (c, e, d))
        length = max((s.sequence_length for s in (c, e, d) if s is not None), default=0)
        return cls(calibration, evaluation, drift, length, calibration if any(p.corrects for p in passes) else 0)

    @property
    def of_the_original(self) -> int:
        return self.evaluation + self.reference

    @property
    def of_the_result(self) -> int:
        return self.calibration + self.evaluation + self.drift

    @property
    def streams(self) -> int:
        """Evaluation rows flow twice."""
        return self.of_the_original + self.of_the_result


@dataclass(frozen=True)
class FlowBytes:
    activations: int
    """Hidden states of all streams, those of the snapshot that is being uploaded, and what flows between two steps; in memory."""
    spilled: int
    """The rest of them, in files."""
    block: int
    """The largest part of a block (parts.py) as stored, changed, decoded and encoded."""
    step: int
    """A step's weights in fp32, and what a batch of rows is on its way through it."""
    statistics: int
    """Sums of x^T x, and their factors."""
    head: int
    """Last hidden states, and logits."""
    restored: int = 0
    """The largest stream of a snapshot, as a restart reads it."""

    @property
    def peak(self) -> int:
        return round(FRAGMENTED * self.activations) + max(self.block + self.step + self.statistics, self.head)

    @property
    def on_gpu(self) -> int:
        """There, where nothing is spilled."""
        return self.peak + round(FRAGMENTED * self.spilled)

    @property
    def beside_gpu(self) -> int:
        """On the host then: a block on its way there and back, or a snapshot on its way there."""
        return max(self.block, 2 * self.restored)


@dataclass(frozen=True)
class FlowOperations:
    """Multiply-adds of matrix products."""

    forward: float
    statistics: float
    passes: float
    head: float
    surveys: float = 0.0
    tuning: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.statistics + self.passes + self.head + self.surveys + self.tuning


def is_block(unit: UnitLayout) -> bool:
    return any(x.kind == "linear" for stage in unit.stages for x in stage.linears)


def steps_of(unit: UnitLayout, layout: ModelLayout) -> list[list[Site]]:
    """A block's steps, each with its sites: as decoder_block.steps_of and sites.sites_of, without torch; a mixture's experts together."""
    stages = [stage for stage in unit.stages if unit.stored or not stage.dropped]
    return steps_in(stages, sum(stage.expert is not None for stage in stages), layout)


def steps_in(stages: Sequence[StageLayout], experts: int, layout: ModelLayout) -> list[list[Site]]:
    """Of a part of a block that has so many experts in all."""
    steps: list[list[Site]] = []
    routed = [stage for stage in stages if stage.expert is not None]
    for stage in stages:
        linears = [x for x in stage.linears if x.kind == "linear"]
        if linears and stage.expert is None:
            site = Site(linears[0].shape[1], tuple(linears))
            # heads come out of latents in one go here, so that the odd steps stay those that read what flows between two
            steps[-1:] = [[*steps[-1], site]] if stage.name.endswith((".queries", ".keys_values")) else [*steps[-1:], [site]]
    if routed:
        share = min(1.0, top_k(layout) / experts)
        parts = (slice(None, -1), slice(-1, None))
        steps += [[Site(e.linears[part][0].shape[1], e.linears[part], share) for e in routed] for part in parts]
    return steps


def top_k(layout: ModelLayout) -> int:
    return int(text_config(layout.config).get("num_experts_per_tok") or 1)


def flow_bytes(
    spec: CompressionJobSpec,
    layout: ModelLayout,
    passes: Sequence[Pass],
    schemes: Mapping[str, Scheme],
    planned: OutputPlan,
    limits: Limits,
) -> FlowBytes:
    """At the worst moment of the largest block."""
    tokens, size = Tokens.of(spec, passes), DTYPE_BYTES[layout.dtype]
    whole = any(p.whole_block for p in passes)
    hessians = any("hessian" in p.statistics for p in passes)
    # weights in place of others: turned, pruned, or with scales folded into them
    changed = any(p.transforms or p.prunes or p.reduces or (p.statistics and (p.whole_block or not p.products)) for p in passes)
    reducing = {name for p in passes for name in p.reduces}
    hidden = int(text_config(layout.source_config)["hidden_size"])
    tuned = any(p.tuned_rows for p in passes)
    ending = (2 if changed else 1) * head_size(layout) * size + JUDGED_BYTES
    between = block = step = statistics = mixture = 0
    surveyed = any(p.surveys_whole_blocks for p in passes)
    for unit, placed in zip(layout.units, planned.stages, strict=True):
        if not is_block(unit):
            continue
        stored = unit.as_stored()
        experts = sum(stage.expert is not None for stage in unit.stages)
        if experts:  # in the model's dtype what the experts read, in fp32 the sum of what they say, and where each token goes
            mixture = hidden * (size + 4) + top_k(layout) * 12
        for part in parts_of(unit, passes, schemes):
            stages, made = part.of(unit), sum(t.stop - t.start for number in part.stages for t in placed[number])
            loaded, decoded = sum(s.source_bytes for s in stages), sum(t.nbytes for s in stages for t in s.tensors)
            quantised = sum(prod(x.shape) for s in stages for x in s.linears if x.name in schemes)
            recoded = decoded if any(t.encoding != "plain" for s in stages for t in s.tensors) else 0
            steps = steps_in(part.of(stored), experts, layout)
            learned = TUNED_BYTES * sum(s.weights for sites in steps for s in sites) + ending if tuned else 0
            block = max(block, loaded + recoded + (decoded if changed else 0) + quantised * size + made + learned)
            if not steps:
                continue
            # between two steps flows what the output projections read: theirs are the steps of one linear
            between = max([between, *(round(s.columns * s.share * len(sites)) for sites in steps[1::2] for s in sites[:1])])
            wide = [4 * sum(s.weights for s in sites) for sites in steps]
            sums = [4 * sum(s.columns**2 for s in sites) for sites in steps]
            trials = 4 * TRIAL_COPIES * max(s.weights for sites in steps for s in sites)
            widened = sum(wide[:-1]) + trials if whole else max(wide)
            step = max(step, widened + max(batch_bytes(sites, tokens.length) for sites in steps))
            if tuned:
                step = max(step, sum(tuned_bytes(sites, tokens.length) for sites in steps))
            if hessians:
                factors = 4 * COPIES * max(s.columns for sites in steps for s in sites) ** 2
                statistics = max(statistics, (sum(sums) if whole else max(sums)) + factors)
            if reducing:
                statistics = max(
                    statistics, *(sum(sums[1::2]) + 4 * REDUCING_COPIES * s.columns**2 for sites in steps[1::2] for s in sites[:1])
                )
        if any(p.survey_hessians for p in passes):
            plain = [s.columns for sites in steps_in(stored.stages, experts, layout) for s in sites if s.share == 1.0]
            statistics = max(statistics, 4 * (sum(c**2 for c in plain) + COPIES * max(plain, default=0) ** 2))
        if surveyed:
            recoded = any(t.encoding != "plain" for s in unit.stages for t in s.tensors)
            block = max(block, unit.source_bytes + (sum(t.nbytes for s in unit.stages for t in s.tensors) if recoded else 0))
    together = max(tokens.evaluation, max(tokens.calibration, tokens.drift) if whole else tokens.calibration + tokens.drift)
    flowing = size * max(2 * tokens.streams * hidden + together * between, surveyed_states(passes) * tokens.calibration * hidden)
    flowing += mixture * (together if held(passes) else tokens.streams)
    kept = min(flowing, limits.activations)
    held_rows = sum(p.survey_held(sum(map(is_block, layout.units))) for p in passes) * tokens.length  # which are not spilled
    head = tokens.evaluation * (2 * hidden * size + SCORED_BYTES) + 2 * limits.slice + 2 * TILE_BYTES if tokens.evaluation else 0
    restored = size * hidden * max(tokens.calibration, tokens.evaluation, tokens.drift)
    return FlowBytes(kept + size * held_rows * hidden, flowing - kept, block, step, statistics, head, restored)


def batch_bytes(sites: Sequence[Site], length: int) -> int:
    """fp32 input and outputs of the tokens that go through a step together, and as much again as outputs between them."""
    tokens = max(BATCH_TOKENS, length)
    return round(4 * tokens * sum(s.share * (s.columns + 2 * sum(x.shape[0] for x in s.linears)) for s in sites))


def tuned_bytes(sites: Sequence[Site], length: int) -> int:
    """Of a step whose inputs and outputs are kept for a backward, and as much again for its gradients."""
    tokens = max(TUNED_TOKENS, length)
    return round(8 * tokens * sum(s.share * (s.columns + 2 * sum(x.shape[0] for x in s.linears)) for s in sites))


def flow_operations(spec: CompressionJobSpec, layout: ModelLayout, passes: Sequence[Pass], schemes: Mapping[str, Scheme]) -> FlowOperations:
    tokens = Tokens.of(spec, passes)
    whole = any(p.measures for p in passes) and any(p.whole_block for p in passes)
    hessians = any("hessian" in p.statistics for p in passes)
    products = sum(p.products for p in passes)
    blocks = [unit for unit in layout.units if is_block(unit)]
    forward = sums = encoding = tuning = 0.0
    rows = sum(p.survey_rows(len(blocks)) for p in passes)
    repeats = max((p.surveys for p in passes), default=0) + sum(p.survey_repeats for p in passes)
    surveyed = repeats * tokens.calibration + rows * tokens.length
    surveys = sum(surveyed * s.weights * s.share for unit in blocks for sites in steps_of(unit.as_stored(), layout) for s in sites)
    for unit in blocks:
        stored, steps = steps_of(unit.as_stored(), layout), [] if unit.dropped else steps_of(unit, layout)
        reducing = any(p.reduces for p in passes) and not unit.dropped
        for number, sites in enumerate(stored):
            through = tokens.of_the_original + (tokens.calibration if reducing else 0)
            forward += through * sum(s.weights * s.share for s in sites)
            if number == 1:  # scores and sums of values, over half of the positions on average
                forward += through * tokens.length * sites[0].columns
            if reducing and number % 2:
                sums += sum(s.share * tokens.calibration * s.columns**2 / 2 for s in sites)
                encoding += sum(s.columns**3 for s in sites)
        for number, sites in enumerate(steps):
            # a whole block is measured by a forward of its own, all but the last step
            flowing = tokens.of_the_result + (tokens.calibration + tokens.drift if whole and number + 1 < len(steps) else 0)
            forward += flowing * sum(s.weights * s.share for s in sites)
            if number == 1:
                forward += flowing * tokens.length * sites[0].columns
            for s in sites:
                tuning += 3 * sum(p.tuned_rows for p in passes) * tokens.length * s.weights * s.share
                sums += s.share * tokens.calibration * s.columns**2 / 2 if hessians else 0
                taken = sum(prod(x.shape) for x in s.linears if x.name in schemes or x.pruned)
                encoding += (products * taken * s.columns + s.columns**3) if products and taken else 0
    head = 2.0 * tokens.evaluation * head_size(layout)
    tuning += 3.0 * sum(p.tuned_rows for p in passes) * tokens.length * head_size(layout)  # both models' logits, and a gradient of one
    return FlowOperations(forward, sums, encoding, head, surveys, tuning)


def head_size(layout: ModelLayout) -> int:
    """Elements."""
    config = text_config(layout.config)
    return int(config["hidden_size"]) * int(config["vocab_size"])


def surveyed_states(passes: Sequence[Pass]) -> int:
    """Hidden states of the calibration rows that a survey holds at once: at a block's input, in its middle, at its output, at that of a
    variant, and before runs of blocks that a map is to stand in for."""
    rounds = max((p.surveys for p in passes), default=0)
    aside = max((p.survey_repeats for p in passes), default=0)
    return 0 if not rounds else max(3 + aside, 3 if rounds == 1 else 5)
