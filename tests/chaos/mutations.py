"""The guards of the operator, and how each is taken away: the test that it is there for must fail then (mutate.py).

A text that is not found exactly once is an error, so the list cannot rot; test_mutations.py looks at that in every run of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["MUTATIONS", "ROOT", "SOURCE", "TESTS", "Mutation", "mutated"]

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path("operator/kompressor_operator")
TESTS = Path("tests/operator")

AFTER_GUARDED = "".join(
    f"    {name},\n" for name in ("finished", "resolve", "refused", "ended", "suspended", "waiting", "preflight", "with_plan(start)")
)
"""The policies that are asked after the finalizer is on, up to the one that starts."""


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file` (below SOURCE), and `test` (file::name, below TESTS) fails."""

    guard: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "never two Jobs: the pods of the one before are awaited",
        "policies.py",
        "    if attempt is None or not alive:\n",
        "    if True:\n",
        "test_policies.py::test_never_two_at_once_a_pod_of_before_is_awaited",
    ),
    Mutation(
        "a Job that is being deleted is awaited",
        "policies.py",
        "    if job is not None and job.deleting:\n        message",
        "    if False:\n        message",
        "test_policies.py::test_a_job_that_is_being_deleted_is_awaited",
    ),
    Mutation(
        "the API server is asked before another Job",
        "policies.py",
        "    if not view.observed.live and (known or view.observed.jobs):\n",
        "    if False:\n",
        "test_policies.py::test_a_job_that_once_had_a_child_starts_nothing_before_the_api_server_was_asked",
    ),
    Mutation(
        "an end that is stored holds, whatever the Jobs say",
        "policies.py",
        "    if not view.job.finished:\n        return None\n    wanted",
        "    if not view.job.finished or view.observed.jobs:\n        return None\n    wanted",
        "test_policies.py::test_a_terminal_job_never_gets_another_job",
    ),
    Mutation(
        "a TTL only after the end is stored",
        "policies.py",
        '    if job.backoff_limit != limit:\n        wanted["backoffLimit"] = limit\n',
        '    if job.backoff_limit != limit:\n        wanted["backoffLimit"] = limit\n'
        '    if view.job.ttl is not None:\n        wanted["ttlSecondsAfterFinished"] = view.job.ttl\n',
        "test_policies.py::test_ttl_is_written_only_after_the_end_is_stored",
    ),
    Mutation(
        "a start that was cut short is finished",
        "policies.py",
        '    if view.job.status.get("jobName") == job.name:\n        return decision\n',
        "    if True:\n        return decision\n",
        "test_policies.py::test_a_start_that_was_never_told_is_finished",
    ),
    Mutation(
        "a name that a stranger has is not ours",
        "reconcile.py",
        "            if not ours(body, job):\n",
        "            if False:\n",
        "test_seams.py::test_children_are_created_once_and_a_strangers_is_not_ours",
    ),
    Mutation(
        "a status is written only over what it was decided on",
        "reconcile.py",
        '{"metadata": {"resourceVersion": job.resource_version}, "status": patch}',
        '{"status": patch}',
        "test_seams.py::test_a_status_that_was_decided_on_something_old_is_not_written",
    ),
    Mutation(
        "counters move after the write",
        "reconcile.py",
        "        if await self._write(job, status_patch(job, verdict, self.clock())):\n            self.metrics.told(job, verdict)\n",
        "        self.metrics.told(job, verdict)\n        if await self._write(job, status_patch(job, verdict, self.clock())):\n",
        "test_metrics.py::test_only_what_was_written_is_counted",
    ),
    Mutation(
        "a Job is deleted by its uid",
        "cluster.py",
        ', "preconditions": {"uid": uid}}',
        "}",
        "test_seams.py::test_a_job_is_deleted_by_its_uid_and_never_a_namesake",
    ),
    Mutation(
        "running out of memory has a bound",
        "retries.py",
        "if job.memory_plan < SMALLER_PLANS else None",
        "if True else None",
        "test_policies.py::test_out_of_memory_goes_on_smaller_twice_and_no_more",
    ),
    Mutation(
        "failures of attempts before count",
        "retries.py",
        "    return max(0, job.failures_before + failures(view, job) - apart)\n",
        "    return max(0, failures(view, job) - apart)\n",
        "test_policies.py::test_killed_but_not_for_memory_counts_against_the_limit",
    ),
    Mutation(
        "pods that are stopped with their group do not count",
        "retries.py",
        "    return min(job.failed, max(1, own))\n",
        "    return job.failed\n",
        "test_group.py::test_those_that_are_stopped_with_a_group_do_not_count",
    ),
    Mutation(
        "the status knows the failures when no Job is left",
        "retries.py",
        'failures_before=max(0, int(status.get("failures") or 0)),',
        "failures_before=0,",
        "test_retries.py::test_the_status_holds_what_the_next_attempt_is_made_from",
    ),
    Mutation(
        "a pause counts from the end of the attempt before",
        "retries.py",
        "    since = (view.now - ended).total_seconds()\n",
        "    since = 0.0\n",
        "test_retries.py::test_a_next_attempt_waits_as_a_next_pod_would",
    ),
    Mutation(
        "a queue alone writes suspend",
        "suspension.py",
        '    return view.job.is_true(Condition.SUSPENDED) and not view.job.spec.get("queueName")\n',
        "    return view.job.is_true(Condition.SUSPENDED)\n",
        "test_suspension.py::test_a_queue_alone_writes_suspend",
    ),
    Mutation(
        "only what the operator suspended does it let go",
        "suspension.py",
        '    return view.job.is_true(Condition.SUSPENDED) and not view.job.spec.get("queueName")\n',
        '    return not view.job.spec.get("queueName")\n',
        "test_policies.py::test_what_something_else_suspends_is_not_fought_over",
    ),
    Mutation(
        "a suspension is stored before the Job is touched",
        "suspension.py",
        "    going = job is not None and not job.ended and not job.deleting and view.job.is_true(Condition.SUSPENDED)\n",
        "    going = job is not None and not job.ended and not job.deleting\n",
        "test_policies.py::test_suspension_is_stored_before_the_job_is_touched",
    ),
    Mutation(
        "a Job that was removed is not taken for resumed",
        "policies.py",
        "    if resuming(view) and not view.observed.live:\n",
        "    if False:\n",
        "test_suspension.py::test_resumed_before_anything_was_removed_it_just_goes_on",
    ),
    Mutation(
        "the finalizer before the first child",
        "policies.py",
        f"    guarded,\n{AFTER_GUARDED}",
        f"{AFTER_GUARDED}    guarded,\n",
        "test_cleanup.py::test_a_finalizer_is_put_on_before_the_first_child_and_only_for_delete",
    ),
    Mutation(
        "the finalizer stays until the clean-up has ended",
        "cleanup.py",
        "    if observed.cleanup is not None and observed.cleanup.ended:\n",
        "    if observed.cleanup is not None:\n",
        "test_cleanup.py::test_a_clean_up_that_goes_on_is_left_alone",
    ),
    Mutation(
        "no clean-up beside a worker",
        "cleanup.py",
        "    if any(not lost(pod, view.now) for pod in alive):",
        "    if False and any(not lost(pod, view.now) for pod in alive):",
        "test_cleanup.py::test_the_worker_is_stopped_then_waited_for_then_comes_the_clean_up",
    ),
    Mutation(
        "a recipe is read once",
        "recipes.py",
        '    if job.status.get("recipe") or job.status.get("jobName"):\n',
        "    if False:\n",
        "test_recipes.py::test_what_was_read_first_is_what_counts",
    ),
    Mutation(
        "a name that the API server knows ends no job",
        "policies.py",
        "    if (unknown := merely_unknown(problems)) and not view.misspelt:\n",
        "    if (unknown := merely_unknown(problems)) and False:\n",
        "test_newer_crd.py::test_what_the_api_server_is_asked_for",
    ),
    Mutation(
        "no preflight where there is a plan",
        "preflight.py",
        ' or status.get("jobName") or status.get("plan"):\n',
        ' or status.get("jobName"):\n',
        "test_preflight.py::test_it_is_skipped_or_over",
    ),
    Mutation(
        "a preflight's pod has remedies of its own",
        "troubles.py",
        "{advice_for(reason, step)}",
        "{ADVICE[reason]}",
        "test_preflight.py::test_no_remedy_that_is_the_workers_alone",
    ),
    Mutation(
        "a claim that is missing is no want of nodes",
        "troubles.py",
        "        missing = _CLAIM.search(pod.unschedulable)",
        "        missing = None",
        "test_progress.py::test_a_pod_that_cannot_start_says_why_and_what_to_do",
    ),
    Mutation(
        "a readiness gate is no lost node",
        "pods.py",
        ' and ready.get("reason") != _GATED',
        "",
        "test_progress.py::test_a_node_that_falls_silent_is_named_before_anything_is_evicted",
    ),
    Mutation(
        "what follows a lost node is no new job",
        "progress.py",
        "Reason.RETRYING, Reason.NODE_LOST)",
        "Reason.RETRYING)",
        "test_progress.py::test_what_follows_a_lost_node_is_no_new_job",
    ),
    Mutation(
        "a Lease is judged by when it was seen to change",
        "leader.py",
        "        if self._holder() not in (\"\", self.identity) and self.clock() < runs_out:\n",
        "        renewed = datetime.fromisoformat(spec[\"renewTime\"])\n"
        "        if self._holder() not in (\"\", self.identity) and (datetime.now(UTC) - renewed).total_seconds() < self.duration:\n",
        "test_leader.py::test_times_in_the_lease_decide_nothing",
    ),
    Mutation(
        "ages are told by the API server's clock",
        "main.py",
        "known_passes(), cluster.now, tries",
        "known_passes(), clock, tries",
        "../chaos/test_clocks.py::test_a_clock_that_is_an_hour_off_changes_nothing",
    ),
    Mutation(
        "a refusal's Date may be a gateway's",
        "cluster.py",
        "        if answer.status >= 400:\n",
        "        self.now.heard(answer.getheader(\"Date\"), began)\n        if answer.status >= 400:\n",
        "test_server_clock.py::test_every_answer_of_the_server_tells_and_no_refusal_of_a_gateway",
    ),
    Mutation(
        "an older event changes nothing",
        "shelf.py",
        "        if known is not None and known.uid == record.uid and _version(known) > version:\n            return False\n",
        "",
        "test_store.py::test_an_older_event_changes_nothing",
    ),
    Mutation(
        "a namesake of a Job does not inherit what a pod said",
        "last_words.py",
        "return [pod for job, pod in self._kept.get(owner, ()) if job in there]",
        "return [pod for _, pod in self._kept.get(owner, ())]",
        "test_store.py::test_no_words_are_kept_of_what_another_pod_or_another_job_follows",
    ),
    Mutation(
        "a key is never in work twice",
        "work.py",
        "        if key in self._working:\n            self._dirty.add(key)\n            return\n",
        "",
        "test_work.py::test_a_key_is_never_in_work_twice_and_an_event_meanwhile_is_not_lost",
    ),
    Mutation(
        "events about children are asked for once for all",
        "bulletin.py",
        "        if board.since is None and self.clock() >= board.due:\n",
        "        if True:\n",
        "test_bulletin.py::test_one_answer_serves_all_until_it_is_old",
    ),
    Mutation(
        "a node ends what runs of a pod that is forgotten",
        "../../tools/agent/pod.py",
        "        if any(container.running for container in self.containers):\n            return self._next_kill()\n",
        "",
        "../e2e/test_node_agent_ends.py::test_a_pod_that_the_api_server_has_forgotten_leaves_no_process_and_no_folder",
    ),
)  # fmt: skip


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The file's text with the guard taken away. Raises ValueError if the text is not there exactly once."""
    text = (root / SOURCE / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}, {mutation.guard}: {mutation.old!r} is there {text.count(mutation.old)} times; write it anew")
    return text.replace(mutation.old, mutation.new)
