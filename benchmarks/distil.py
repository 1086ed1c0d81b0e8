"""A student trained by ours and by TRL's GKDTrainer: same models, same rows in the same order, same steps of the same optimizer.

    python benchmarks/distil.py                                     # 16 steps of 4 rows of 512 tokens, three rounds
    python benchmarks/distil.py --steps 6 --rounds 1

The teacher is the suite's trained Llama (hidden 384, 6 layers) under a vocabulary of 32,768, the student the same with half of its
neurons pruned by a real job. Both sides learn by forward KL over the whole vocabulary (GKD: lmbda 0, beta 0), fp32 masters, AdamW at a
constant rate; products in bf16 where this machine is fast at it (TRL: autocast, teacher in bf16), else in fp32. Each training is a process
of its own, ours and TRL's in turn; TRL's from an environment of its own (locks/trl.in). Measured are the steps behind the first, in the
clock's seconds and the CPU's, the process's peak memory beyond its imports, and what was learned: the mean KL to the teacher on rows
neither side has seen, by transformers in fp32, of the weights rounded to bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from data_free import measure, memory  # noqa: E402
from jobs import manifest  # noqa: E402
from peer import beside_others, small_model, write_rows  # noqa: E402

PEER = """
import json, sys, time
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
import transformers.models.llama.modeling_llama
given = json.loads(sys.argv[1])
def status(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))
idle = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
class InOrder(GKDTrainer):
    def _get_train_sampler(self, *arguments):
        return SequentialSampler(self.train_dataset)
class Times(TrainerCallback):
    seen = []
    def on_step_end(self, *arguments, **more):
        self.seen.append([time.monotonic(), time.process_time()])
