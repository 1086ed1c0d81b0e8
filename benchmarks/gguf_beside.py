"""GGUF files of ours beside those of llama.cpp's own quantiser: what is left of the model, size and time. Prints tables.

    python benchmarks/gguf_beside.py                         # trained models of the tests, with and without an importance matrix
    python benchmarks/gguf_beside.py --models llama --mixes Q4_0 Q3_K_S --only quality

Both begin with the same model: llama.cpp with the BF16 file that a job of ours makes, we with the checkpoint. The importance matrix that
llama.cpp gets is measured by transformers on the rows that calibrate our job, so both know the same of the data. All files are read by
llama.cpp then, on held-out rows: mean KL to the BF16 file over all tokens and the whole vocabulary, as a ratio with its 95 % interval by
paired bootstrap over rows. Time, by as many threads, is that of random blocks of Llama's shape from file to file, without calibration;
memory is the peak of our worker beyond what it has at idle, at two depths, of which the smaller is more than what is read ahead, without
calibration and with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/worker"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import checkpoint  # noqa: E402
from corpus import Corpus  # noqa: E402
from figures import table  # noqa: E402
from gguf_files import Request, llama_cpp  # noqa: E402
from models import save_tokenizer, token_rows, train_tokenizer, trained_model  # noqa: E402
from peer import Bench, ratio, write_rows  # noqa: E402

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q3_K_S", "Q2_K")
GPTQ = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q3_K_S", "Q2_K")
MODELS = ("llama", "llama_learned", "qwen3", "qwen3_moe")
CALIBRATED, JUDGED, LENGTH = 128, 48, 128
"""Rows, and tokens of each."""
ROUNDS = 6
BLOCKS, HIDDEN, FFN, VOCABULARY = 4, 2048, 5632, 8192
DEPTHS = (24, 96)


def ours(bench: Bench, pass_name: str, mix: str, calibrated: bool) -> tuple[Path, float]:
    """A job's file, and the seconds of the job."""
    name = f"{pass_name}-{mix}{'-data' if calibrated else ''}"
    said = bench.ours([{pass_name: {"scheme": mix}}], name, output={"format": "gguf", "name": "model.gguf"}, calibrated=calibrated)
    return bench.work / name / "model.gguf", said["seconds"]


