"""Prefill and decode as serialized jax.export programs: they run with JAX alone, weights are arguments."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from effc.errors import EffcError
from effc.runtime.cache import Cache, Rows, cache_shapes
from effc.runtime.coded import Split
from effc.runtime.deferred import Waiting
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.matmul import native, tpu
from effc.runtime.leaving import exits_of, likeliest
from effc.runtime.program import Program
from effc.runtime.qarray import QArray

PLATFORMS = ("cpu", "tpu")


@dataclass(frozen=True)
class Exported:
    """One program: its file, how it is called, with what arrays, and which platforms it runs on."""

    file: str
    call: str
    arguments: Sequence[str]
    platforms: Sequence[str]


def export_programs(
    program: Program, params: Any, folder: Path, *, batch: int = 1, prompt: int = 128, capacity: int = 1024
) -> list[Exported]:
    """Write prefill.bin, decode.bin and README.md to `folder`, for these fixed sizes; exits.bin where tokens may leave
    layers early."""
    if prompt > capacity:
        raise EffcError(f"export: a prompt of {prompt} tokens, want at most the cache's {capacity}")
    if importlib.util.find_spec("flatbuffers") is None:
        raise EffcError("export: jax.export writes through the flatbuffers package, want it installed")
    _register()
    extend, params = _portable(program.extend), exported_params(params)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    cache = _grown(cache_shapes(extend, weights, batch), capacity)
    count = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens, one = (jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (prompt, 1))
    folder.mkdir(parents=True, exist_ok=True)
    programs = [
        _export(folder, "prefill", extend, {"params": weights, "tokens": tokens, "cache": cache, "valid": count}),
        _export(folder, "decode", extend, {"params": weights, "tokens": one, "cache": cache}),
    ]
    if exits := exits_of(program):
        leave, threshold = _portable(likeliest(exits.entry)), jax.ShapeDtypeStruct((), jnp.float32)
        more = jax.eval_shape(leave, weights, one, cache, threshold)[2]  # as `Exits.with_waiting` makes it
        given = {"params": weights, "tokens": one, "cache": more, "threshold": threshold}
        programs.append(_export(folder, "exits", leave, given, "(tokens, layers, cache)"))
    (folder / "README.md").write_text(_readme(programs, batch, prompt, capacity))
    return programs


def exported_params(params: Any) -> Any:
    """The tree that exported programs take: arrays in the form that TPU kernels read, codes one an element."""
    return jax.tree.map(lambda x: tpu.prepared(x) if _coded(x) else x, params, is_leaf=_coded)


def _coded(x: Any) -> bool:
    return isinstance(x, QArray)


def _portable(extend: Callable[..., Any]) -> Callable[..., Any]:
    """The same with TPU kernels for TPUs, and without native ones, which the machine that runs it may lack."""

    def call(*arguments: Any) -> Any:
        with native.portable(), on_tpu.traced():
            return extend(*arguments)

    return call


def load_exported(file: Path) -> Callable[..., Any]:
    """The program in a file that export_programs wrote."""
    _register()
    return export.deserialize(bytearray(file.read_bytes())).call


def _grown(cache: Cache, capacity: int) -> Cache:
    def rows(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0], capacity, *x.shape[2:]), x.dtype)

    return Cache(cache.lengths, jax.tree.map(rows, cache.entries))


def _export(
    folder: Path, name: str, call: Callable[..., Any], given: Mapping[str, Any], gives: str = "(logits, cache)"
) -> Exported:
    done = _exported(call, tuple(given.values()))
    (folder / f"{name}.bin").write_bytes(done.serialize())
    leaves = jax.tree_util.tree_flatten_with_path({k: x for k, x in given.items() if k != "params"})[0]
    lines = [f"{path[0].key}{jax.tree_util.keystr(path[1:])}: {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]
    return Exported(f"{name}.bin", f"({', '.join(given)}) -> {gives}", lines, done.platforms)


def _exported(call: Callable[..., Any], arguments: tuple[Any, ...]) -> export.Exported:
    """For all of PLATFORMS, or this machine's own where an op has no lowering for the others."""
    try:
        return export.export(jax.jit(call), platforms=PLATFORMS)(*arguments)
    except NotImplementedError:
        return export.export(jax.jit(call), platforms=(jax.default_backend(),))(*arguments)


_registered: list[bool] = []


def _register() -> None:
    """Teach jax.export the trees that programs take; once a process."""
    if _registered:
        return
    _registered.append(True)
    for kind in (Cache, Rows, Split, Waiting, QArray):
        export.register_pytree_node_serialization(
            kind,
            serialized_name=f"effc.{kind.__name__}",
            serialize_auxdata=_to_bytes,
            deserialize_auxdata=_from_bytes,
        )


def _to_bytes(fields: Any) -> bytes:
    return repr(fields).encode()


def _from_bytes(data: bytes) -> Any:
    return ast.literal_eval(data.decode())


def _readme(programs: Sequence[Exported], batch: int, prompt: int, capacity: int) -> str:
    exits = _EXITS if any("threshold" in done.call for done in programs) else ""
    parts = [_TELLS.format(batch=batch, prompt=prompt, capacity=capacity, exits=exits)]
    for done in programs:
        arguments = "\n".join(f"- `{line}`" for line in done.arguments)
        parts.append(
            f"## {done.file}\n\n`{done.call}` for {', '.join(done.platforms)}; besides params:\n\n{arguments}\n"
        )
    return "\n".join(parts)


_TELLS = """# Exported programs

Serialized `jax.export` programs for {batch} sequence(s), prompts padded to {prompt} tokens and a cache of
{capacity} tokens. `params` is the tree that `program.py` describes in `PARAMS`; `lengths` says how many
tokens each sequence holds and grows with each call; `valid` says how many tokens of a padded prompt count.
{exits}Quantized arrays are as TPU kernels read them: `exported_params` makes them so, once.

```python
from pathlib import Path
from effc.backend.to_python import load_program
from effc.backend.to_stablehlo import exported_params, load_exported
from effc.runtime.weights import load_params

program = load_program(Path("../program.py").read_text())
params = exported_params(load_params(Path("../model.safetensors"), program.params))
prefill = load_exported(Path("prefill.bin"))
logits, cache = prefill(params, tokens, cache, valid)
```
"""

_EXITS = """`exits.bin` gives the likeliest token of each sequence and how many layers it ran; `threshold` 1 lets
nobody leave. Its cache is prefill's; where skipped layers run later, `exits_of(program).with_waiting(params, cache)`
of `effc.runtime.leaving`.
"""
