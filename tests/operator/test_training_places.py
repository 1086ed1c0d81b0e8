"""Places inside the parameters of a pass that trains: credentials, certificates and claims reach the pod as those of any other."""

from __future__ import annotations

from kompressor_api.names import Role
from kompressor_api.training import training_locations

PASSES = [
    {"rtn": {"scheme": "W8A16"}},
    {
        "distil": {
            "dataset": {"uri": "s3://data/t", "credentialsSecret": "data"},
            "teacher": {"source": {"uri": "pvc://teachers/large"}, "offline": {"location": {"uri": "pvc://logits/large"}}},
            "student": {"source": {"uri": "hf://owner/small"}},
        }
    },
]


def test_each_is_found_with_what_it_is_for() -> None:
    assert {role: place["uri"] for role, place in training_locations(PASSES)} == {
        Role.TRAINING: "s3://data/t",
        Role.TEACHER: "pvc://teachers/large",
        Role.LOGITS: "pvc://logits/large",
        Role.STUDENT: "hf://owner/small",
    }


def test_what_is_no_location_is_left_for_the_worker_to_refuse() -> None:
    odd = [{"distil": None}, {"distil": {"teacher": "s3://x", "dataset": {"uri": 3}, "student": {"source": []}}}, "distil", {"rtn": {}}]
    assert training_locations(odd) == []
