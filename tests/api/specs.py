"""Specs that the models and the API server must judge alike: good ones, wrong values, misspelt names. By what they are, each as the changes
to a spec that is good."""

from __future__ import annotations

from typing import Any

__all__ = ["GOOD", "MISSPELT", "WRONG_VALUES", "Spec"]

Spec = dict[str, Any]

GOOD: dict[str, Spec] = {
    "minimal": {},
    "every scheme mixes": {
        "passes": [{"rtn": {"scheme": "FP8_DYNAMIC", "targets": ["re:.*attn.*"]}}, {"rtn": {"scheme": "W8A8", "ignore": ["lm_head"]}}]
    },
    "a whole number with a point": {"retry": {"limit": 4.0}, "ttlSecondsAfterFinished": 60.0},
    "per channel": {"passes": [{"rtn": {"scheme": "W4A16", "groupSize": -1}}]},
    "from a hub": {"model": {"source": {"uri": "hf://org/name", "revision": "main", "credentialsSecret": "hub"}}},
    "volumes": {"model": {"source": {"uri": "pvc://models/a"}}, "output": {"uri": "pvc://models/b"}},
    "one volume, its root": {"model": {"source": {"uri": "pvc://models"}}},
    "a store of one's own": {
        "output": {
            "uri": "s3://models/out",
            "endpoint": "https://s3.example.org:9000",
            "region": "eu-1",
            "pathStyle": True,
            "caBundle": {"configMap": "ca", "key": "ca.pem"},
            "credentialsSecret": "keys",
            "format": "compressed-tensors",
        }
    },
    "the same key in another store": {"output": {"uri": "s3://models/llama", "endpoint": "http://other:9000"}},
    "a worker": {
        "worker": {
            "image": "worker:dev",
            "resources": {"requests": {"cpu": 4, "memory": "24Gi"}, "limits": {"nvidia.com/gpu": "1"}, "claims": [{"name": "gpu"}]},
            "nodeSelector": {"kubernetes.io/arch": "amd64"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}],
            "serviceAccountName": "trusted",
        }
    },
    "calibrated, judged and compared": {
        "calibration": {
            "dataset": {"uri": "hf://datasets/org/name", "revision": "main", "format": "parquet", "messages": "conversation"},
            "samples": 128,
            "sequenceLength": 512,
            "packing": True,
            "seed": 4294967295,
        },
        "evaluation": {
            "dataset": {"uri": "s3://data/held-out.jsonl", "field": "text", "credentialsSecret": "data"},
            "gates": [{"metric": "perplexity", "maxIncrease": "2.5%"}, {"metric": "kl", "maxKL": 0.05}],
        },
        "drift": {"dataset": {"uri": "pvc://logs/today", "tokens": "input_ids"}, "threshold": 0.25},
    },
    "plain text, whole numbers": {
        "calibration": {"dataset": {"uri": "s3://data/a.txt", "format": "text"}},
        "evaluation": {"dataset": {"uri": "s3://data/b.txt"}, "gates": [{"metric": "kl", "maxKL": 1}]},
        "drift": {"dataset": {"uri": "s3://data/c.txt"}, "threshold": 0},
    },
    "a recipe": {"passes": None, "recipeRef": {"name": "w4"}, "drift": {"dataset": {"uri": "s3://data/c"}}},
    "a recipe of the cluster": {"passes": None, "recipeRef": {"kind": "ClusterCompressionRecipe", "name": "w4.v2"}},
    "a target": {
        "passes": None,
        "target": {
            "gpu": "RTX-4090",
            "context": 32768,
            "concurrency": 4,
            "maxPerplexityIncrease": "1.5%",
            "prefer": "latency",
            "pricePerHour": 0.44,
        },
        "evaluation": {"dataset": {"uri": "s3://data/b"}, "gates": [{"metric": "kl", "maxKL": 0.1}]},
    },
    "a target at the edge": {
        "passes": None,
        "output": {"uri": "s3://models/out", "format": "gguf"},
        "target": {"memory": "4Gi", "bandwidth": "50G", "engine": "llama.cpp", "context": 8192},
        "evaluation": {"dataset": {"uri": "s3://data/b"}, "runtime": {"engine": "llama.cpp"}},
    },
    "a device with a name": {
        "passes": None,
        "output": {"uri": "s3://models/out", "format": "gguf"},
        "target": {"device": "Raspberry-Pi-5-8GB", "context": 4096},
        "evaluation": {"dataset": {"uri": "s3://data/b"}},
    },
    "measured as it is served": {
        "evaluation": {
            "dataset": {"uri": "s3://data/b"},
            "runtime": {
                "engine": "vllm",
                "prompt": 512,
                "generate": 128,
                "batch": [1, 4],
                "rounds": 3,
                "pricePerHour": 2,
                "timeoutSeconds": 60,
            },
            "gates": [{"metric": "latency", "maxLatency": "1.5s"}, {"metric": "memory", "maxMemory": "12Gi"}],
        },
    },
    "a target without a name": {
        "passes": None,
        "target": {"hardware": {"memory": "24Gi", "computeCapability": "8.9", "bandwidth": "1008G"}, "context": 1, "pricePerHour": 1},
        "calibration": {"dataset": {"uri": "s3://data/a"}},
        "evaluation": {"dataset": {"uri": "s3://data/b"}},
        "drift": {"dataset": {"uri": "s3://data/c"}},
    },
    "all of a life": {"preflight": "Skip", "queueName": "gpu", "activeDeadlineSeconds": 3600, "deletionPolicy": "Delete"},
    "one pod, one process": {"worker": {"parallelism": 1, "processesPerPod": 1}},
    "a pod of one's own": {"worker": {"podTemplate": {"metadata": {"labels": {"a": "b"}}, "spec": {"priorityClassName": "low"}}}},
    "life": {"suspend": True, "retry": {"limit": 0}, "ttlSecondsAfterFinished": 0},
}

