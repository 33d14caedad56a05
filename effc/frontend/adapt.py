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

ROLES: Mapping[str, Callable[[jax.Array], Any]] = {
    "tokens": lambda tokens: tokens,
    "positions": REQUIRED["positions"],
    "ones": lambda tokens: jnp.ones_like(tokens),
    "zeros": lambda tokens: jnp.zeros_like(tokens),
    "causal": lambda tokens: jnp.broadcast_to(_triangle(tokens), (tokens.shape[0], *_triangle(tokens).shape)),
    "causal_heads": lambda tokens: jnp.broadcast_to(_triangle(tokens), (tokens.shape[0], 1, *_triangle(tokens).shape)),
    "none": lambda tokens: None,
    "true": lambda tokens: True,
    "false": lambda tokens: False,
}
"""What an argument can be given, from tokens [B,T]: causal is bool [B,T,T], causal_heads bool [B,1,T,T]."""

Inputs = str | Mapping[str, "str | Callable[[jax.Array], Any]"]
"""`input_ids=tokens,mask=causal`, or by name of argument a role or a function of the tokens."""

TRANSIENT = ("cache", "intermediates", "losses", "metrics")
"""Linen collections that one full forward pass neither needs nor keeps."""

STATISTICS = "{}: the module keeps running statistics (batch norm), want parameters as its only trained state"

PROBE = (1, 8)  # batch, length of the tokens a module is shaped with


def from_linen(
    module: linen.Module, spec: PyTree | None = None, where: str = "model", inputs: Inputs = ""
) -> tuple[Forward, PyTree]:
    """spec: of parameters that are there already, held against what the module initialises."""
    module = _switched_off(module)
    arguments = _arguments(type(module).__call__, where, inputs)
    variables = _linen_shapes(module, arguments, where)
    wanted = as_spec(variables["params"])
    if spec is not None:
        check_spec(flatten(as_spec(spec)), flatten(wanted), where)
    constants = _linen_constants(module, arguments, variables, where)

    def forward(params: PyTree, tokens: jax.Array) -> jax.Array:
        given, named = arguments(tokens)
        out = module.apply({"params": params, **constants}, *given, **named)
        return logits_of(out, where)

    return forward, wanted if spec is None else as_spec(spec)


def from_nnx(
    build: nnx.Module | Callable[[], nnx.Module], where: str = "model", inputs: Inputs = ""
) -> tuple[Forward, PyTree]:
    """A module, or better a function that makes one: then only what is not nnx.Param is initialised."""
    # A copy, sharing arrays: eval() must not switch the caller's module.
    model = nnx.merge(*nnx.split(build)) if isinstance(build, nnx.Module) else nnx.eval_shape(build)
    model.eval()
    arguments = _arguments(type(model).__call__, where, inputs)
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
        given, named = arguments(tokens)
        return logits_of(nnx.merge(graph, state, randoms, others)(*given, **named), where)

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


Arguments = Callable[[jax.Array], tuple[list[jax.Array], dict[str, Any]]]
"""From tokens to what a module is called with: by place, and by name."""


def _arguments(call: Callable[..., Any], where: str, inputs: Inputs = "") -> Arguments:
    """What `call(self, ...)` is given: what `inputs` says, tokens first otherwise, then what it must have."""
    kinds = inspect.signature(call).parameters.values()
    parameters = [p for p in kinds if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][1:]
    roles = _roles(inputs, [p.name for p in parameters], where)
    first = [] if "tokens" in roles.values() or not parameters else parameters[:1]
    if first and first[0].name in roles:
        raise EffcError(f"{where}: inputs give '{first[0].name}' something else, want one argument to be tokens")
    rest = [p for p in parameters if p not in first and p.name not in roles]
    flags = {p.name: FLAGS[p.name] for p in rest if p.name in FLAGS}
    required = [p.name for p in rest if p.default is p.empty and p.name not in flags]
    unknown = [name for name in required if name not in REQUIRED]
    if unknown:
        known = ", ".join([*FLAGS, *REQUIRED])
        raise EffcError(
            f"{where}: __call__ wants argument '{unknown[0]}', which effc cannot fill; say what it is with "
            f"--inputs {unknown[0]}={'|'.join(ROLES)}, or wrap the module (known: {known})"
        )

    def made(tokens: jax.Array) -> tuple[list[jax.Array], dict[str, Any]]:
        asked = {name: (ROLES[role] if isinstance(role, str) else role)(tokens) for name, role in roles.items()}
        given = [] if "tokens" in roles.values() else [tokens]
        return given, flags | {name: REQUIRED[name](tokens) for name in required} | asked

    return made


def _roles(inputs: Inputs, arguments: list[str], where: str) -> dict[str, str | Callable[[jax.Array], Any]]:
    """What each argument that is named is given; EffcError where there is no such argument or role."""
    pairs = parse_inputs(inputs, where) if isinstance(inputs, str) else dict(inputs)
    for name, role in pairs.items():
        if name not in arguments:
            raise EffcError(f"{where}: __call__ has no argument '{name}'{nearest(name, arguments)}")
        if isinstance(role, str) and role not in ROLES:
            raise EffcError(f"{where}: inputs {name}={role}, want {' or '.join(ROLES)}{nearest(role, ROLES)}")
    return pairs


def parse_inputs(text: str, where: str) -> dict[str, Any]:
    """`input_ids=tokens,mask=causal` by argument."""
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    wrong = next((name for name, equals, role in pairs if not (equals and name.strip() and role.strip())), None)
    if wrong is not None:
        raise EffcError(f"{where}: inputs '{text}', want ARGUMENT=ROLE,... where ROLE is {' or '.join(ROLES)}")
    return {name.strip(): role.strip() for name, _, role in pairs}


def _triangle(tokens: jax.Array) -> jax.Array:
    return jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))


def _linen_shapes(module: linen.Module, arguments: Arguments, where: str) -> Mapping[str, Any]:
    def init(tokens: jax.Array) -> Any:
        given, named = arguments(tokens)
        return module.init(_keys(), *given, **named)

    variables = jax.eval_shape(init, Spec(PROBE, jnp.int32))
    if not variables.get("params"):
        raise EffcError(f"{where}: the module has no parameters")
    return variables


def _linen_constants(
    module: linen.Module, arguments: Arguments, variables: Mapping[str, Any], where: str
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
        given, named = arguments(tokens)
        made = module.init(_keys(), *given, **named)
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
