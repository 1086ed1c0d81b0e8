"""Do activations in deployment look like those that calibration saw? From the statistics of one site, measured on both.

Three numbers, since no one of them sees all of it:

- distance: Jensen-Shannon distance (root of the divergence in bits; Endres and Schindelin 2003) of the two distributions of all values:
  0 for the same, 1 for nothing in common, whatever the activations' scale. A Wasserstein distance would need a unit, and the standard
  deviation is none here: a few outlier channels make most of it, so that the other thousands could move unseen.
- outside: share of values beyond the calibrated smallest and largest one, exact. That is what a static scale clips, and where one new
  outlier channel shows, which is too small a share of the values to change their distribution.
- channels: those whose range grew, which a static scale per channel, or a smoothing scale, would miss. Ranges tell no shares.

A site is drifting where the distance is above the threshold or more than OUTSIDE_PER_TOKEN values a token are outside. The API's default
threshold of 0.1 is a shift by a quarter of the standard deviation, or a scale changed by a fifth, of normally distributed values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from kompressor_worker.statistics import BINS, Statistics, bin_values

OUTSIDE_PER_TOKEN = 0.1
"""A tenth of the tokens has a value beyond what calibration saw. By chance it is one of all calibration's values, so next to none."""
COARSE = 32
"""bf16 patterns that are counted as one: four bins an octave, for each sign. Finer bins would see chance more than drift."""
GROWN = 0.5
"""A channel's range has grown when it leaves the calibrated one by this share of its width."""
NAMED = 5
"""Layers in the warning."""


class ChannelDrift(TypedDict):
    channel: int
    grown: float
    """By how many widths of its calibrated range (at least the mean width of all channels) the channel leaves it."""


class SiteDrift(TypedDict):
    """Of one input; JSON-ready, six digits."""

    distance: float
    outside: float
    """Share of deployment's values beyond the calibrated smallest and largest."""
    outsidePerToken: float
    largest: float
    """Deployment's largest magnitude over calibration's."""
    channels: NotRequired[float]
    """Share of channels whose range has grown; needs "range" on both sides."""
    worst: NotRequired[ChannelDrift]
    """The channel that has grown most, where one has."""


class Drift(TypedDict):
    threshold: float
    blocks: dict[str, float]
    """Block to the largest distance of its sites, in order."""
    sites: dict[str, SiteDrift]
    drifting: list[str]
    """Sites above the threshold, or with too many values outside; worst first."""


def compare(calibrated: Statistics, deployed: Statistics) -> SiteDrift | None:
    """Of one site; both have a "histogram", and "range" if channels are to be judged. None where either has seen nothing."""
    assert calibrated.columns == deployed.columns, (calibrated.columns, deployed.columns)
    if calibrated.histogram is None or deployed.histogram is None:
        return None
    finite = bin_values(calibrated.histogram.device).isfinite()
    counts, others = (torch.where(finite, s, 0).double() for s in (calibrated.histogram, deployed.histogram.to(finite.device)))
    if not float(counts.sum()) or not float(others.sum()):
        return None
    outside, largest = _outside(counts, others)
    found = SiteDrift(
        distance=_digits(distance(counts, others)),
        outside=_digits(outside),
        outsidePerToken=_digits(outside * deployed.columns),
        largest=_digits(largest),
    )
    if calibrated.low is not None and deployed.low is not None:
        grown = _grown(calibrated, deployed)
        found["channels"] = _digits(float((grown > GROWN).double().mean()))
        if float(grown.max()) > GROWN:
            found["worst"] = ChannelDrift(channel=int(grown.argmax()), grown=_digits(float(grown.max())))
    return found


