"""Any Linen or NNX module -> a pure function (params, tokens i32[B,T]) -> logits [B,T,V], and its spec."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from effc.errors import EffcError, nearest
from effc.frontend.source import PyTree, Spec, flatten, unflatten

Forward = Callable[[PyTree, jax.Array], jax.Array]

FLAGS: Mapping[str, bool] = {
    "deterministic": True,
    "disable_dropout": True,
    "eval_mode": True,
    "inference": True,
    "train": False,
    "training": False,
    "is_train": False,
    "is_training": False,
    "enable_dropout": False,
    "use_running_average": True,
}
"""Arguments (and Linen fields) that switch dropout off; set wherever a module has them."""

REQUIRED: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    **dict.fromkeys(["attention_mask", "mask", "input_mask"], lambda tokens: jnp.ones_like(tokens)),
    **dict.fromkeys(
        ["position_ids", "positions", "decoder_positions", "input_positions"],
        lambda tokens: jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape),
    ),
    **dict.fromkeys(["segment_ids", "decoder_segment_ids"], lambda tokens: jnp.ones_like(tokens)),
    "token_type_ids": lambda tokens: jnp.zeros_like(tokens),
}
"""What an argument of this name gets, from tokens [B,T], when the module has no default for it."""

TRANSIENT = ("cache", "intermediates", "losses", "metrics")
"""Linen collections that one full forward pass neither needs nor keeps."""

STATISTICS = "{}: the module keeps running statistics (batch norm), want parameters as its only trained state"

PROBE = (1, 8)  # batch, length of the tokens a module is shaped with


def from_linen(module: linen.Module, spec: PyTree | None = None, where: str = "model") -> tuple[Forward, PyTree]:
    """spec: of parameters that are there already, held against what the module initialises."""
    module = _switched_off(module)
    arguments = _arguments(type(module).__call__, where)
    variables = _linen_shapes(module, arguments, where)
    wanted = as_spec(variables["params"])
    if spec is not None:
        check_spec(flatten(as_spec(spec)), flatten(wanted), where)
    constants = _linen_constants(module, arguments, variables, where)

    def forward(params: PyTree, tokens: jax.Array) -> jax.Array:
        out = module.apply({"params": params, **constants}, tokens, **arguments(tokens))
        return logits_of(out, where)

    return forward, wanted if spec is None else as_spec(spec)


def from_nnx(build: nnx.Module | Callable[[], nnx.Module], where: str = "model") -> tuple[Forward, PyTree]:
    """A module, or better a function that makes one: then only what is not nnx.Param is initialised."""
    # A copy, sharing arrays: eval() must not switch the caller's module.
    model = nnx.merge(*nnx.split(build)) if isinstance(build, nnx.Module) else nnx.eval_shape(build)
    model.eval()
    arguments = _arguments(type(model).__call__, where)
    graph, params, randoms, others = nnx.split(model, nnx.Param, nnx.RngState, ...)
    leaves = {"/".join(str(key) for key in path): (path, variable) for path, variable in params.flat_state()}
    spec = unflatten({name: variable.get_value() for name, (_, variable) in leaves.items()})
    if any(isinstance(variable, nnx.BatchStat) for _, variable in others.flat_state()):
        raise EffcError(STATISTICS.format(where))
    if not isinstance(build, nnx.Module) and jax.tree.leaves(others):
        others = _computed(build)
    randoms = jax.tree.map(_seed, randoms)

    def forward(values: PyTree, tokens: jax.Array) -> jax.Array:
        flat = flatten(values)
        state = nnx.State.from_flat_path({path: v.replace(flat[name]) for name, (path, v) in leaves.items()})
        return logits_of(nnx.merge(graph, state, randoms, others)(tokens, **arguments(tokens)), where)

    return forward, as_spec(spec)


def logits_of(out: Any, where: str) -> jax.Array:
    """The array itself, its .logits or ['logits'], or the first of a tuple."""
    if isinstance(out, Mapping) and "logits" in out:
        out = out["logits"]
    elif isinstance(out, tuple | list) and out and getattr(out, "logits", None) is None:
        out = out[0]
    out = out if isinstance(out, jax.Array) else getattr(out, "logits", out)
    if not isinstance(out, jax.Array):
        raise EffcError(
            f"{where}: the module returns {type(out).__name__}, want logits [B,T,V]; wrap it in one that does"
        )
    return out


def as_spec(tree: PyTree) -> PyTree:
    """Leaves as ShapeDtypeStruct, boxes (partitioning metadata) taken off, keys as text."""
    flat = flatten(linen.meta.unbox(tree))
    return unflatten({path: Spec(leaf.shape, leaf.dtype) for path, leaf in flat.items()})


def check_spec(found: Mapping[str, Spec], wanted: Mapping[str, Spec], where: str) -> None:
    """Every parameter there, of the shape the module wants, and no other; dtypes may differ."""
    for path in wanted:
        if path not in found:
            raise EffcError(f"{where}: no parameter '{path}'{nearest(path, found.keys() - wanted.keys())}")
    for path, spec in found.items():
        if path not in wanted:
            raise EffcError(f"{where}: the module has no parameter '{path}'{nearest(path, wanted)}")
        if spec.shape != wanted[path].shape:
            raise EffcError(f"{where}: parameter '{path}' is {list(spec.shape)}, want {list(wanted[path].shape)}")


def vocab_of(forward: Forward, spec: PyTree, where: str) -> int:
    """Rows of the logits' last axis, found by abstract evaluation."""
    out = jax.eval_shape(forward, spec, Spec(PROBE, jnp.int32))
    if len(out.shape) != 3 or out.shape[:2] != PROBE:
        raise EffcError(
            f"{where}: tokens {list(PROBE)} give logits {list(out.shape)}, want [batch, length, vocabulary]"
        )
    return out.shape[-1]


