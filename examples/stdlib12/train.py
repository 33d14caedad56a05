"""Train stdlib12, a 12-layer Flax language model, on the sources of Python's standard library.

    python train.py             # corpus, tokenizer, training, export; picks up where it stopped
    python train.py --export    # write model.ckpt from the newest snapshot, beside a running training too

Everything follows from SEED and the Python whose library is read.
Budget: 2400 steps of 2048 tokens, a little over an hour on two shared CPU cores. Figures: README.md.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import shutil
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
CKPT = HERE / "model.ckpt"
SEED = 12
END = "<|endoftext|>"
CONFIG = {"vocab": 4096, "width": 192, "layers": 12, "heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 512}
CONTEXT = 512
STORED = jnp.bfloat16  # half the size in the repository; the figures are measured after this rounding
# Tests would drown the library, code pages and topics are generated, build settings belong to the machine.
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
console = Console(width=120)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Warm up, hold, decay. Only the decay sees the full context: short windows train faster on a CPU.

    Until the decay nothing depends on `steps`, so a run can be lengthened or cut short and resumed.
    """

    steps: int = 2400
    decay: float = 0.25
    warmup: int = 150
    peak: float = 2e-3
    tokens: int = 2048
    short: int = 128

    @property
    def turn(self) -> int:
        return int(self.steps * (1 - self.decay))

    def window(self, step: int) -> int:
        return self.short if step < self.turn else CONTEXT

    def rate(self):
        rise = optax.linear_schedule(0.0, self.peak, self.warmup)
        fall = optax.cosine_decay_schedule(self.peak, self.steps - self.turn, alpha=0.02)
        return optax.join_schedules([rise, optax.constant_schedule(self.peak), fall], [self.warmup, self.turn])


# --- text -------------------------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """Relative name -> text of each library file, copies dropped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found, seen = {}, set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED & set(parts) or any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
        if text.strip() and text not in seen:
            seen.add(text)
            found["/".join(parts)] = text
    return found


def position(name: str) -> float:
    """A fixed place in [0, 1) for a file name: it decides the split and the order of the samples."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def split(files: dict[str, str], held: float = 0.05) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out, each in the order of the names' hashes."""
    names = sorted(files, key=position)
    return [files[n] for n in names if position(n) >= held], [files[n] for n in names if position(n) < held]


