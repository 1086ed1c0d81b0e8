"""The operator on a real control plane and a real node: from apply to the end, and what may happen on the way."""

from __future__ import annotations

import json
import signal
from datetime import datetime, timedelta

import pytest
from stage import GO_ON, HELD, SUCCEED, ApiRefusal, Operator, Stage, eventually, report

from kompressor_api import names

pytestmark = pytest.mark.cluster


def test_apply_makes_five_children_and_the_end_is_told(stage: Stage, operator: Operator) -> None:
    uid = stage.play(HELD, "held end", SUCCEED, ttlSecondsAfterFinished=3600)
    stage.until("Compressing")
    stage.cue("end")
    status = stage.until("Completed")
    assert stage.conditions() == {"Ready": "True", "Validated": "True", "Complete": "True"}
    assert status["phase"] == "Complete" and status["observedGeneration"] == 1
    assert status["progress"] == {"percent": 100, "unit": "end"} and status["result"] == {
        "ratio": "4.0x",
        "outputBytes": 25,
        "sourceBytes": 100,
    }
    assert status["startTime"] <= status["completionTime"] and status["attempt"] == 1
    eventually(lambda: stage.events() == ["Compressing", "Completed"])
    for child in stage.children(uid):
        if child["metadata"]["name"].startswith(f"{status['jobName']}-"):
            continue  # the pod is the Job's
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (uid, True, True)
    (config,) = stage.list("configmaps", f"{names.LABEL_JOB_UID}={uid}")
    told = json.loads(config["data"]["job.json"])
    assert told["metadata"]["uid"] == uid and told["spec"] == stage.get("compressionjobs", "play")["spec"]
    meta = stage.get("compressionjobs", "play")["metadata"]
    assert "finalizers" not in meta and not any("kopf" in name for name in meta.get("annotations", {}))
    eventually(lambda: stage.get("jobs", status["jobName"])["spec"].get("ttlSecondsAfterFinished") == 3600)


def requests_of_lives(stage: Stage, lives: range) -> dict[str, int]:
    """What an operator asks of the API server from its start to the end of these lives."""
    with stage.operator() as running:
        for number in lives:
            stage.play(SUCCEED, name=f"play-{number}", ttlSecondsAfterFinished=3600)
        for number in lives:
            name = stage.until("Completed", f"play-{number}")["jobName"]
            eventually(lambda job=name: "ttlSecondsAfterFinished" in stage.get("jobs", job)["spec"])
        running.stop()
        made: dict[str, int] = json.loads(running.said("stopping")[0]["detail"])
    return made


def test_a_life_takes_at_most_twelve_requests(stage: Stage) -> None:
    """Where the cores are busy with other things the operator looks why a pod does not start; an undisturbed try is what counts."""
    once = {"LIST CompressionJob": 1, "LIST Job": 1, "LIST Pod": 1}
    tries = []
    for turn in range(5):
        made = requests_of_lives(stage, range(3 * turn, 3 * turn + 3))
        listed = {kind: made.pop(kind) for kind in list(made) if kind.startswith("LIST")}
        if listed == once and sum(made.values()) <= 3 * 12:
            return
        tries.append(listed | made)
    raise AssertionError(f"more than 12 requests a life, or more lists than the first, in each of {tries}")


def test_the_workers_token_reaches_this_one_status_and_nothing_else(stage: Stage, operator: Operator) -> None:
    """With the real token of the real pod, through the policy on who writes what."""
    base = f"{names.GROUP}/{names.VERSION}/namespaces/$POD_NAMESPACE/{names.PLURAL}"
    ask = (
        "T=/var/run/secrets/kubernetes.io/serviceaccount; "
        'api() { curl -s -o /dev/null -w "%{http_code} " --cacert $T/ca.crt -H "Authorization: Bearer $(cat $T/token)" '
        f'-H "Content-Type: application/merge-patch+json" "$@"; }}; U=https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/apis/{base}'
    )
    uid = stage.play(
        ask,
        "{ api $U/play; api $U/other; api $U; "
        """api -X PATCH -d '{"status":{"progress":{"percent":7}}}' $U/play/status; """
        """api -X PATCH -d '{"status":{"phase":"Mine"}}' $U/play/status; """
        """api -X PATCH -d '{"status":{"progress":{"percent":7}}}' $U/other/status; } > /dev/termination-log""",
        "exit 64",
    )
    stage.play(GO_ON, name="other", suspend=True)
    stage.until("InvalidSpec")
    (pod,) = stage.pods(uid)
    said = pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"]
    assert said.split() == ["200", "403", "403", "200", "403", "403"], said


