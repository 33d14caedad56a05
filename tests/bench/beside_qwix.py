"""effc and qwix on one Flax Linen checkpoint, same bits and groups: rounding, GPTQ and AWQ of either, a table.

    python tests/bench/beside_qwix.py examples/stdlib12/model.ckpt --calib examples/stdlib12/calib.txt \
        --eval examples/stdlib12/heldout.txt

qwix's rows are by its own providers; the model runs in Flax with the weights that its codes stand for. Held-out
windows and calibration tokens are the same for both; scales are f32, the embedding stays as it is. Wants qwix beside
effc (`pip install qwix`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import qwix
from judging import Judge
from quality import against, cells, coded
from qwix.contrib import awq, gptq

from effc import evaluate
from effc.cli.process import prepare
from effc.evaluate import Windows
from effc.ir.stream import Piece, weight
from effc.ir.types import Quant
from effc.measure import text_windows
from effc.opened import Opened, open_model
from effc.passes.context import Context
from effc.passes.quant.text import calibration_tokens
from effc.state import State

METHODS = ("rtn", "gptq", "awq")

CODED = r".+/.+"
"""Modules whose matrices are coded: those inside of others. The table, read by the head too, stays as it is."""


@dataclass(frozen=True)
class Linen:
    """A Linen module and its parameters, f32."""

    module: Any
    params: Any

    @staticmethod
    def load(folder: Path) -> Linen:
        """A checkpoint as examples/stdlib12 has it: effc.json names the file and function that build the module."""
        told = json.loads((folder / "effc.json").read_text())
        file, _, build = told["module"].partition(":")
        spec = importlib.util.spec_from_file_location("linen_model", folder / file)
        assert spec and spec.loader
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        stored = ocp.StandardCheckpointer().restore((folder / told["params"]).resolve())
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), stored.get("params", stored))
        return Linen(getattr(code, build)(**told["config"]), params)

    def logits(self, params: Any, tokens: np.ndarray) -> jax.Array:
        """f32[b,t,V]."""
        return jax.jit(self.module.apply)({"params": params}, jnp.asarray(tokens))

    def coded(self, method: str, bits: int, group: int, tokens: Sequence[np.ndarray]) -> Any:
        """Parameters that qwix's codes stand for, fitted to windows i32[1,n]."""
        how = {"module_path": CODED, "op_names": ("dot_general",), "weight_qtype": f"int{bits}", "tile_size": group}
        rules = [qwix.QuantizationRule(**how)]
        shapes = jax.eval_shape(
            qwix.quantize_model(self.module, qwix.PtqProvider(rules)).init, jax.random.key(0), jnp.asarray(tokens[0])
        )["params"]
        with jax.numpy_rank_promotion("allow"):
            if method == "rtn":
                made = qwix.quantize_params(self.params, shapes)
            elif method == "gptq":
                seen = self._seen(gptq.GptqCalibrationProvider([gptq.GptqRule(**how)]), tokens)
                made = gptq.quantize_params(self.params, shapes, seen)
            else:
                seen = self._seen(awq.AwqCalibrationProvider([awq.AwqRule(**how)]), tokens)
                made = awq.quantize_params(self.params, shapes, seen)
        return _dense(made)

    def _seen(self, provider: Any, tokens: Sequence[np.ndarray]) -> Any:
        """Its statistics, window by window."""
        model = qwix.quantize_model(self.module, provider)
        step = jax.jit(lambda known, ids: model.apply({"params": self.params, **known}, ids, mutable="quant_stats")[1])
        known: Any = {}
        for ids in tokens:
            known = step(known, jnp.asarray(ids))
        return known["quant_stats"]


def _dense(params: Any) -> Any:
    """Floats in place of codes; AWQ's scales taken out again."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, awq.WithAwqScale):
            shape = [1] * leaf.array.qvalue.ndim
            shape[leaf.contracting_axis] = -1
            return qwix.dequantize(leaf.array) / leaf.awq_scale.reshape(shape)
        return qwix.dequantize(leaf.array) if _is_coded(leaf) else leaf

    return jax.tree.map(one, params, is_leaf=_is_coded)


def _is_coded(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "array", None), qwix.QArray)


def pieces(model: Linen, params: Any, text: Windows) -> Iterator[Piece]:
    """Logits of every window."""
    for i, chunk in enumerate(text.chunks):
        yield Piece(i, 0, model.logits(params, chunk))


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="held out")
    parser.add_argument("--fit", type=int, default=4096, help="tokens that GPTQ and AWQ are fitted to")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args(words)
    model, linen = open_model(args.model), Linen.load(args.model)
    text = text_windows(model, args.eval, args.tokens, evaluate.WINDOW)
    context = Context("", model.module, model.store, model.tokenizer(), text, evaluate.read_text(args.calib)[0], Path())
    seen, _ = calibration_tokens(model.module, context, args.fit)
    print(f"{model.module.name}, int{args.bits}, groups of {args.group}, {text.scored} tokens of {text.source}\n")
    print("| | perplexity | change | KL | same token |\n|---|---|---|---|---|", flush=True)
    told: list[str] = []
    with tempfile.TemporaryDirectory(prefix="effc-") as folder:
        vocab = evaluate.vocab_of(model.module)
        judge = Judge(evaluate.pieces((model.module, model.store), text), text, vocab, Path(folder))
        for method in args.methods:
            state = _ours(model, method, args, text, Path(folder) / method)
            params = linen.coded(method, args.bits, args.group, seen)
            ours, theirs = judge.judged(evaluate.pieces(state.side, text)), judge.judged(pieces(linen, params, text))
            told += [_ties(model, state, linen.params, params)] * (method == "rtn")
            print(f"| effc {method} | {cells(ours)} |\n| qwix {method} | {cells(theirs)} |", flush=True)
            told.append(f"{method}, effc against qwix: {against(ours, theirs)}")
    print("\n" + "\n".join(told))


def _ours(model: Opened, method: str, args: argparse.Namespace, text: Windows, folder: Path) -> State:
    """The same linears in the same bits and groups, scales f32."""
    how = "absmax" if method == "rtn" else method
    passes = f"quant{8 if args.bits == 8 else 4}{{method={how},group={args.group},scale=f32,tokens={args.fit},"
    passes += f"rules=@embed:keep;@linear:{args.bits}/{args.group}s}}"
    return coded(model, passes, text, args.calib, folder)


def _ties(model: Opened, state: State, dense: Any, params: Any) -> str:
    """How often both round a weight to different codes, and by how much one is then nearer than the other."""
    leaves = zip(jax.tree.leaves(dense), jax.tree.leaves(params), strict=True)
    theirs = {np.asarray(was).tobytes(): np.asarray(now) for was, now in leaves if was.ndim == 2}
    apart, total, nearer = 0, 0, 0.0
    for name, param in state.module.params.items():
        for layer in range(param.count if isinstance(param.type.dtype, Quant) else 0):
            was, now = np.asarray(model.store[name].read(layer)[""]), weight(state.store[name], layer)
            mine, other = np.asarray(now.dequantize()), theirs[was.tobytes()]
            differ = np.abs(mine - other) > 1e-4 * np.abs(was).max()
            apart, total = apart + int(differ.sum()), total + differ.size
            nearer = max(nearer, float(np.abs(np.abs(mine - was) - np.abs(other - was)).max() / np.abs(was).max()))
    told = f"rtn: {apart / total:.2%} of weights get another code"
    return f"{told}, being as near to it: errors differ by at most {nearer:.1e} of the greatest weight"


if __name__ == "__main__":
    prepare()
    main(sys.argv[1:])