def sample(texts: list[str], size: int = 150_000, most: int = 16_000) -> str:
    """About `size` characters, at most `most` a file, cut at line ends, joined as the training stream is."""
    parts, room = [], size
    for text in texts:
        part = text if len(text) <= most else text[: text.rindex("\n", 0, most) + 1]
        if len(part) <= room:
            parts.append(part)
            room -= len(part)
    return END.join(parts)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab"],
        special_tokens=[END],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One stream; every text is followed by the end-of-text token."""
    end = tokenizer.token_to_id(END)
    return np.concatenate([np.array([*e.ids, end], np.uint16) for e in tokenizer.encode_batch(texts)])


def prepare(work: Path) -> None:
    """Write the tokenizer, the token streams and the two text samples; once."""
    if (work / "train.npy").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    train, held = split(sources())
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(CKPT / "tokenizer.json"))
    (HERE / "calib.txt").write_text(sample(train), encoding="utf-8")
    (HERE / "heldout.txt").write_text(sample(held), encoding="utf-8")
    (work / "held.json").write_text(json.dumps({"bytes": sum(len(t.encode()) for t in held)}))
    np.save(work / "held.npy", tokens_of(tokenizer, held))
    np.save(work / "train.npy", tokens_of(tokenizer, train))
    console.print(f"{len(train)} files to train on, {len(held)} held out")


# --- model ------------------------------------------------------------------------------------------------


def network():
    """The model as users will get it: loaded from the file inside the checkpoint."""
    spec = importlib.util.spec_from_file_location("stdlib12_model", CKPT / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(**CONFIG)


def fresh_params():
    return network().init(jax.random.key(SEED), jnp.zeros((1, 8), jnp.int32))["params"]


def losses(params, windows):
    """windows i32[B,T+1] -> nats for each predicted token [B,T]."""
    logits = network().apply({"params": params}, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


# --- training ---------------------------------------------------------------------------------------------


def is_matrix(params):
    """Which parameters decay: the matrices, not the scales of the norms."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def optimizer(budget: Budget) -> optax.GradientTransformation:
    adam = optax.adamw(budget.rate(), b1=0.9, b2=0.98, weight_decay=0.1, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def make_step(budget: Budget):
    tx = optimizer(budget)

    def step(state, windows):
        loss, grads = jax.value_and_grad(lambda p: losses(p, windows).mean())(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return tx, jax.jit(step, donate_argnums=0)


def batch(stream: np.ndarray, budget: Budget, step: int) -> np.ndarray:
    """Random windows that depend on the step alone, so a resumed run sees what an unbroken one would."""
    length = budget.window(step)
    starts = np.random.default_rng((SEED, step)).integers(0, len(stream) - length - 1, budget.tokens // length)
    return np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int32)


def snapshots(work: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(work.resolve() / "snapshots", options=ocp.CheckpointManagerOptions(max_to_keep=2))


def resume(manager: ocp.CheckpointManager, state):
    """The newest snapshot's state and step, or the given state and 0."""
    latest = manager.latest_step()
    if latest is None:
        return state, 0
    return manager.restore(latest, args=ocp.args.StandardRestore(state)), latest


def train(work: Path, budget: Budget, every: int) -> None:
    stream = np.load(work / "train.npy")
    tx, step_once = make_step(budget)
    params = fresh_params()
    manager = snapshots(work)
    state, start = resume(manager, {"params": params, "opt": tx.init(params)})
    size = sum(x.size for x in jax.tree.leaves(params))
    console.print(f"{size:,} parameters, {len(stream):,} tokens, from step {start}")
    recent, clock = [], time.perf_counter()
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("training", total=budget.steps, completed=start)
        for step in range(start, budget.steps):
            state, loss = step_once(state, batch(stream, budget, step))
            recent.append(float(loss))
            progress.advance(bar)
            if (step + 1) % 50 == 0:
                speed = len(recent) * budget.tokens / (time.perf_counter() - clock)
                console.print(f"step {step + 1}  loss {np.mean(recent):.3f}  {speed:.0f} tokens/s")
                recent, clock = [], time.perf_counter()
            if (step + 1) % every == 0 or step + 1 == budget.steps:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()


# --- evaluation and export --------------------------------------------------------------------------------


def evaluate(params, stream: np.ndarray, size: int) -> dict[str, float]:
    """Perplexity a token and bits a byte over windows of the full context that do not overlap."""
    score = jax.jit(losses)
    count = (len(stream) - 1) // CONTEXT
    windows = np.stack([stream[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)]).astype(np.int32)
    nats = float(np.mean([score(params, w[None]).mean() for w in windows]))
    return {"perplexity": math.exp(nats), "bits_per_byte": nats / math.log(2) * len(stream) / size}


def complete(params, prompt: str, count: int = 160, temperature: float = 0.7) -> str:
    tokenizer = Tokenizer.from_file(str(CKPT / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    forward = jax.jit(lambda tokens: network().apply({"params": params}, tokens))
    for i in range(count):
        padded = np.zeros((1, 256), np.int32)  # one shape, one compilation; causal attention ignores the padding
        padded[0, : len(ids)] = ids
        logits = forward(padded)[0, len(ids) - 1] / temperature
        ids.append(int(jax.random.categorical(jax.random.fold_in(jax.random.key(SEED), i), logits)))
    return tokenizer.decode(ids, skip_special_tokens=False)


def save(params) -> None:
    """Fill model.ckpt with the parameters and effc.json; model.py and tokenizer.json already live there."""
    shutil.rmtree(CKPT / "params", ignore_errors=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(CKPT / "params", params)
    # The marker names an absolute path, and only object stores need it.
    (CKPT / "params" / "commit_success.txt").unlink(missing_ok=True)
    about = {"format": 1, "module": "model.py:build", "config": CONFIG, "params": "params"}
    about |= {"tokenizer": "tokenizer.json", "dtype": "float32", "context": CONTEXT}
    (CKPT / "effc.json").write_text(json.dumps(about, indent=2) + "\n")


def export(work: Path, budget: Budget) -> None:
    params = fresh_params()
    state, step = resume(snapshots(work), {"params": params, "opt": optimizer(budget).init(params)})
    stored = jax.tree.map(lambda x: x.astype(STORED), state["params"])
    save(stored)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    tokenizer = Tokenizer.from_file(str(CKPT / "tokenizer.json"))
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    bundled = np.array(tokenizer.encode(text).ids, np.uint16)
    size = json.loads((work / "held.json").read_text())["bytes"]
    console.print(f"exported step {step}, {step * budget.tokens:,} tokens seen")
    console.print("all held-out files:", evaluate(rounded, np.load(work / "held.npy"), size))
    console.print("heldout.txt:", evaluate(rounded, bundled, len(text.replace(END, "").encode())))
    for prompt in ("def read_lines(path):", "class Stack:\n    def __init__(self"):
        console.rule()
        console.print(complete(rounded, prompt), markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="token streams and snapshots")
    parser.add_argument("--steps", type=int, default=Budget.steps)
    parser.add_argument("--every", type=int, default=500, help="steps between snapshots")
    parser.add_argument("--export", action="store_true", help="only export the newest snapshot")
    args = parser.parse_args()
    budget = Budget(steps=args.steps)
    prepare(args.work)
    if not args.export:
        train(args.work, budget, args.every)
    export(args.work, budget)


if __name__ == "__main__":
    main()
