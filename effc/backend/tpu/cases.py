"""Kernels by themselves, compiled by the TPU compiler on any machine, and what their schedules take.

    python -m effc.backend.tpu.cases v5e:2x2 --model llama-3-8b --rows 1,8,16 --group 128,32 --kind matmul
    python -m effc.backend.tpu.cases v6e:2x2 --model llama-3-8b --rows 16 --columns 256,512,1024 --kind matmul

The second tries tiles that tables and cost models do not choose. A process of its own: `child` says why.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from effc.backend.tpu import schedule
from effc.backend.tpu.child import environment, placed
from effc.backend.tpu.hardware import generation
from effc.backend.tpu.models import MODELS, Case, cases
from effc.runtime.kernels.generations import Generation

Built = tuple[Callable[..., Any], Sequence[Any]]
"""A function and the shapes of its arguments."""


def main(argv: Sequence[str] | None = None) -> None:
    """One line a kernel: (a steady step + what other steps do besides, spread over all) / HBM's cycles of a step."""
    args = _parser().parse_args(argv)
    chip = generation(args.target)
    with tempfile.TemporaryDirectory(prefix="effc-tpu-") as folder:
        os.environ.update(environment(Path(folder)))
        for case in _asked(args):
            found = measured(case, args.target, Path(folder))
            print(json.dumps(found) if args.json else _line(case, found, chip), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m effc.backend.tpu.cases", description="kernels one by one")
    numbers = {"type": _numbers, "metavar": "N,.."}
    parser.add_argument("target")
    parser.add_argument("--model", default=",".join(MODELS))
    parser.add_argument("--kind", default="matmul,attention,append,vocabulary,acceptance,lookup")
    parser.add_argument("--only", default="", help="titles that end so")
    parser.add_argument("--rows", default=[1], **numbers)
    parser.add_argument("--group", default=[128], **numbers)
    parser.add_argument("--columns", default=[0], help="of a step; 0: chosen", **numbers)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--given", default="{}", help="more numbers, JSON")
    parser.add_argument("--joined", action="store_true", help="q, k and v as one; gate and up too")
    parser.add_argument("--json", action="store_true")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _asked(args: argparse.Namespace) -> Iterator[Case]:
    kinds, given = args.kind.split(","), json.loads(args.given)
    for model in args.model.split(","):
        for group in args.group:
            for rows in args.rows:
                for case in cases(model, rows=rows, group=group, joined=args.joined, context=args.context):
                    for columns in args.columns if case.kind in kinds and case.title.endswith(args.only) else ():
                        more = {"columns": columns} if case.kind in ("matmul", "vocabulary", "acceptance") else {}
                        yield replace(case, numbers={**case.numbers, **more, **given})


def _line(case: Case, found: dict[str, Any], chip: Generation) -> str:
    hbm = found["step_bytes"] / chip.bytes_a_cycle
    if "step" not in found:
        return f"{case.title:28s} {found['name']}: {found['unparsed']}"
    spread = found["rare"] * found["times"] / found["steps"]
    top = sorted(found["units"].items(), key=lambda pair: -pair[1])[:3]
    units = " ".join(f"{name} {cycles:.0f}" for name, cycles in top)
    return (
        f"{case.title:28s} {(found['step'] + spread) / hbm:5.2f} = ({found['step']:5d} + {spread:4.0f}) / {hbm:5.0f}, "
        f"{found['steps']:3d} steps, "
        f"spills {found['spills']:4d}, {units} [{found['name']}]"
    )


def measured(case: Case, target: str, folder: Path) -> dict[str, Any]:
    """Its name, steps, bytes a step, and the schedule or why there is none."""
    call = compiled(case, target)
    own = {"title": case.title, **asdict(call)}
    found = schedule.read(folder, call.name, conditional=call.conditional)
    if isinstance(found, schedule.Unparsed):
        return own | {"unparsed": found.why}
    return own | {"step": found.step, "rare": found.rare, "units": found.units, "spills": found.spills}


def compiled(case: Case, target: str) -> Any:
    """Compiles a case; gives the kernel's call, which must be in the program."""
    import jax

    from effc.runtime.kernels import on_tpu

    with on_tpu.traced(target.partition(":")[0]) as calls:
        function, shapes = BUILDERS[case.kind](**case.numbers)
        lowered = jax.jit(function).lower(*placed(target)(shapes))
    text = lowered.compile().as_text() or ""
    assert len(calls) == 1 and f"%{calls[0].name}" in text, f"{case}: {[call.name for call in calls]}"
    return calls[0]


def _shape(shape: tuple[int, ...], dtype: str = "float32") -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def _coded(
    shape: tuple[int, ...], bits: int, group: int, scale: str, zeros: bool, axis: int = -2, layers: int = 0
) -> Any:
    """Shapes of a quantized matrix, of a stack of them where layers."""
    from effc.runtime.qarray import QArray

    grouped, stack = list(shape), (layers,) * bool(layers)
    grouped[axis] = -(-shape[axis] // (group or shape[axis]))
    scales = _shape((*stack, *grouped), scale)
    codes = _shape((*stack, *shape), "int4" if bits == 4 else "int8")
    return QArray(codes, scales, scales if zeros else None, bits, group, axis, shape[-1])


def _matmul(
    rows: int, extent: int, width: int, group: int, bits: int = 4, digits: int = 2, scale: str = "float16",
    zeros: bool = False, layers: int = 0, columns: int = 0,
) -> Built:  # fmt: skip
    from effc.runtime.kernels.matmul import tpu

    def call(x: Any, w: Any, *layer: Any) -> Any:
        assert tpu.fits(x, w, "kn")
        return tpu.matmul(x, w, *layer, digits=digits, columns=columns)

    w = _coded((extent, width), bits, group, scale, zeros, layers=layers)
    return call, (_shape((rows, extent)), w, *[_shape((), "int32")] * bool(layers))


def _attention(
    batch: int, heads: int, groups: int, head: int, context: int, tokens: int = 1, window: int = 0,
    softcap: float = 0.0, kind: str = "int8", queries: str = "float32", block: int = 0,
) -> Built:  # fmt: skip
    from effc.runtime.kernels.attention import tpu

    d = -(-head // 128) * 128 if kind == "int8" else head

    def call(q: Any, keys: Any, values: Any, scales: Any, positions: Any) -> Any:
        assert tpu.fits(q, keys, values, groups)
        return tpu.attend(
            q, keys, values, scales, positions, scale=0.1, window=window, softcap=softcap, block=block
        )  # fmt: skip

    cache = _shape((batch * groups, context, d), kind)
    scales = (_shape((batch, groups, context)),) * 2 if kind == "int8" else None
    return call, (_shape((batch, tokens, heads, d), queries), cache, cache, scales, _shape((batch, tokens), "int32"))


def _append(batch: int, groups: int, head: int, context: int, tokens: int = 1, kind: str = "int8") -> Built:
    """Keys and values; of int8 the kernel makes codes and scales, or writes codes where it cannot."""
    from effc.runtime.coded import Split
    from effc.runtime.kernels.attention import append

    n, lengths = batch * groups, _shape((batch,), "int32")
    if kind != "int8":
        return append.append, ([_shape((n, context, head), kind)] * 2, [_shape((n, tokens, head), kind)] * 2, lengths)
    codes, d = "int8", -(-head // 128) * 128
    # A tree of shapes: the class does not look at what it holds.
    old: Any = Split(_shape((n, context, d), codes), _shape((n, context)), head)
    if append.fits_split(old, tokens, batch):
        return append.append, ([old] * 2, [_shape((n, tokens, head))] * 2, lengths)
    return append.append, ([old.codes] * 2, [_shape((n, tokens, d), codes)] * 2, lengths)


def _vocabulary(
    rows: int, extent: int, vocab: int, layout: str = "nk", bits: int = 8, group: int = 0, scale: str = "float16",
    softcap: float = 0.0, columns: int = 0,
) -> Built:  # fmt: skip
    """bits 16: a bf16 head."""
    from effc.runtime.kernels.vocabulary import tpu

    shape, axis = ((vocab, extent), -1) if layout == "nk" else ((extent, vocab), -2)
    head = _shape(shape, "bfloat16") if bits == 16 else _coded(shape, bits, group, scale, False, axis)

    def call(x: Any, head: Any) -> Any:
        assert tpu.fits(x, head, layout)
        return tpu.top(x, head, layout=layout, softcap=softcap, columns=columns)

    return call, (_shape((rows, extent)), head)


def _acceptance(rows: int, vocab: int, columns: int = 0) -> Built:
    from effc.runtime.kernels.acceptance import tpu

    shares = _shape((rows, vocab))
    return lambda p, q, bits: tpu.draw(p, q, bits, columns=columns), (shares, shares, _shape((rows, 2), "uint32"))


def _lookup(rows: int, vocab: int, extent: int, bits: int = 8) -> Built:
    from effc.runtime.kernels.lookup import tpu

    return tpu.rows, (_shape((vocab, extent), "int4" if bits == 4 else "int8"), _shape((rows,), "int32"))


BUILDERS: dict[str, Callable[..., Built]] = {
    "matmul": _matmul, "attention": _attention, "append": _append, "vocabulary": _vocabulary,
    "acceptance": _acceptance, "lookup": _lookup,
}  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