def theirs(source: Path, out: Path, mix: str, importance: Path | None = None) -> float:
    """Seconds of llama.cpp's quantiser, in a process of its own."""
    words = [sys.executable, str(ROOT / "tests/llama_quantize.py"), str(source), str(out), mix]
    words += ["--threads", str(torch.get_num_threads())] + (["--importance", str(importance)] if importance else [])
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp, {mix}:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def importance_matrix(source: Path, rows: Path, out: Path) -> Path:
    """Mean squares of every linear's input, by GGUF name, as llama.cpp's own tool collects them; of an expert, over its routed tokens."""
    import numpy
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    hooks = [hook for layer, block in enumerate(model.model.layers) for hook in hooks_of(layer, block, sums)]
    with torch.inference_mode():
        for line in rows.read_text().splitlines():
            model(input_ids=torch.tensor([json.loads(line)["ids"]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    numpy.savez(out, **{name: value.float().numpy() for name, value in sums.items()})
    return out


def hooks_of(layer: int, block: Any, sums: dict[str, torch.Tensor]) -> Iterator[Any]:
    def add(names: Sequence[str], x: torch.Tensor) -> None:
        for name in names:
            key = f"blk.{layer}.{name}.weight"
            sums[key] = sums.get(key, 0) + x.reshape(-1, x.shape[-1]).double().square().sum(0)

    def before(module: Any, names: Sequence[str]) -> Any:
        return module.register_forward_pre_hook(lambda _, inputs: add(names, inputs[0]))

    yield before(block.self_attn.q_proj, ("attn_q", "attn_k", "attn_v"))
    yield before(block.self_attn.o_proj, ("attn_output",))
    if hasattr(block.mlp, "gate_proj"):
        yield before(block.mlp.gate_proj, ("ffn_gate", "ffn_up"))
        yield before(block.mlp.down_proj, ("ffn_down",))
        return
    experts = block.mlp.experts

    def routed(_: Any, inputs: tuple[Any, ...]) -> None:
        """The stack's own forward: hidden states, chosen experts, their weights."""
        hidden, chosen = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
        count = experts.gate_up_proj.shape[0]
        into = torch.zeros(count, hidden.shape[-1], dtype=torch.float64)
        between = torch.zeros(count, experts.down_proj.shape[-1], dtype=torch.float64)
        for expert in range(count):
            x = hidden[(chosen == expert).any(-1)]
            gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
            into[expert] += x.double().square().sum(0)
            between[expert] += (experts.act_fn(gate) * up).double().square().sum(0)
        for name, value in (("ffn_gate_exps", into), ("ffn_up_exps", into), ("ffn_down_exps", between)):
            key = f"blk.{layer}.{name}.weight"
            sums[key] = sums.get(key, 0) + value

    yield experts.register_forward_pre_hook(routed)


def divergences(original: Path, files: Mapping[str, Path], tokens: torch.Tensor, work: Path) -> dict[str, torch.Tensor]:
    """Mean KL of each row (fp64 [rows]) by file, as llama.cpp computes the logits."""

    def logits(file: Path) -> list[torch.Tensor]:
        said = llama_cpp([Request(file, row) for row in tokens.tolist()], work)
        return [torch.from_numpy(found).double().log_softmax(-1) for found, _ in said]

    base = logits(original)
    return {
        name: torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(base, logits(file), strict=True)])
        for name, file in files.items()
    }


def quality(model: str, mixes: Sequence[str], work: Path) -> list[list[object]]:
    """Rows of the table: KL of llama.cpp's file, ratios to it of ours, with and without data, and of the sizes."""
    source = trained_model(model)
    rows = write_rows(work / "rows.jsonl", token_rows(source, 0, seed=41, rows=CALIBRATED, length=LENGTH))
    bench, tokens = Bench(work, source, rows, CALIBRATED, LENGTH), token_rows(source, 0, seed=1_000_003, rows=JUDGED, length=LENGTH)
    original, _ = ours(bench, "rtn", "BF16", False)
    matrix = importance_matrix(bench.source, bench.rows, work / "importance.npz")
    lines: list[list[object]] = []
    for mix in mixes:
        files = {"rtn": ours(bench, "rtn", mix, False)[0], "rtn data": ours(bench, "rtn", mix, True)[0]}
        if mix in GPTQ:
            files["gptq"] = ours(bench, "gptq", mix, True)[0]
        for name, known in (("theirs", None), ("theirs data", matrix)):
            files[name] = work / f"{name}-{mix}.gguf"
            theirs(original, files[name], mix, known)
        kl = divergences(original, files, tokens, work)

        def beside(name: str, peer: str, kl: Mapping[str, Any] = kl) -> str:
            return "{:.3f} ({:.3f} to {:.3f})".format(*ratio(kl, name, peer)) if name in kl else ""

        size = files["rtn"].stat().st_size / files["theirs"].stat().st_size
        means = [float(kl[name].mean()) for name in ("theirs", "theirs data")]
        found = [beside("rtn", "theirs"), beside("rtn data", "theirs data"), beside("gptq", "theirs data")]
        lines.append([model, mix, f"{means[0]:.5f} / {means[1]:.5f}", *found, f"{size:.4f}"])
        print(json.dumps({"model": model, "mix": mix, "kl": {name: float(x.mean()) for name, x in kl.items()}, "size": size}), flush=True)
    return lines


def blocks(folder: Path, count: int, hidden: int, ffn: int) -> Path:
    """A checkpoint of random blocks, with a tokenizer, which a GGUF file has inside."""
    made = checkpoint.make(folder, count, hidden, ffn, VOCABULARY)
    save_tokenizer(train_tokenizer(Corpus(0), 512), made)
    return made


def times(mixes: Sequence[str], work: Path) -> list[list[object]]:
    """Medians of rounds by turns: seconds of llama.cpp, and ours as a share of it."""
    source = blocks(work / "blocks", BLOCKS, HIDDEN, FFN)
    bench = Bench(work, source, work / "none.jsonl", 0, 0)
    original, _ = ours(bench, "rtn", "BF16", False)
    rows: list[list[object]] = []
    for mix in mixes:
        pairs = []
        for turn in range(ROUNDS):  # who comes second finds memory that the first has touched
            peer = theirs(original, work / "theirs.gguf", mix) if turn % 2 else 0.0
            mine = ours(bench, "rtn", mix, False)[1]
            pairs.append((mine, peer or theirs(original, work / "theirs.gguf", mix)))
        rows.append([mix, median(peer for _, peer in pairs), median(mine / peer for mine, peer in pairs)])
        print(json.dumps({"mix": mix, "seconds": pairs}), flush=True)
    return rows


def depths(work: Path) -> list[list[object]]:
    """Peaks of our worker in MB, of few blocks and of many."""
    rows: list[list[object]] = []
    for pass_name, mix, calibrated in (("rtn", "Q4_K_M", False), ("gptq", "Q4_K_M", True)):
        peaks = []
        for depth in DEPTHS:
            source = blocks(work / f"{depth}", depth, HIDDEN // 4, FFN // 4)
            tokens = torch.randint(3, VOCABULARY, (CALIBRATED, LENGTH), generator=torch.Generator().manual_seed(0))
            bench = Bench(work, source, write_rows(work / "random.jsonl", tokens), CALIBRATED, LENGTH)
            said = bench.ours([{pass_name: {"scheme": mix}}], "deep", output={"format": "gguf", "name": "m.gguf"}, calibrated=calibrated)
            peaks.append(said["peak"] / 1e6)
        print(json.dumps({"pass": pass_name, "mix": mix, "blocks": DEPTHS, "peaks": peaks}), flush=True)
        rows.append([pass_name, mix, *(f"{peak:.0f}" for peak in peaks), f"{peaks[-1] / peaks[0]:.3f}"])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--mixes", nargs="+", default=MIXES)
    parser.add_argument("--only", choices=("quality", "time", "memory"))
    options = parser.parse_args()
    if options.only in (None, "quality"):
        heads = ["model", "mix", "KL of llama.cpp, without / with data", "rtn", "rtn with data", "gptq, beside theirs with data", "size"]
        found = []
        for model in options.models:
            with tempfile.TemporaryDirectory(prefix="kompressor-gguf-") as folder:
                found += quality(model, options.mixes, Path(folder))
        print(table(heads, found))
    if options.only in (None, "time"):
        with tempfile.TemporaryDirectory(prefix="kompressor-gguf-") as folder:
            print(table(["mix", "llama.cpp, s", "ours / llama.cpp"], times(options.mixes, Path(folder))))
    if options.only in (None, "memory"):
        with tempfile.TemporaryDirectory(prefix="kompressor-gguf-") as folder:
            print(table(["by", "mix", *(f"{n} blocks, MB" for n in DEPTHS), "ratio"], depths(Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