def distance(counts: Tensor, others: Tensor) -> float:
    """Jensen-Shannon distance of two histograms [65536] over bf16 patterns, less what chance would make of equal distributions.

    To second order the divergence of two samples of n and m values over k bins is chi-square / 8 * (1/n + 1/m) nats by chance alone, with
    k - 1 degrees of freedom; its mean and two standard deviations are taken off: the few tokens of a rare expert are not to raise an alarm.
    """
    p, q = (h.double().view(BINS // COARSE, COARSE).sum(1) for h in (counts, others))
    n, m = float(p.sum()), float(q.sum())
    p, q = p / n, q / m
    middle = (p + q) / 2
    divergence = float(_entropy(middle) - (_entropy(p) + _entropy(q)) / 2)
    freedom = int((middle > 0).sum()) - 1
    chance = (freedom + 2 * math.sqrt(2 * freedom)) / 8 * (1 / n + 1 / m)
    return math.sqrt(min(1.0, max(0.0, divergence - chance) / math.log(2)))


def summarise(blocks: Mapping[str, Mapping[str, SiteDrift]], threshold: float) -> Drift:
    """Block to site to `compare`'s result, in the model's order; `threshold` is spec.drift.threshold."""
    sites = {name: found for of_block in blocks.values() for name, found in of_block.items()}
    over = {name: badness for name, found in sites.items() if (badness := _badness(found, threshold)) > 1}
    return Drift(
        threshold=threshold,
        blocks={name: max(found["distance"] for found in of_block.values()) for name, of_block in blocks.items() if of_block},
        sites=sites,
        drifting=sorted(over, key=lambda name: -over[name]),
    )


def warnings(drift: Drift) -> Sequence[str]:
    """One line, or none: which layers meet other activations in deployment than calibration saw, the worst first."""
    drifting, sites = drift["drifting"], drift["sites"]
    if not drifting:
        return ()
    named = ", ".join(f"{name} ({_describe(sites[name])})" for name in drifting[:NAMED])
    more = f" and {len(drifting) - NAMED} more" if len(drifting) > NAMED else ""
    return (
        f"drift: {len(drifting)} of {len(sites)} inputs differ from calibration (distance above {drift['threshold']:g}, or values outside "
        f"the calibrated range): {named}{more}; calibrate with data that is nearer to deployment's",
    )


def _badness(found: SiteDrift, threshold: float) -> float:
    """In units of the limits: above 1 is drifting. A threshold of 0 lets nothing but equality pass."""
    by_distance = found["distance"] / threshold if threshold else math.inf if found["distance"] else 0.0
    return max(by_distance, found["outsidePerToken"] / OUTSIDE_PER_TOKEN)


def _describe(found: SiteDrift) -> str:
    says = f"distance {found['distance']:.3g}, {100 * found['outside']:.3g} % outside"
    return says + (f", most in channel {found['worst']['channel']}" if "worst" in found else "")


def _outside(counts: Tensor, others: Tensor) -> tuple[float, float]:
    """Share of `others` beyond the smallest and largest value in `counts`, and largest magnitude over largest magnitude."""
    values = bin_values(counts.device)
    seen, met = values[counts > 0], values[others > 0]
    beyond = others[(values < seen.min()) | (values > seen.max())].sum()  # NaN bins compare false, and are empty
    return float(beyond / others.sum()), float(met.abs().max()) / max(float(seen.abs().max()), torch.finfo(torch.bfloat16).tiny)


def _grown(calibrated: Statistics, deployed: Statistics) -> Tensor:
    """fp32 [columns]."""
    assert calibrated.low is not None and calibrated.high is not None and deployed.low is not None and deployed.high is not None
    width = calibrated.high - calibrated.low
    beyond = torch.maximum(deployed.high.to(width.device) - calibrated.high, calibrated.low - deployed.low.to(width.device))
    return beyond.clamp(min=0) / torch.maximum(width, width.mean()).clamp(min=torch.finfo(torch.bfloat16).tiny)


def _entropy(share: Tensor) -> Tensor:
    """Nats."""
    return -torch.xlogy(share, share).sum()


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