def _switched_off(module: linen.Module) -> linen.Module:
    names = {f.name for f in fields(module)} & FLAGS.keys()
    changes: dict[str, Any] = {name: FLAGS[name] for name in names}
    return module.clone(**changes) if names else module


def _arguments(call: Callable[..., Any], where: str) -> Callable[[jax.Array], dict[str, Any]]:
    """A function from tokens to the keyword arguments that `call(self, tokens, ...)` wants beside them."""
    parameters = [
        p for p in inspect.signature(call).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    rest = parameters[2:]
    flags = {p.name: FLAGS[p.name] for p in rest if p.name in FLAGS}
    required = [p.name for p in rest if p.default is p.empty and p.name not in flags]
    unknown = [name for name in required if name not in REQUIRED]
    if unknown:
        known = ", ".join([*FLAGS, *REQUIRED])
        raise EffcError(
            f"{where}: __call__ wants argument '{unknown[0]}', which effc cannot fill; wrap the module (known: {known})"
        )
    return lambda tokens: flags | {name: REQUIRED[name](tokens) for name in required}


def _linen_shapes(
    module: linen.Module, arguments: Callable[[jax.Array], dict[str, Any]], where: str
) -> Mapping[str, Any]:
    def init(tokens: jax.Array) -> Any:
        return module.init(_keys(), tokens, **arguments(tokens))

    variables = jax.eval_shape(init, Spec(PROBE, jnp.int32))
    if not variables.get("params"):
        raise EffcError(f"{where}: the module has no parameters")
    return variables


def _linen_constants(
    module: linen.Module, arguments: Callable[..., Any], variables: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Collections beside params, computed alone: XLA drops the parameters' initialisation."""
    names = [name for name in variables if name != "params" and name not in TRANSIENT]
    if "batch_stats" in names:
        raise EffcError(STATISTICS.format(where))
    if not names:
        return {}
    tokens = jnp.zeros(PROBE, jnp.int32)

    @jax.jit
    def others() -> dict[str, Any]:
        made = module.init(_keys(), tokens, **arguments(tokens))
        return {name: made[name] for name in names}

    return others()


def _keys() -> dict[str, jax.Array]:
    return {"params": jax.random.key(0), "dropout": jax.random.key(0)}


def _computed(build: Callable[[], nnx.Module]) -> Any:
    """The state neither parameter nor random, computed alone: XLA drops the parameters' initialisation."""

    @jax.jit
    def others() -> Any:
        return nnx.split(build(), nnx.Param, nnx.RngState, ...)[3]

    return others()


def _seed(leaf: Any) -> jax.Array:
    """A stand-in for random state, which a deterministic forward never reads."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)