def collate(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
dtype = getattr(torch, given["dtype"])
student = AutoModelForCausalLM.from_pretrained(given["student"], dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(given["teacher"], dtype=dtype)
rows = [json.loads(line)["ids"] for line in open(given["rows"])]
config = GKDConfig(
    output_dir=given["out"], max_steps=given["steps"], per_device_train_batch_size=given["batch"], learning_rate=given["rate"],
    lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0,
    optim="adamw_torch_fused", use_cpu=True, bf16=dtype is torch.bfloat16, gradient_checkpointing=False, lmbda=0.0, beta=0.0,
    temperature=1.0, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
)
trainer = InOrder(model=student, teacher_model=teacher, args=config, train_dataset=Dataset.from_dict({"input_ids": rows}),
                  data_collator=collate, processing_class=AutoTokenizer.from_pretrained(given["teacher"]), callbacks=[Times()])
trainer.train()
losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
peak = status("VmHWM") - idle
student.to(torch.bfloat16).save_pretrained(given["out"])
print(json.dumps({"times": Times.seen, "peak": peak, "losses": losses}))
"""


@dataclass(frozen=True)
class Shape:
    vocabulary: int = 32_768
    length: int = 512
    batch: int = 4
    steps: int = 16
    rate: float = 1e-4
    rounds: int = 3
    judged: int = 24
    """Rows to judge by."""


def teacher(shape: Shape) -> Path:
    """The small trained model with tokens of no text beyond its own, all trained on until those are as unlikely as they should be."""
    import torch
    import transformers

    from models import Recipe, cached, fit, token_rows

    source = small_model()

    def make(folder: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(shape.vocabulary, mean_resizing=True)
        recipe = Recipe("LlamaConfig", {}, steps=40, batch=2, length=512, learning_rate=1e-3)
        fit(model, token_rows(source, 0, seed=11, rows=recipe.steps * recipe.batch, length=recipe.length), recipe)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        model.to(torch.bfloat16).save_pretrained(folder)

    return cached("models", f"{source.name}-vocabulary-{shape.vocabulary}", make)


def student(source: Path, rows: Path, out: Path) -> Path:
    """Half of its neurons pruned, by a job."""
    from kompressor_worker.job import load_job
    from kompressor_worker.progress import Progress
    from kompressor_worker.run import run

    job = manifest(source.as_uri(), out.as_uri(), [{"pruneWidth": {"ratio": 0.5, "multiple": 64}}])
    job["spec"]["calibration"] = {"dataset": {"uri": rows.as_uri(), "tokens": "ids"}, "samples": 8, "sequenceLength": 512}
    file = out.with_suffix(".json")
    file.write_text(json.dumps(job))
    run(load_job(file, {}), {}, Progress(), threading.Event())
    return out


def child(given: dict[str, Any]) -> None:
    """One training of ours in this process, as the peer's is measured."""
    import torch

    import kompressor_worker.distil.train
    from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
    from kompressor_worker.distil.lesson import Group, Lesson, StoredModel, TrainingStep
    from kompressor_worker.kernels import build
    from kompressor_worker.passes.distil import DistilParams
    from kompressor_worker.shards import plan_output
    from kompressor_worker.storage.locations import open_output, open_source
    from kompressor_worker.stream import Work

    build.library()
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    times: list[tuple[float, float]] = []
    losses: list[float] = []

    def tell(step: TrainingStep) -> None:
        times.append((time.monotonic(), time.process_time()))
        losses.append(step.loss)

    def stored(folder: str) -> StoredModel:
        return StoredModel.read(open_source(SourceLocation(uri=Path(folder).as_uri()), {}))

    learner, output = stored(given["student"]), open_output(OutputSpec(uri=Path(given["out"]).as_uri()), {})
    rows = [torch.tensor(json.loads(line)["ids"]) for line in Path(given["rows"]).read_text().splitlines()]
    work = Work(learner.layout, [], {}, plan_output(learner.layout, {}))
    stop = threading.Event()
    params = DistilParams.model_validate(given["params"])
    lesson = Lesson(params, stored(given["teacher"]), learner, work, rows, None, output, output.inner("training"), Group(), stop, tell)
    kompressor_worker.distil.train.train(lesson)
    print(json.dumps({"times": times, "peak": memory("VmHWM") - idle, "losses": losses}))


def parameters(shape: Shape) -> dict[str, Any]:
    """For `distil`."""
    return {
        "sequenceLength": shape.length, "steps": shape.steps, "batch": shape.batch, "microBatch": shape.batch, "validationRows": 0,
        "learningRate": shape.rate, "schedule": "constant", "warmup": 0.0, "checkpointEvery": 3600, "evaluateEvery": shape.steps,
        "activationCheckpointing": False,
    }  # fmt: skip


@dataclass
class Bench:
    """Trainings of one student; results lie in `work`, by name."""

    work: Path
    shape: Shape
    teacher: Path
    student: Path
    rows: Path
    ordered: Path
    """The rows as ours takes them, step by step."""

    @classmethod
    def made(cls, work: Path, shape: Shape) -> Bench:
        import torch

        from kompressor_worker.distil.order import Order
        from kompressor_worker.passes.distil import DistilParams
        from models import token_rows

        source = teacher(shape)
        ids = token_rows(source, 0, seed=41, rows=shape.steps * shape.batch, length=shape.length)
        order = Order.of(DistilParams.model_validate(parameters(shape)), len(ids), False)
        taken = torch.cat([ids[order.rows(step)] for step in range(shape.steps)])
        rows = write_rows(work / "rows.jsonl", ids)
        learner = student(source, rows, work / "student")
        return cls(work, shape, source, learner, rows, write_rows(work / "ordered.jsonl", taken))

    def ours(self) -> dict[str, Any]:
        given = {**self._common("ours"), "rows": str(self.rows), "params": parameters(self.shape)}
        return self._rates(beside_others(lambda: measure([sys.executable, __file__, "--child", json.dumps(given)])))

    def peer(self, python: Path, dtype: str) -> dict[str, Any]:
        given = {**self._common("peer"), **asdict(self.shape), "rows": str(self.ordered), "dtype": dtype}
        environ = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONPATH": ""}
        return self._rates(beside_others(lambda: measure([str(python), "-c", PEER, json.dumps(given)], environ)))

    def _common(self, name: str) -> dict[str, str]:
        out = self.work / name
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(self.work / f".{name}.kompressor", ignore_errors=True)
        return {"teacher": str(self.teacher), "student": str(self.student), "out": str(out)}

    def _rates(self, found: dict[str, Any]) -> dict[str, Any]:
        """Tokens a second of the steps behind the first, by the clock and by the CPU."""
        (began, cpu), (ended, cpu_ended) = found["times"][0], found["times"][-1]
        tokens = (len(found["times"]) - 1) * self.shape.batch * (self.shape.length - 1)
        rates = {"tokensPerSecond": tokens / (ended - began), "tokensPerCpuSecond": tokens / (cpu_ended - cpu)}
        return {**rates, **{key: found[key] for key in ("peak", "losses", "others")}}

    def trained(self) -> Path:
        """Ours as a checkpoint."""
        from safetensors.torch import load_file, save_file

        found = [path for path in self.work.rglob("trained/*.safetensors") if path.stem.isdigit()]
        tensors = {name: tensor for path in found for name, tensor in load_file(path).items()}
        folder = self.work / "ours-model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.student, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    def divergence(self, folder: Path) -> float:
        """Mean KL to the teacher over rows that were not trained on, by transformers in fp32."""
        import torch
        import transformers

        from models import token_rows

        judged = token_rows(self.teacher, 0, seed=1_000_003, rows=self.shape.judged, length=self.shape.length)
        models = [transformers.AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).eval() for x in (self.teacher, folder)]
        total = 0.0
        with torch.inference_mode():
            for row in judged:
                p, q = (model(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1) for model in models)
                total += float((p.exp() * (p - q)).sum(-1).double().mean())
        return total / len(judged)


def compared(shape: Shape, python: Path | None) -> dict[str, Any]:
    import torch

    from kompressor_worker.kernels import fast_bf16

    dtype = "bfloat16" if fast_bf16(torch.device("cpu")) else "float32"
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        bench = Bench.made(Path(folder), shape)
        found: dict[str, Any] = {"shape": asdict(shape), "dtype": dtype, "ours": [], "peer": []}
        for _ in range(shape.rounds):
            found["ours"].append(bench.ours())
            print("ours", shown(found["ours"][-1]), flush=True)
            if python is not None:
                found["peer"].append(bench.peer(python, dtype))
                print("peer", shown(found["peer"][-1]), flush=True)
        found["kl"] = {"student": bench.divergence(bench.student), "ours": bench.divergence(bench.trained())}
        if python is not None:
            found["kl"]["peer"] = bench.divergence(bench.work / "peer")
    return found | {"ratios": ratios(found)} if python is not None else found


def shown(figures: dict[str, Any]) -> str:
    return (
        f"{figures['tokensPerSecond']:.0f} tokens/s, {figures['tokensPerCpuSecond']:.0f} a CPU second, "
        f"peak {figures['peak'] / 1e6:.0f} MB, last loss {figures['losses'][-1]:.4f}, others {figures['others']:.1f} cores"
    )


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Ours over the peer's: the median over rounds, each against its own round."""
    made = {
        name: statistics.median(ours[name] / peer[name] for ours, peer in zip(found["ours"], found["peer"], strict=True))
        for name in ("tokensPerSecond", "tokensPerCpuSecond", "peak")
    }
    return made | {"kl": found["kl"]["ours"] / found["kl"]["peer"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--alone", action="store_true", help="ours alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    from setup import other_python

    shape = replace(Shape(), **{name: getattr(options, name) for name in asdict(Shape())})
    found = compared(shape, None if options.alone else other_python("trl"))
    print(json.dumps({key: found[key] for key in ("kl", "ratios") if key in found}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
