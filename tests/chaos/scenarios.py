"""Lives of a job, each with what happens from outside and how it must end, whoever dies on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scene import Scene
from stage import HELD, SUCCEED, ApiRefusal, report

from kompressor_api import names

__all__ = ["SCENARIOS", "Scenario"]

SAY = (
    'resource() { curl -s --cacert $S/ca.crt -H "Authorization: Bearer $(cat $S/token)" "$@" '
    f"https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/apis/{names.API_VERSION}/namespaces/$POD_NAMESPACE/{names.PLURAL}"
    "/$PLAY/status; }; "
    'acting() { until resource -f -X PATCH -H "Content-Type: application/merge-patch+json" '
    '-d "{\\"status\\":{\\"progress\\":{\\"unit\\":\\"$POD_NAME\\"}}}" > /dev/null; do sleep 0.1; done; }'
)
"""A line of shell after which `acting` tells on the resource that this pod heeds signals."""
STOPPED_ONCE = (
    HELD,
    SAY,
    "trap 'exit 75' TERM",
    f'if resource | grep -q \'"type": *"Suspended"\'; then {SUCCEED}; fi',
    "acting; while :; do sleep 0.05; done",
)
"""Goes on until it is told to stop; when the resource has been suspended before, it succeeds."""
REFUSED = {"rtn": {"scheme": "W8A8", "targets": [report("SourceNotFound", "nothing there", 64)]}}
"""What a preflight finds wrong."""
NOTHING_THERE = {"passes": [{"rtn": {"scheme": "W8A8", "targets": [report("SourceNotFound", "nothing", 64)]}}]}
"""A planner that finds no source."""
QUEUE = {"queueName": "gpu"}
CLEANED = "s3://models/two-0"
"""What `kompressor clean` is asked for; the actor exits with the last number."""


def nothing(scene: Scene) -> None:
    """Nothing happens from outside."""


def stop_and_go(scene: Scene) -> None:
    """The user suspends the job once its worker is at work, and lets it go on."""
    pod = acting(scene)
    suspend(scene, True)
    scene.until("Suspended")
    scene.witness.until(lambda: pod not in {p["metadata"]["name"] for p in alive(scene)}, what="the worker has stopped")
    suspend(scene, False)


def admitted(scene: Scene) -> None:
    """A queue lets the Job go on."""
    scene.until("Queued")
    admit(scene)


def admitted_stopped_admitted(scene: Scene) -> None:
    """The same; then the user stops the job, whose Job goes, and the next one is admitted as well."""
    admitted(scene)
    acting(scene)
    suspend(scene, True)
    scene.until("Suspended")
    scene.witness.until(lambda: not scene.witness.children("jobs", scene.uid), what="its Job is gone")
    suspend(scene, False)
    scene.until("Queued")
    admit(scene)


def recipe_goes(scene: Scene) -> None:
    """The recipe is deleted once the job is at work."""
    scene.until("Completed")
    scene.stage.delete(names.RECIPE_PLURAL, "one")


def deleted(scene: Scene) -> None:
    scene.until("Completed")
    scene.strike()
    scene.witness.until(lambda: not scene.witness.job("play"), what="the resource is gone")


@dataclass(frozen=True)
class Scenario:
    script: tuple[str, ...] = (SUCCEED,)
    spec: Mapping[str, Any] = field(default_factory=dict)
    story: Callable[[Scene], None] = nothing
    ends: str = "Completed"
    then: Mapping[str, Any] = field(default_factory=dict)
    """Of the status at the end."""
    attempts: int = 1
    """Jobs that compressed, in all."""
    recipe: bool = False

    def begin(self, scene: Scene) -> None:
        """Applies what there is to apply."""
        if self.recipe:
            made = {"apiVersion": names.API_VERSION, "kind": names.RECIPE_KIND, "metadata": {"name": "one"}}
            passes = [{"rtn": {"scheme": "W8A8", "ignore": list(self.script)}}]
            scene.stage.create(names.RECIPE_PLURAL, made | {"spec": {"passes": passes}})
            scene.play(passes=None, recipeRef={"name": "one"}, **self.spec)
        else:
            scene.play(*self.script, **self.spec)

    def end(self, scene: Scene) -> None:
        """The story, and that it ends as it must."""
        self.story(scene)
        if self.story is deleted:
            ended = max((j for j in scene.witness.ever["compressionjobs"].values()), key=lambda j: int(j["metadata"]["resourceVersion"]))
            status = ended["status"]
        else:
            status = scene.until(self.ends)
        for name, value in self.then.items():
            assert status.get(name) == value, (name, status)
        made = {job["metadata"]["name"] for job in scene.witness.children("jobs", scene.uid, ever=True)}
        assert len(made) == self.attempts, made


SCENARIOS = {
    "life": Scenario(then={"attempt": 1, "retries": 0}),
    "preflight": Scenario(spec={"preflight": "Job"}),
    "pod template": Scenario(spec={"preflight": "Job", "worker": {"podTemplate": {"metadata": {"labels": {"team": "one"}}}}}),
    "invalid": Scenario(spec={"preflight": "Job", **NOTHING_THERE}, ends="SourceNotFound", attempts=0),
    "corrupt": Scenario(script=(report("CorruptSource", "a digest differs", 65),), ends="CorruptSource", then={"attempt": 1}),
    "out of memory": Scenario(
        script=('[ -n "$KOMPRESSOR_MEMORY_PLAN" ] && [ "$KOMPRESSOR_MEMORY_PLAN" != 0 ] || exit 71', SUCCEED),
        attempts=2,
        then={"attempt": 2, "memoryPlan": 1, "failures": 0},
    ),
    "killed": Scenario(script=("case $POD_NAME in *-1-?????) exit 137;; esac", SUCCEED), attempts=2, then={"attempt": 2, "failures": 1}),
    "suspended": Scenario(script=STOPPED_ONCE, story=stop_and_go, then={"attempt": 1, "failures": 0}),
    "queued": Scenario(spec=QUEUE, story=admitted),
    "queued and suspended": Scenario(script=STOPPED_ONCE, spec=QUEUE, story=admitted_stopped_admitted, attempts=2, then={"attempt": 2}),
    "recipe": Scenario(recipe=True, story=recipe_goes),
    "deletion policy": Scenario(spec={"deletionPolicy": "Delete", "output": {"uri": CLEANED}}, story=deleted),
    "time to live": Scenario(spec={"ttlSecondsAfterFinished": 1}),
}


def alive(scene: Scene) -> list[dict[str, Any]]:
    return [p for p in scene.witness.children("pods", scene.uid) if p["status"].get("phase") == "Running"]


def acting(scene: Scene) -> str:
    """Waits until a worker that lives has told so on the resource. Returns its pod."""

    def told() -> str:
        unit = scene.witness.status("play").get("progress", {}).get("unit", "")
        return unit if unit in {p["metadata"]["name"] for p in alive(scene)} else ""

    return scene.witness.until(told, what="a worker acts") or ""


def suspend(scene: Scene, suspended: bool) -> None:
    scene.stage.patch("compressionjobs", "play", {"spec": {"suspend": suspended}})


def admit(scene: Scene) -> None:
    """As Kueue does; until it has taken."""

    def waiting() -> list[str]:
        return [j["metadata"]["name"] for j in scene.witness.children("jobs", scene.uid) if j["spec"].get("suspend")]

    for name in scene.witness.until(waiting, what="a Job waits"):
        try:
            scene.stage.patch("jobs", name, {"spec": {"suspend": False}})
        except ApiRefusal as refusal:
            assert refusal.status == 404