def test_deletion_cleans_up_and_the_worker_gets_its_sigterm(stage: Stage, operator: Operator) -> None:
    uid = stage.play(GO_ON)
    stage.acting(uid)
    stage.delete("compressionjobs", "play", propagationPolicy="Background")
    eventually(lambda: not stage.children(uid))  # the garbage collector notices a new CRD only after half a minute
    assert [entry["message"] for entry in operator.entries if entry["level"] in ("error",)] == []


def test_foreground_deletion_cleans_up(stage: Stage, operator: Operator) -> None:
    uid = stage.play(GO_ON)
    stage.until("Compressing")
    stage.delete("compressionjobs", "play", propagationPolicy="Foreground")
    eventually(lambda: not stage.children(uid) and not stage.list("compressionjobs"))


def test_deletion_while_the_operator_is_down(stage: Stage) -> None:
    with stage.operator_process() as running:
        uid = stage.play(GO_ON)
        stage.until("Compressing")
        assert running.stop() < 30, "the chart's grace period"
    stage.delete("compressionjobs", "play", propagationPolicy="Background")
    eventually(lambda: not stage.children(uid))
    with stage.operator():
        assert not stage.children(uid)


def test_a_namesake_gets_children_of_its_own(stage: Stage, operator: Operator) -> None:
    old = stage.play(GO_ON)
    stage.until("Compressing")
    stage.delete("compressionjobs", "play", propagationPolicy="Background")
    new = stage.play(SUCCEED)
    stage.until("Completed")
    eventually(lambda: not stage.children(old))
    assert len(stage.jobs(new)) == 1


def test_a_final_code_fails_once_and_for_good(stage: Stage, operator: Operator) -> None:
    uid = stage.play(report("CorruptSource", "model-2.safetensors: truncated at byte 7; upload it again", 65))
    status = stage.until("CorruptSource")
    assert stage.conditions() == {"Ready": "False", "Validated": "True", "Stalled": "True", "Failed": "True"}
    assert stage.message().startswith("model-2.safetensors: truncated at byte 7; upload it again; upload the checkpoint again")
    assert status["retries"] == 1 and "completionTime" in status
    eventually(lambda: stage.events()[-1] == "CorruptSource")
    stage.patch("compressionjobs", "play", {"spec": {"retry": {"limit": 9}}})
    eventually(lambda: stage.status()["observedGeneration"] == 2)
    stage.delete("jobs", status["jobName"], propagationPolicy="Background")
    eventually(lambda: not stage.jobs(uid))
    operator.stop()
    with stage.operator():
        assert stage.jobs(uid) == [] and stage.reason() == "CorruptSource"


def test_out_of_memory_goes_on_twice_with_a_smaller_plan(stage: Stage, operator: Operator) -> None:
    uid = stage.play('[ "$KOMPRESSOR_MEMORY_PLAN" = 2 ] || exit 71', SUCCEED)
    status = stage.until("Completed")
    assert status["attempt"] == 3 and len(stage.jobs(uid)) == 3
    assert [job["metadata"]["annotations"][names.ANNOTATION_MEMORY_PLAN] for job in stage.jobs(uid)] == ["0", "1", "2"]
    assert all(job["spec"]["backoffLimit"] == 4 for job in stage.jobs(uid))


def test_out_of_memory_three_times_is_the_end(stage: Stage, operator: Operator) -> None:
    uid = stage.play("exit 71")
    stage.until("OutOfMemory")
    assert stage.conditions()["Failed"] == "True" and len(stage.jobs(uid)) == 3
    assert "spec.worker.resources.limits.memory" in stage.message()


def test_killed_from_outside_is_a_next_attempt_that_counts_and_waits(stage: Stage, operator: Operator) -> None:
    """Ten seconds, as a next pod would; also where the operator is killed meanwhile."""
    uid = stage.play("exit 137", retry={"limit": 1})
    stage.until("Retrying")
    operator.stop(signal.SIGKILL)
    with stage.operator():
        stage.until("WorkerCrashed")
    first, second = stage.jobs(uid)
    assert [job["spec"]["backoffLimit"] for job in (first, second)] == [1, 0]
    ended = next(c["lastTransitionTime"] for c in first["status"]["conditions"] if c["type"] == "Failed")
    waited = datetime.fromisoformat(second["metadata"]["creationTimestamp"]) - datetime.fromisoformat(ended)
    assert waited >= timedelta(seconds=10)
    assert "gave up after 2 failures" in stage.message() and stage.status()["failures"] == 2


