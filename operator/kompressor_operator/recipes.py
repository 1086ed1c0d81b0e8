"""A job's recipe: read once, merged into what the job says itself, and fixed in the job's immutable ConfigMap.

From then on the ConfigMap is the truth: the worker reads it, and so does the operator when it makes the worker's pod, so that an edit of
the recipe, or its deletion, changes nothing that runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kompressor_api import names
from kompressor_api.names import CLUSTER_RECIPE_KIND, MUTABLE, Reason
from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.decide import Decision, View
from kompressor_operator.manifests import RECIPE_FILE, config_map, spec_digest, stem
from kompressor_operator.observed import CompressionJob, Manifest, ours
from kompressor_operator.refusals import Refusal, conflict, refusal


@dataclass(frozen=True)
class Resolved:
    """The spec as the worker is told, and what status.recipe is to say."""

    spec: Manifest
    recipe: Manifest | None = None


def resolve(view: View) -> Decision | None:
    """Only where something is about to be made or an end is told; while a Job goes on nobody needs it."""
    if not view.job.spec.get("recipeRef") or view.resolved is not None:
        return None
    job, looked, told = view.observed.current, view.observed.preflight, view.job.status.get("jobName")
    if job is not None:
        wanted = bool(job.ended) or told != job.name
    else:
        wanted = not view.job.suspend and (looked is None or bool(looked.ended) or bool(told))
    return Decision(resolve=True) if wanted else None


async def fetch(cluster: Cluster, job: CompressionJob) -> Resolved | Refusal:
    """Asked for by `Decision.resolve`. A refusal goes to the status; if it is not final, it is tried again. Raises ApiError."""
    if job.status.get("recipe") or job.status.get("jobName"):
        stored = await _stored(cluster, job)
        if stored is not None:
            return stored
    ref = job.spec["recipeRef"]
    kind, name = ref.get("kind") or names.RECIPE_KIND, ref["name"]
    try:
        recipe = await cluster.get(kind, "" if kind == CLUSTER_RECIPE_KIND else job.namespace, name)
    except ApiError as error:
        if error.status not in (403, 404):
            raise
        # gone since we read it, and died before we could say so?
        return await _stored(cluster, job) or _unreadable(job, kind, name, error)
    return await _fixed(cluster, job, recipe)


def combined(spec: Manifest, recipe: Manifest) -> Manifest:
    """The job's spec with the recipe's passes; calibration and gates of the recipe only where the job has none."""
    merged = {name: value for name, value in spec.items() if name != "recipeRef"} | {"passes": recipe["passes"]}
    if recipe.get("calibration") and not spec.get("calibration"):
        merged["calibration"] = recipe["calibration"]
    if recipe.get("gates") and spec.get("evaluation") and not spec["evaluation"].get("gates"):
        merged["evaluation"] = {**spec["evaluation"], "gates": recipe["gates"]}
    return merged


async def _fixed(cluster: Cluster, job: CompressionJob, recipe: Manifest) -> Resolved | Refusal:
    """The ConfigMap made from this recipe, or the one that is there."""
    kind, name, spec = recipe["kind"], recipe["metadata"]["name"], recipe["spec"]
    if spec.get("gates") and not job.spec.get("evaluation"):
        message = f"{kind} {name} has gates, and spec.evaluation is missing: add held-out data, or name a recipe without gates"
        return Refusal(Reason.INVALID_SPEC, message, final=True)
    known = (job.status.get("recipe") or {}).get("digest")
    if known and known != spec_digest(spec):
        message = (
            f"ConfigMap {stem(job)} was deleted, and {kind} {name} is not what this job began with ({known}) any more: "
            "restore one of them, or delete this CompressionJob and apply it again"
        )
        return Refusal(Reason.RECIPE_NOT_FOUND, message)
    origin = {"kind": kind, "name": name, "generation": recipe["metadata"].get("generation", 0), "spec": spec}
    made = config_map(job, combined(job.spec, spec), origin)
    try:
        return _told(job, await cluster.create(made))
    except ApiError as error:
        if error.status == 409 and error.reason != "Conflict" and (stored := await _stored(cluster, job)):
            return stored
        refused = refusal("ConfigMap", stem(job), error.status, error.message)
        if refused is None:
            raise
        return refused


async def _stored(cluster: Cluster, job: CompressionJob) -> Resolved | Refusal | None:
    """What the ConfigMap says; None if there is none."""
    try:
        body = await cluster.get("ConfigMap", job.namespace, stem(job))
    except ApiError as error:
        if error.status == 404:
            return None
        raise
    return _told(job, body) if ours(body, job) else conflict("ConfigMap", job.namespace, stem(job))


def _told(job: CompressionJob, body: Manifest) -> Resolved:
    """Fields that may change while a job runs are the resource's, all else is the ConfigMap's."""
    fixed = json.loads(body["data"][names.JOB_FILE])["spec"]
    spec = {name: value for name, value in fixed.items() if name not in MUTABLE}
    spec |= {name: job.spec[name] for name in MUTABLE if name in job.spec}
    origin: dict[str, Any] = json.loads(body["data"].get(RECIPE_FILE, "null")) or {}
    recipe = {name: origin[name] for name in ("kind", "name", "generation") if name in origin}
    return Resolved(spec, recipe | {"digest": spec_digest(origin["spec"])} if origin else None)


def _unreadable(job: CompressionJob, kind: str, name: str, error: ApiError) -> Refusal:
    if error.status == 404:
        where = "" if kind == CLUSTER_RECIPE_KIND else f" in namespace {job.namespace}"
        message = f"there is no {kind} {name}{where}: create it, or correct spec.recipeRef; the operator looks again"
        return Refusal(Reason.RECIPE_NOT_FOUND, message)
    remedy = "the operator serves chosen namespaces and reads none of the whole cluster: name a CompressionRecipe"
    return Refusal(Reason.FORBIDDEN, f"{kind} {name}: {error.message}; {remedy}")
