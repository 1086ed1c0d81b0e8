"""Small models that are trained in seconds and kept in a cache: what the tests, the demo and the benchmarks compress.

`trained_model("llama")` is a real checkpoint: bf16 safetensors written by `save_pretrained`, a byte-level BPE tokenizer,
a generation config. `held_out_tokens` and `perplexity` measure it, through transformers. `python tests/models.py llama
OUT` writes a copy.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from corpus import Corpus
from recipes import RECIPES, SHAPE, Recipe

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning beside others costs 5 times

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

__all__ = ["RECIPES", "SHAPE", "Recipe", "cached", "held_out_tokens", "perplexity", "trained_model"]


def trained_model(kind: str) -> Path:
    """Folder of the trained checkpoint of RECIPES[kind], in the cache; trained now if need be. Not to be written to."""
    recipe = RECIPES[kind]
    return cached("models", f"{kind}-{recipe.digest}", lambda folder: train(recipe, folder))


def held_out_tokens(kind: str, rows: int = 64, length: int = 128) -> torch.Tensor:
    """Token ids [rows, length] (int64) of text that the model was not trained on; every row begins with BOS."""
    return token_rows(trained_model(kind), RECIPES[kind].language, seed=1_000_003, rows=rows, length=length)


def perplexity(model: PreTrainedModel, tokens: torch.Tensor, batch: int = 16) -> float:
    """exp of the mean negative log-likelihood of tokens[:, 1:] under `model`, logits in fp32."""
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    total = 0.0
    with torch.inference_mode():
        for rows in tokens.split(batch):
            logits = model(input_ids=rows.to(model.device), use_cache=False).logits.float()
            targets = rows[:, 1:].to(model.device)
            total += cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum").item()
    return math.exp(total / tokens[:, 1:].numel())


def cached(group: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `group/name` of the cache, filled by `make` once; safe with several processes at a time."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kompressor"
    base = Path(os.environ.get("KOMPRESSOR_CACHE") or home) / group
    target = base / name
    if target.exists():
        return target
    base.mkdir(parents=True, exist_ok=True)
    with locked(base / f".{name}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=base, prefix=f".{name}.") as work:
                made = Path(work) / "made"
                made.mkdir()
                make(made)
                made.rename(target)
    return target


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train(recipe: Recipe, folder: Path) -> None:
    """Trains from scratch in fp32 on the CPU and writes the checkpoint in bf16."""
    import torch
    import transformers

    corpus = Corpus(recipe.language)
    tokenizer = train_tokenizer(corpus, recipe.vocabulary)
    save_tokenizer(tokenizer, folder)
    config = getattr(transformers, recipe.config)(
        vocab_size=recipe.vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0, **recipe.shape
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
        tokens = token_rows(folder, recipe.language, seed=0, rows=recipe.steps * recipe.batch, length=recipe.length)
        fit(model, tokens, recipe)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=48
    )
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(folder)


def fit(model: PreTrainedModel, tokens: torch.Tensor, recipe: Recipe) -> None:
    """One pass over `tokens` [steps * batch, length]: AdamW, linear warm-up, cosine down to nothing."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    warmup = max(1, recipe.steps // 10)

    def rate(step: int) -> float:
        done = (step - warmup) / max(1, recipe.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    model.train()
    for rows in tokens.split(recipe.batch):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)


def train_tokenizer(corpus: Corpus, vocabulary: int) -> Tokenizer:
    """Byte-level BPE; ids 0, 1, 2 are <pad>, <s>, </s>. Encoding puts <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.sample.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
    fast.save_pretrained(folder)


def token_rows(folder: Path, language: int, seed: int, rows: int, length: int) -> torch.Tensor:
    """[rows, length] ids: BOS, then running text, stories ended by EOS and cut where the row ends."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = rows * (length - 1)
    stories = Corpus(language).text(seed, characters=wanted * 5).splitlines()
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(stories, add_special_tokens=False):
        ids += [*encoding.ids, 2]
    assert len(ids) >= wanted, f"{len(ids)} tokens of text for {wanted}: raise the characters a token"
    text = torch.tensor(ids[:wanted]).view(rows, length - 1)
    return torch.cat([torch.ones(rows, 1, dtype=torch.int64), text], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(RECIPES))
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    begin = time.monotonic()
    source = trained_model(arguments.kind)
    shutil.copytree(source, arguments.out, dirs_exist_ok=True)
    print(f"{arguments.kind}: {arguments.out} ({time.monotonic() - begin:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()