# wrong values: refused by the schema, with the policies or without; the text is part of the API server's answer
WRONG_VALUES: dict[str, tuple[Spec, str]] = {
    "no model": ({"model": None}, "spec.model: Required value"),
    "no source": ({"model": {}}, "spec.model.source: Required value"),
    "no output": ({"output": None}, "spec.output: Required value"),
    "no passes": ({"passes": None}, "give either passes, recipeRef or target, exactly one of them"),
    "passes and a recipe": ({"recipeRef": {"name": "w4"}}, "give either passes, recipeRef or target, exactly one of them"),
    "a recipe without a name": ({"passes": None, "recipeRef": {}}, "spec.recipeRef.name: Required value"),
    "a recipe of another kind": ({"passes": None, "recipeRef": {"kind": "Recipe", "name": "w4"}}, "spec.recipeRef.kind"),
    "a preflight of another kind": ({"preflight": "Pod"}, "spec.preflight"),
    "a queue with capitals": ({"queueName": "GPU"}, "spec.queueName"),
    "no time at all": ({"activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds"),
    "forgetting the output": ({"deletionPolicy": "Orphan"}, "spec.deletionPolicy"),
    "a pod in words": ({"worker": {"podTemplate": "default"}}, "spec.worker.podTemplate"),
    "empty passes": ({"passes": []}, "spec.passes"),
    "an empty pass": ({"passes": [{}]}, "spec.passes[0]"),
    "two in one": ({"passes": [{"rtn": {"scheme": "W8A8"}, "gptq": {}}]}, "spec.passes[0]"),
    "a pass of nothing": ({"passes": [{"rtn": None}]}, "spec.passes[0]"),
    "a pass of text": ({"passes": [{"rtn": "W8A8"}]}, "spec.passes[0].rtn"),
    "too many passes": ({"passes": [{"rtn": {"scheme": "W8A8"}}] * 17}, "at most 16"),
    "unknown scheme": ({"passes": [{"rtn": {"scheme": "W5A16"}}]}, "supported values: "),
    "no scheme": ({"passes": [{"rtn": {}}]}, "spec.passes[0].rtn.scheme: Required value"),
    "group size in words": ({"passes": [{"rtn": {"scheme": "W4A16", "groupSize": "all"}}]}, "groupSize"),
    "a group size that is true": ({"passes": [{"rtn": {"scheme": "W4A16", "groupSize": True}}]}, "groupSize"),
    "a sparsity that is true": ({"passes": [{"magnitude": {"sparsity": True}}]}, "sparsity"),
    "unknown store": ({"output": {"uri": "gs://models/out"}}, "spec.output.uri"),
    "no bucket": ({"output": {"uri": "s3:///out"}}, "spec.output.uri"),
    "spaces": ({"output": {"uri": "s3://models/my model"}}, "spec.output.uri"),
    "very long": ({"output": {"uri": "s3://models/" + "x" * 1024}}, "spec.output.uri"),
    "output on a hub": ({"output": {"uri": "hf://org/name"}}, "a hub is read-only here; use s3:// or pvc://"),
    "onto itself": ({"output": {"uri": "s3://models/llama"}}, "is the source itself; choose another prefix"),
    "onto itself, with a slash": ({"output": {"uri": "s3://models/llama/"}}, "is the source itself"),
    "into itself": ({"output": {"uri": "s3://models/llama/w4"}}, "lies inside the source"),
    "around itself": ({"output": {"uri": "s3://models"}}, "lies inside the output"),
    "onto itself, spelt oddly": ({"output": {"uri": "s3://models//./llama//"}}, "is the source itself"),
    "onto itself, by the server's other spelling": (
        {
            "model": {"source": {"uri": "s3://models/llama", "endpoint": "https://S3.example.org/"}},
            "output": {"uri": "s3://models/llama", "endpoint": "https://s3.example.org"},
        },
        "is the source itself",
    ),
    "onto itself, by a detour": ({"output": {"uri": "s3://models/x/../llama"}}, "gives one place two names"),
    "out of a volume": ({"output": {"uri": "pvc://models/.."}}, "gives one place two names"),
    "from a detour": ({"model": {"source": {"uri": "pvc://models/a/../b"}}}, "gives one place two names"),
    "unknown format": ({"output": {"uri": "s3://models/out", "format": "onnx"}}, "compressed-tensors"),
    "endpoint without scheme": ({"output": {"uri": "s3://models/out", "endpoint": "s3:9000"}}, "spec.output.endpoint"),
    "a bundle without a map": ({"output": {"uri": "s3://models/out", "caBundle": {"key": "a"}}}, "caBundle.configMap"),
    "a secret with capitals": ({"output": {"uri": "s3://models/out", "credentialsSecret": "Keys"}}, "credentialsSecret"),
    "yes for true": ({"suspend": "true"}, "spec.suspend"),
    "text for a number": ({"retry": {"limit": "4"}}, "spec.retry.limit"),
    "below zero": ({"retry": {"limit": -1}}, "spec.retry.limit"),
    "above all": ({"retry": {"limit": 101}}, "spec.retry.limit"),
    "a long wait": ({"ttlSecondsAfterFinished": 31536001}, "spec.ttlSecondsAfterFinished"),
    "no image": ({"worker": {"image": ""}}, "spec.worker.image"),
    "an amount of nothing": ({"worker": {"resources": {"limits": {"memory": "much"}}}}, "memory"),
    "an unknown effect": ({"worker": {"tolerations": [{"effect": "Sometimes"}]}}, "effect"),
    "no pods": ({"worker": {"parallelism": 0}}, "spec.worker.parallelism"),
    "pods without end": ({"worker": {"parallelism": 257}}, "spec.worker.parallelism"),
    "no processes": ({"worker": {"processesPerPod": 0}}, "spec.worker.processesPerPod"),
    "selector of numbers": ({"worker": {"nodeSelector": {"zone": 1}}}, "nodeSelector"),
}

DATA = {"uri": "s3://data/a.jsonl"}


def gated(**gate: Any) -> Spec:
    return {"evaluation": {"dataset": DATA, "gates": [gate]}}


WRONG_VALUES |= {
    "no dataset": ({"calibration": {"samples": 4}}, "spec.calibration.dataset: Required value"),
    "a dataset nowhere": ({"calibration": {"dataset": {}}}, "spec.calibration.dataset.uri: Required value"),
    "two columns": (
        {"calibration": {"dataset": {**DATA, "field": "a", "tokens": "b"}}},
        "field, messages and tokens exclude each other; keep the one to be read",
    ),
    "a column of plain text": ({"drift": {"dataset": {**DATA, "format": "text", "messages": "b"}}}, "plain text has no columns"),
    "a column without a name": ({"calibration": {"dataset": {**DATA, "field": ""}}}, "spec.calibration.dataset.field"),
    "data of an unknown format": ({"calibration": {"dataset": {**DATA, "format": "csv"}}}, "spec.calibration.dataset.format"),
    "data with a detour": ({"calibration": {"dataset": {"uri": "s3://data/../a"}}}, "write the place that it leads to"),
    "no samples": ({"calibration": {"dataset": DATA, "samples": 0}}, "spec.calibration.samples"),
    "rows of one token": ({"calibration": {"dataset": DATA, "sequenceLength": 1}}, "spec.calibration.sequenceLength"),
    "a seed below zero": ({"calibration": {"dataset": DATA, "seed": -1}}, "spec.calibration.seed"),
    "packing in words": ({"calibration": {"dataset": DATA, "packing": "yes"}}, "spec.calibration.packing"),
    "drift from nothing": ({"drift": {"dataset": DATA}}, "is measured from calibration, which is missing"),
    "drift beyond all": ({"calibration": {"dataset": DATA}, "drift": {"dataset": DATA, "threshold": 1.5}}, "spec.drift.threshold"),
    "a gate on nothing": (gated(maxKL=0.1), "spec.evaluation.gates[0].metric: Required value"),
    "a gate on accuracy": (gated(metric="accuracy", maxKL=0.1), "spec.evaluation.gates[0].metric"),
    "a gate without a limit": (gated(metric="kl"), "a gate on kl has maxKL and no other limit"),
    "a gate with the other's limit": (gated(metric="perplexity", maxKL=0.1), "a gate on perplexity has maxIncrease and no other limit"),
    "a gate with both limits": (gated(metric="kl", maxKL=0.1, maxIncrease="3%"), "a gate on kl has maxKL and no other limit"),
    "an increase without percent": (gated(metric="perplexity", maxIncrease="3"), "spec.evaluation.gates[0].maxIncrease"),
    "an increase of a number": (gated(metric="perplexity", maxIncrease=3), "spec.evaluation.gates[0].maxIncrease"),
    "a limit in words": (gated(metric="kl", maxKL="0.1"), "spec.evaluation.gates[0].maxKL"),
    "a limit of nothing": (gated(metric="kl", maxKL=0), "spec.evaluation.gates[0].maxKL"),
    "two gates of a metric": (
        {"evaluation": {"dataset": DATA, "gates": [{"metric": "kl", "maxKL": 1}, {"metric": "kl", "maxKL": 2}]}},
        "a metric has one gate; keep the stricter one",
    ),
}


def timed(gates: list[Spec] | None = None, **runtime: Any) -> Spec:
    return {"evaluation": {"dataset": DATA, "runtime": {"engine": "vllm"} | runtime, "gates": gates or []}}


WRONG_VALUES |= {
    "an engine of another name": (timed(engine="torch"), "spec.evaluation.runtime.engine"),
    "a runtime without an engine": ({"evaluation": {"dataset": DATA, "runtime": {}}}, "spec.evaluation.runtime.engine: Required value"),
    "one token, which has no rate": (timed(generate=1), "spec.evaluation.runtime.generate"),
    "a batch of none": (timed(batch=[0]), "spec.evaluation.runtime.batch[0]"),
    "no batch": (timed(batch=[]), "spec.evaluation.runtime.batch"),
    "a batch twice": (timed(batch=[1, 4, 1]), "names a batch size twice; name each once"),
    "a free hour": (timed(pricePerHour=0), "spec.evaluation.runtime.pricePerHour"),
    "a gate on latency that nothing measures": (gated(metric="latency", maxLatency="2s"), "a gate on latency needs evaluation.runtime"),
    "a gate on memory that nothing measures": (gated(metric="memory", maxMemory="2Gi"), "a gate on memory needs evaluation.runtime"),
    "a latency without a unit": (timed([{"metric": "latency", "maxLatency": "2"}]), "spec.evaluation.gates[0].maxLatency"),
    "a latency of memory": (
        timed([{"metric": "latency", "maxMemory": "2Gi"}]),
        "a gate on latency has maxLatency and no other limit",
    ),
}


def aimed(beside: Spec | None = None, **target: Any) -> Spec:
    whole = {"gpu": "RTX-4090", "context": 4096} | target
    return {"passes": None, "target": {k: v for k, v in whole.items() if v is not None}, "evaluation": {"dataset": DATA}} | (beside or {})


GGUF = {"uri": "s3://models/out", "format": "gguf"}


def edge(beside: Spec | None = None, **target: Any) -> Spec:
    return aimed({"output": GGUF} | (beside or {}), gpu=None, **target)


HARDWARE = {"memory": "24Gi", "computeCapability": "8.9", "bandwidth": "1008G"}
WRONG_VALUES |= {
    "passes and a target": (
        {"target": {"gpu": "T4", "context": 9}, "evaluation": {"dataset": DATA}},
        "give either passes, recipeRef or target, exactly one of them",
    ),
    "a recipe and a target": (aimed({"recipeRef": {"name": "w4"}}), "give either passes, recipeRef or target, exactly one of them"),
    "a target that is not measured": (aimed({"evaluation": None}), "is measured on evaluation, which is missing"),
    "a target with the same gate": (
        aimed({"evaluation": {"dataset": DATA, "gates": [{"metric": "perplexity", "maxIncrease": "3%"}]}}),
        "say it once, in the target",
    ),
    "a target without a GPU": (aimed(gpu=None), "give either gpu or device (a name), hardware (a GPU's) or"),
    "a target with two": (aimed(hardware=HARDWARE), "give either gpu or device (a name), hardware (a GPU's) or"),
    "a device of unknown speed": (edge(memory="4Gi"), "memory and bandwidth describe a device together; give both"),
    "a device for vLLM": (
        edge(device="Phone-8GB", engine="vllm"),
        "engine vllm serves on GPUs; give gpu or hardware, or engine: llama.cpp",
    ),
    "a device, and no GGUF": (
        edge({"output": {"uri": "s3://models/out"}}, device="Phone-8GB"),
        "serves output.format gguf, vllm compressed-tensors",
    ),
    "a GPU, and GGUF": (aimed({"output": GGUF}), "serves output.format gguf, vllm compressed-tensors"),
    "a target of no length": (aimed(context=None), "spec.target.context: Required value"),
    "a target for nobody": (aimed(concurrency=0), "spec.target.concurrency"),
    "a target that prefers both": (aimed(prefer="both"), "spec.target.prefer"),
    "a free target": (aimed(pricePerHour=0), "spec.target.pricePerHour"),
    "a target without percent": (aimed(maxPerplexityIncrease="3"), "spec.target.maxPerplexityIncrease"),
    "memory in words": (aimed(gpu=None, hardware=HARDWARE | {"memory": "much"}), "spec.target.hardware.memory"),
    "a capability in words": (aimed(gpu=None, hardware=HARDWARE | {"computeCapability": "sm_89"}), "computeCapability"),
    "hardware without bandwidth": (aimed(gpu=None, hardware={"memory": "24Gi", "computeCapability": "8.9"}), "bandwidth: Required value"),
}

# misspelt names: refused by the policy for every client, kept (never dropped) where there is none
MISSPELT: dict[str, tuple[Spec, str, str]] = {
    "in the spec": ({"supend": True}, "supend", "spec: no such name: supend; known are model,"),
    "in the model": ({"model": {"source": {"uri": "s3://a/b"}, "revision": "x"}}, "revision", "spec.model: no such name"),
    "in the source": ({"model": {"source": {"uri": "s3://a/b", "path_style": True}}}, "path_style", "pathStyle"),
    "in a target": (aimed(gpus=2), "gpus", "spec.target: no such name: gpus; known are gpu, device, memory, bandwidth, engine"),
    "in hardware": (aimed(gpu=None, hardware=HARDWARE | {"cores": 9}), "cores", "spec.target.hardware: no such name: cores"),
    "in a runtime": (
        timed(batches=[4]),
        "batches",
        "spec.evaluation.runtime: no such name: batches; known are engine, prompt, generate, batch",
    ),
    "in a bundle": (
        {"model": {"source": {"uri": "s3://a/b", "caBundle": {"configMap": "a", "Key": "b"}}}},
        "Key",
        "spec.model.source.caBundle: no such name: Key; known are configMap, key",
    ),
    "in the output": ({"output": {"uri": "s3://a/c", "secret": "x"}}, "secret", "credentialsSecret"),
    "of a pass": ({"passes": [{"rtm": {"scheme": "W8A8"}}]}, "rtm", "spec.passes[]: no such name: rtm; known are "),
    "in a pass": (
        {"passes": [{"rtn": {"scheme": "W8A8"}}, {"rtn": {"scheme": "W4A16", "groupsize": 64}}]},
        "groupsize",
        "spec.passes[].rtn: no such name: groupsize; known are inputObserver, inputPercentile, targets, ignore, groupSize, scheme",
    ),
    "in calibration": (
        {"calibration": {"dataset": {"uri": "s3://a/d"}, "sequencelength": 9}},
        "sequencelength",
        "spec.calibration: no such name: sequencelength; known are dataset, samples, sequenceLength, packing, seed",
    ),
    "in a dataset": ({"evaluation": {"dataset": {"uri": "s3://a/d", "column": "x"}}}, "column", "field, messages, tokens"),
    "in a gate": (
        {"evaluation": {"dataset": {"uri": "s3://a/d"}, "gates": [{"metric": "kl", "maxKL": 1, "maxKl": 1}]}},
        "maxKl",
        "spec.evaluation.gates[]: no such name: maxKl; known are metric, maxIncrease, maxKL",
    ),
    "in drift": (
        {"calibration": {"dataset": {"uri": "s3://a/d"}}, "drift": {"dataset": {"uri": "s3://a/e"}, "treshold": 1}},
        "treshold",
        "spec.drift: no such name: treshold",
    ),
    "in the worker": ({"worker": {"imagee": "x"}}, "imagee", "spec.worker: no such name: imagee"),
    "in resources": ({"worker": {"resources": {"limit": {"cpu": 1}}}}, "limit", "known are requests, limits, claims"),
    "in a claim": ({"worker": {"resources": {"claims": [{"name": "a", "req": "b"}]}}}, "req", "known are name, request"),
    "in a toleration": ({"worker": {"tolerations": [{"key": "a"}, {"keys": "b"}]}}, "keys", "spec.worker.tolerations[]"),
    "in a recipe's name": (
        {"passes": None, "recipeRef": {"name": "a", "nane": "b"}},
        "nane",
        "known are kind, name",
    ),
    "in retry": ({"retry": {"limits": 3}}, "limits", "spec.retry: no such name: limits; known are limit"),
}