def test_retried_in_place_until_the_limit(stage: Stage, operator: Operator) -> None:
    uid = stage.play(report("StorageFailed", "s3://models: 503; check the endpoint", 74), retry={"limit": 0})
    stage.until("StorageFailed")
    assert len(stage.jobs(uid)) == 1 and stage.conditions()["Failed"] == "True"


def test_a_worker_that_was_told_to_stop_is_replaced_and_not_counted(stage: Stage, operator: Operator) -> None:
    uid = stage.play(HELD, GO_ON.replace("exit 75", "held bye; exit 75"), retry={"limit": 0})
    pod = stage.acting(uid)
    stage.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=600)
    stage.until("Retrying")
    stage.cue("bye")
    eventually(lambda: [p for p in stage.pods(uid) if p["metadata"]["uid"] != pod["metadata"]["uid"]])
    stage.until("Compressing")
    eventually(lambda: stage.events() == ["Compressing", "Retrying", "Compressing"])
    (job,) = stage.jobs(uid)
    assert job["status"].get("failed", 0) == 0 and stage.status()["retries"] == 0


def test_suspend_stops_and_resume_goes_on(stage: Stage, operator: Operator) -> None:
    uid = stage.play(GO_ON)
    stage.acting(uid)
    stage.patch("compressionjobs", "play", {"spec": {"suspend": True}})
    stage.until("Suspended")
    eventually(lambda: not stage.pods(uid))
    assert stage.conditions() == {"Ready": "False", "Validated": "True", "Suspended": "True"}
    stage.patch("compressionjobs", "play", {"spec": {"suspend": False}})
    stage.until("Compressing")
    assert stage.conditions() == {"Ready": "False", "Reconciling": "True", "Validated": "True", "Suspended": "False"}
    assert len(stage.jobs(uid)) == 1


def test_applied_suspended_it_waits(stage: Stage, operator: Operator) -> None:
    uid = stage.play(SUCCEED, suspend=True)
    stage.until("Suspended")
    assert stage.children(uid) == []
    stage.patch("compressionjobs", "play", {"spec": {"suspend": False}})
    stage.until("Completed")


def test_a_changed_retry_limit_reaches_the_job(stage: Stage, operator: Operator) -> None:
    uid = stage.play(GO_ON)
    stage.until("Compressing")
    stage.patch("compressionjobs", "play", {"spec": {"retry": {"limit": 7}}})
    eventually(lambda: stage.jobs(uid)[0]["spec"]["backoffLimit"] == 7)


def test_a_deleted_child_job_comes_back(stage: Stage, operator: Operator) -> None:
    uid = stage.play(GO_ON)
    stage.until("Compressing")
    (job,) = stage.jobs(uid)
    stage.delete("jobs", job["metadata"]["name"], propagationPolicy="Background")
    eventually(lambda: [j for j in stage.jobs(uid) if j["metadata"]["uid"] != job["metadata"]["uid"]])
    assert len(stage.jobs(uid)) == 1


# ---- bad specs


def test_a_misspelt_parameter_that_the_api_server_keeps_is_refused_by_the_operator(stage: Stage, operator: Operator) -> None:
    """Not strict, as Helm and the Python client are; the policy that would refuse it is left out on this stage."""
    uid = stage.play(SUCCEED, passes=[{"rtn": {"scheme": "W8A8", "groupsize": 64}}])
    stage.until("InvalidSpec")
    assert "spec.passes[0].rtn.groupsize: unknown parameter (value 64); did you mean groupSize?" in stage.message()
    assert stage.conditions() == {"Ready": "False", "Validated": "False", "Stalled": "True", "Failed": "True"}
    assert stage.children(uid) == [] and eventually(lambda: stage.events() == ["InvalidSpec"])


def test_a_name_beside_the_spec_is_refused_by_the_operator(stage: Stage, operator: Operator) -> None:
    uid = stage.play(SUCCEED, beside={"suspend": True})
    stage.until("InvalidSpec")
    assert "suspend: unknown field beside spec (value true); it belongs under spec" in stage.message()
    assert stage.children(uid) == []


def test_what_only_the_pod_validation_knows_is_told_as_an_invalid_spec(stage: Stage, operator: Operator) -> None:
    stage.play(SUCCEED, worker={"resources": {"requests": {"cpu": 2}, "limits": {"cpu": 1}}})
    stage.until("InvalidSpec")
    assert "must be less than or equal to cpu limit" in stage.message()


def test_a_file_uri_never_reaches_a_pod(stage: Stage, operator: Operator) -> None:
    """Refused by the CRD's own rule; the operator's refusal, for CRDs without it, is a table test."""
    with pytest.raises(ApiRefusal, match="file://"):
        stage.play(SUCCEED, output={"uri": "file:///tmp/x"})
