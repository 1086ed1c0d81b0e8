"""What passes that leave fewer experts cannot do is said in one line, before a weight is read; and what they will do is planned then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_structured_refusals import W4, Passes, job, unread

from kompressor_worker.errors import UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan

__all__ = ["unread"]

PRUNE, MERGE = {"pruneExperts": {"experts": 3}}, {"mergeExperts": {"experts": 3}}
GROUPS: dict[str, Any] = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
REFUSED: dict[str, tuple[str, Passes, str]] = {
    "no experts": ("llama", [PRUNE], r"pruneExperts: the model \(model_type 'llama'\) has no experts; leave pruneExperts out"),
    "no experts to merge": ("qwen3", [MERGE], "mergeExperts: the model .*has no experts"),
    "fewer than are routed to": (
        "mixtral",
        [{"pruneExperts": {"ratio": 0.75}}],
        "ratio 0.75 of num_local_experts 4 leaves 1, fewer than the 2 that a token is routed to .*ask for at most 0.5",
    ),
    "fewer merged": ("qwen3_moe", [{"mergeExperts": {"ratio": 0.8}}], "mergeExperts: ratio 0.8 .*leaves 1, fewer than the 2"),
    "more experts": ("mixtral", [{"pruneExperts": {"experts": 4}}], "num_local_experts 4 is to stay, the model has 4; ask for fewer"),
    "nothing goes": ("mixtral", [{"mergeExperts": {"ratio": 0.1}}], "leaves 4, rounded; choose another ratio"),
    "both": ("mixtral", [{"pruneExperts": {"ratio": 0.5, "experts": 2}}], "give either ratio, such as 0.25, or experts"),
    "neither": ("mixtral", [{"mergeExperts": {}}], "give either ratio, such as 0.25, or experts"),
    "by layer": ("mixtral", [{"pruneExperts": {"experts": 3, "ignore": ["re:.*0.*"]}}], "no portable loader reads sizes by layer"),
    "another importance": ("mixtral", [{"pruneExperts": {"experts": 3, "importance": "norm"}}], "importance: .*'reap' or 'frequency'"),
    "importance of merged ones": ("mixtral", [{"mergeExperts": {"experts": 3, "importance": "reap"}}], "'importance' is not a parameter"),
    "stacked experts": ("gpt_oss", [PRUNE], "model_type 'gpt_oss' is not one whose function is known"),
    "twice": ("mixtral", [PRUNE, {"pruneExperts": {"experts": 2}}], "an earlier pass has left fewer experts; ask once"),
    "pruned, then merged": ("mixtral", [PRUNE, {"mergeExperts": {"experts": 2}}], "mergeExperts: an earlier pass has left fewer experts"),
    "after gptq": ("mixtral", [W4, PRUNE], "is W4A16 by an earlier pass; put pruneExperts before the passes that quantise"),
    "after wanda": ("mixtral", [{"wanda": {"sparsity": 0.5}}, MERGE], "is to have zeros by an earlier pass, .*put mergeExperts first"),
    "after kvCache": ("mixtral", [{"kvCache": {}}, PRUNE], "has scales for the cache as it was; put pruneExperts before kvCache"),
    "zeros by a survey of other experts": (
        "mixtral",
        [PRUNE, {"wanda": {"sparsity": 0.5, "allocation": "error"}}],
        "wanda: allocation error goes by a survey of the source, and an earlier pass has left fewer experts since",
    ),
    "groups of unequal size": (
        "deepseek_v3",
        [{"pruneExperts": {"experts": 10}}],
        r"n_routed_experts 10 is to stay, in 4 groups \(n_group\) of equal size; ask for a multiple of 4",
    ),
    "groups too thin to be judged": (
        "deepseek_v3",
        [{"mergeExperts": {"ratio": 0.75}}],
        "4 experts in 4 groups .*are 1 a group, .*each judged by its best 2; leave 8 or more",
    ),
    "groups with too few to be routed to": (
        "deepseek_v3",
        [{"pruneExperts": {"experts": 8}}],
        "8 experts in 4 groups .*are 2 a group, and a token is routed to 3 of 1 groups .*leave 12 or more",
    ),
}
SHAPES: dict[str, dict[str, Any]] = {
    "groups of unequal size": GROUPS,
    "groups too thin to be judged": GROUPS,
    "groups with too few to be routed to": {**GROUPS, "topk_group": 1, "num_experts_per_tok": 3},
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_weight_is_read(case: str, tmp_path: Path) -> None:
    family, passes, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as refused:
        make_plan(load_job(job(tmp_path, family, passes, **SHAPES.get(case, {})), {}), {})
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("one", [PRUNE, MERGE], ids=["pruneExperts", "mergeExperts"])
def test_without_data_to_measure_on(one: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"passes\[0\].\w+Experts: measures activations, and spec.calibration is missing; add"):
        make_plan(load_job(job(tmp_path, "mixtral", [one], calibrated=False), {}), {})


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("one", [PRUNE, MERGE], ids=["pruneExperts", "mergeExperts"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_the_plan_says_what_will_be_there(family: str, one: dict[str, Any], tmp_path: Path) -> None:
    """Bytes, operations and names from headers alone: what the survey finds changes which experts go, not how many."""
    plan = make_plan(load_job(job(tmp_path, family, [one, W4]), {}), {})
    numbers = {int(x.name.split(".experts.")[1].split(".")[0]) for x in plan.layout.linears() if ".experts." in x.name}
    assert numbers == {0, 1, 2}
    assert all(x.shape[0] == 3 for x in plan.layout.linears() if x.kind == "router")
    assert all(name.split(".experts.")[1].split(".")[0] in "012" for name in plan.schemes if ".experts." in name)
    whole = make_plan(load_job(job(tmp_path, family, [W4]), {}), {})
    said = plan.as_json()
    assert said["parameters"][0] > said["parameters"][1] and plan.output.tensor_bytes < whole.output.tensor_bytes
    assert said["multiplyAddsPerToken"][1] < said["multiplyAddsPerToken"][0], "the router has fewer rows, the rest is as it was"
    assert said["multiplyAddsPerToken"][1] > 0.99 * said["multiplyAddsPerToken"][0]
