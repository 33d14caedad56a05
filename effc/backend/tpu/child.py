"""Compile one program for a TPU and say what came of it: `python -m effc.backend.tpu.child < request.json`.

A process of its own: the compiler reads its options from the environment once, and writes its dumps to
one folder. Prints JSON. `request`: program (source), target, batch, context, calls (name -> tokens a call); the
call `exits` is the function that tokens leave early, asked for their likeliest tokens.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effc.backend.tpu import schedule
from effc.backend.tpu.absent import ABSENT

_OP = re.compile(r"^ +(?:ROOT )?%\S+ = (\S+) ([a-z\-]+)\(", re.MULTILINE)
_FREE = frozenset(
    {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-start", "copy-done", "after-all"}
    | {"slice-start", "slice-done", "async-start", "async-done"}
)
"""Ops without code of their own; copies that run beside others are the memory's, and counted as bytes."""

_KERNEL = 'custom_call_target="tpu_custom_call"'
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

_BODY = re.compile(r", body=%([^ ,]+)")

_SIZES = re.compile(r'"([\w<>-]+?)(?:\.\d+)?": \{\s*"blocks": \[.*?"total_size": (\d+)', re.DOTALL)


_READ = ".*(packed-bundles-post-ra|pre-delay).*"
"""Dumps that `schedule` reads: all others, some seventy a kernel, would take thirty times as long as compiling."""


def environment(dump: Path) -> dict[str, str]:
    """What the TPU compiler wants to find where there is no TPU."""
    flags = {
        "dump_to": str(dump), "dump_llo_text": "true", "emit_annotations": "true", "debug_level": "2",
        "dump_llo_pass_label_regex": _READ,
    }  # fmt: skip
    return {
        **ABSENT,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "LIBTPU_INIT_ARGS": " ".join(f"--xla_jf_{name}={value}" for name, value in flags.items()),
    }


def main() -> None:
    """One request on standard input."""
    request = json.load(sys.stdin)
    dump = Path(request["dump"])
    space: dict[str, Any] = {"__name__": "effc_program"}
    exec(compile(request["program"], "program.py", "exec"), space)
    results = {name: compiled(space, name, tokens, request, dump / name) for name, tokens in request["calls"].items()}
    json.dump(results, sys.stdout)


def compiled(
    space: Mapping[str, Any], name: str, tokens: int, request: Mapping[str, Any], dump: Path
) -> dict[str, Any]:
    """A function of `tokens` tokens a sequence: kernels, memory, the ops around."""
    lowered, calls = _lowered(space, name, tokens, request)
    done = lowered.compile()
    memory, text = done.memory_analysis(), done.as_text()
    counts = Counter(call.name for call in calls)
    vmem = _vmem(dump.parent)
    kernels = [_kernel(dump.parent, call, counts[call.name], vmem) for call in dict.fromkeys(calls)]
    return {
        "tokens": tokens * request["batch"],
        "kernels": kernels,
        "ops": dict(_ops(text)),
        "around_cycles": _cycles(text),
        "copies": _weight_copies(text, lowered),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
    }


def _lowered(space: Mapping[str, Any], name: str, tokens: int, request: Mapping[str, Any]) -> tuple[Any, Sequence[Any]]:
    import jax
    import jax.numpy as jnp

    from effc.backend.tpu.abstract import abstract_params
    from effc.runtime.cache import cache_shapes, empty_cache
    from effc.runtime.kernels import on_tpu
    from effc.runtime.leaving import likeliest

    batch, extend = request["batch"], space["extend"]
    params = abstract_params(space["PARAMS"])
    chip = request["target"].partition(":")[0]
    with on_tpu.traced(chip):  # caches are as such programs keep them; this trace's calls are not the program's
        cache = jax.eval_shape(lambda: empty_cache(cache_shapes(extend, params, batch), request["context"]))
    function, given = extend, [params, jax.ShapeDtypeStruct((batch, tokens), jnp.int32), cache]
    if name == "exits":
        function = likeliest(space["ENTRIES"][space["DECODE"]["early"]])
        with on_tpu.traced(chip):
            given = [*given[:2], jax.eval_shape(function, *given, 1.0)[2], jax.ShapeDtypeStruct((), jnp.float32)]
    place = placed(request["target"])
    with on_tpu.traced(chip) as calls:
        lowered = jax.jit(function, donate_argnums=2).lower(*map(place, given))
    return lowered, calls


def placed(target: str) -> Callable[[Any], Any]:
    """Shapes on one device of a topology that need not be there."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(target, platform="tpu").devices
    there = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)

    return place


def _kernel(dump: Path, call: Any, count: int, vmem: Mapping[str, int]) -> dict[str, Any]:
    found = schedule.read(dump, call.name, conditional=call.conditional)
    own = {
        "name": call.name, "calls": count, "step_bytes": call.step_bytes, "steps": call.steps, "times": call.times,
        "vmem": vmem.get(call.name, call.vmem),
    }  # fmt: skip
    if isinstance(found, schedule.Unparsed):
        return own | {"unparsed": found.why}
    return own | {"cycles": found.step, "rare": found.rare, "units": found.units, "spills": found.spills}


def _vmem(dump: Path) -> dict[str, int]:
    """Bytes that each kernel has in VMEM, by its name without the number at the end, from the compiler's report."""
    out: dict[str, int] = {}
    for file in dump.glob("*vmem_report.html"):
        for name, size in _SIZES.findall(file.read_text()):
            out[name] = max(out.get(name, 0), int(size))
    return out


def _scheduled(text: str) -> str:
    """The entry computation, and bodies of loops, once each: layers past an exit are loops of at most one turn."""
    parts = {part.split(maxsplit=2)[0].lstrip("%"): part for part in text.split("\n\n") if part.startswith("%")}
    bodies = [parts[name] for name in dict.fromkeys(_BODY.findall(text)) if name in parts]
    return "\n".join([text[text.index("\nENTRY ") :], *bodies])


def _ops(text: str) -> Counter[str]:
    """What the scheduled program runs, by kind; what costs nothing, and lone numbers, left out."""
    entry = _scheduled(text)
    found = Counter(kind for shape, kind in _OP.findall(entry) if kind not in _FREE and "S(6)" not in shape)
    return found - Counter({"custom-call": entry.count(_KERNEL)})


def _cycles(text: str) -> int:
    """Of XLA's own ops, as the compiler itself reckons them: schedule, memory and what it takes to begin one."""
    return sum(
        int(found[1])
        for line in _scheduled(text).splitlines()
        if _KERNEL not in line and (found := _CYCLES.search(line))
    )


def _weight_copies(text: str, lowered: Any) -> list[str]:
    """Copies, transposes and slices of whole coded weights: these should be read where they lie.

    A copy into space 1 is the weight's one way from HBM to VMEM, ahead of the kernel that reads it.
    """
    import jax

    short = {"int4": "s4", "int8": "s8"}
    shapes = {
        f"{short[str(leaf.dtype)]}[{','.join(map(str, leaf.shape))}]"
        for leaf in jax.tree.leaves(lowered.args_info)
        if str(leaf.dtype) in short
    }
    entry = _scheduled(text)
    kinds = {"copy", "copy-start", "transpose", "dynamic-slice"}
    found = [(t, kind) for t, kind in _OP.findall(entry) if kind in kinds and "S(1)" not in t]
    return [f"{kind} {t}" for t, kind in found if any(shape in t for shape in shapes)]


if __name__ == "__main__":
    os.environ.update(environment(Path(sys.argv[1])))
    main()
