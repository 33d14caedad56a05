"""dot_general with a parameter -> linear; the bias added to it joins it. Gathers of rows -> embed."""

from __future__ import annotations

from dataclasses import replace

from effc.frontend.graph import Graph
from effc.frontend.simplify import reshaped, transposed
from effc.ir.core import Op, Param
from effc.ir.types import Size, Type, product

Axes = tuple[int, ...]


def raise_linears(graph: Graph) -> None:
    """Every product of a value with one parameter becomes a `linear`."""
    for op in graph.order():
        if op.kind == "lax.dot_general" and not op.attrs.get("batch"):
            _raise(graph, graph.op(op.outputs[0].name) or op)
    _join_biases(graph)


def _raise(graph: Graph, op: Op) -> None:
    contract = op.attrs["contract"]
    assert isinstance(contract, tuple)
    for side in (1, 0):
        weight = parameter_view(graph, op.inputs[side])
        if weight is not None and parameter_view(graph, op.inputs[1 - side]) is None:
            _replace(graph, op, side, weight, contract)  # type: ignore[arg-type]
            return


def parameter_view(graph: Graph, name: str) -> tuple[Param, Axes] | None:
    """The parameter a value is, and the order of its axes in it; None if it is not one, transposed or cast."""
    order: Axes | None = None
    op = graph.op(name)
    while op is not None and op.kind in {"lax.transpose", "lax.convert_element_type"}:
        if op.kind == "lax.transpose":
            inner = op.attrs["permutation"]
            assert isinstance(inner, tuple)
            order = inner if order is None else tuple(inner[i] for i in order)  # type: ignore[assignment]
        op = graph.op(op.inputs[0])
    shape_op = op if op is not None and op.kind == "lax.reshape" else None
    if shape_op is not None and order is None:
        op = graph.op(shape_op.inputs[0])
    if op is None or op.kind != "param":
        return None
    param = graph.params[op.params["value"]]
    if shape_op is not None:
        param = replace(param, type=Type(param.type.dtype, shape_op.out.type.shape))
    return param, order or tuple(range(len(param.type.shape)))


def _replace(graph: Graph, op: Op, side: int, weight: tuple[Param, Axes], contract: tuple[Axes, Axes]) -> None:
    param, order = weight
    x = op.inputs[1 - side]
    pairs = sorted(zip(contract[side], contract[1 - side], strict=True), key=lambda pair: order[pair[0]])
    summed: Axes = tuple(order[w] for w, _ in pairs)
    free_w = [w for w in range(len(order)) if w not in contract[side]]
    kept: Axes = tuple(order[w] for w in free_w)
    free_x = [a for a in range(len(graph.type(x).shape)) if a not in contract[1 - side]]
    matrix, layout = _matrix(graph, param, summed, kept)
    shape_x, sizes = graph.type(x).shape, param.type.shape
    rows = transposed(graph, x, (*free_x, *(a for _, a in pairs)), op)
    rows = reshaped(graph, rows, (*(shape_x[a] for a in free_x), product(tuple(sizes[a] for a in summed))), op)
    flat: tuple[Size, ...] = (*(shape_x[a] for a in free_x), product(tuple(sizes[a] for a in kept)))
    attrs = {} if layout == "kn" else {"layout": "nk"}
    (y,) = graph.add("linear", [rows], Type(op.out.type.dtype, flat), params={"w": matrix}, attrs=attrs, loc=op.loc)
    wide = reshaped(graph, y, (*(shape_x[a] for a in free_x), *(sizes[a] for a in kept)), op)
    if side == 0:
        count = len(free_x)
        wide = transposed(graph, wide, (*range(count, count + len(kept)), *range(count)), op)
    graph.become(op.outputs[0].name, wide)


def _matrix(graph: Graph, param: Param, summed: Axes, kept: Axes) -> tuple[str, str]:
    """The parameter as a matrix, without moving its elements where that can be: its name and layout."""
    sizes, straight = param.type.shape, tuple(range(len(param.type.shape)))
    k, n = product(tuple(sizes[a] for a in summed)), product(tuple(sizes[a] for a in kept))
    if (*kept, *summed) == straight and (*summed, *kept) != straight:
        return view(graph, param, (n, k), None), "nk"
    perm = None if (*summed, *kept) == straight else (*summed, *kept)
    return view(graph, param, (k, n), perm), "kn"


def view(graph: Graph, param: Param, shape: tuple[Size, ...], perm: Axes | None) -> str:
    """The name of `param` in this shape; a second parameter where the first is already another view."""
    wanted = replace(param, type=Type(param.type.dtype, shape), perm=perm)
    name = param.name
    for turn in range(2, 100):
        present = graph.params.get(name)
        if present is None or present == replace(wanted, name=name):
            break
        if present.perm is None and present.path == param.path and not _is_view(graph, name):
            break
        name = f"{param.name}.{turn}"
    graph.params[name] = replace(wanted, name=name)
    return name


def _is_view(graph: Graph, name: str) -> bool:
    """Whether some transformer op reads the parameter in the shape it has now."""
    return any(name in op.params.values() for op in graph.order() if op.kind != "param")


# -- biases ---------------------------------------------------------------------------------------------
def _join_biases(graph: Graph) -> None:
    users = graph.users()
    for op in graph.order():
        if op.kind == "lax.add":
            for side in (0, 1):
                if _join(graph, op, side, users):
                    break


def _join(graph: Graph, op: Op, side: int, users: dict[str, list[Op]]) -> bool:
    """add(linear, bias) -> linear with bias, where nothing else reads the sum without it."""
    chain = [graph.find(op.inputs[side])]
    below = graph.op(chain[0])
    while below is not None and below.kind in {"lax.reshape", "lax.convert_element_type"}:
        chain.append(below.inputs[0])
        below = graph.op(below.inputs[0])
    if below is None or below.kind != "linear" or "bias" in below.params:
        return False
    vector = _vector(graph, op.inputs[1 - side], op.out.type)
    width = below.out.type.shape[-1]
    alone = all(len(users.get(name, ())) == 1 for name in chain)
    if vector is None or not alone or product(vector.type.shape) != width:
        return False
    bias = view(graph, vector, (width,), None)
    (y,) = graph.add(
        "linear", below.inputs, Type(op.out.type.dtype, below.out.type.shape),
        params={**below.params, "bias": bias}, attrs=below.attrs, loc=below.loc,
    )  # fmt: skip
    graph.become(op.outputs[0].name, reshaped(graph, y, op.out.type.shape, op))
    return True


def _vector(graph: Graph, name: str, like: Type) -> Param | None:
    """The parameter whose elements lie along the last axes of `like`, the same for all tokens."""
    shape = graph.type(name).shape
    op = graph.op(name)
    while op is not None and op.kind in {"lax.reshape", "lax.broadcast_in_dim", "lax.convert_element_type"}:
        if op.kind == "lax.broadcast_in_dim":
            dims = op.attrs["dims"]
            inner = graph.type(op.inputs[0]).shape
            trailing = tuple(range(len(op.out.type.shape) - len(inner), len(op.out.type.shape)))
            if dims != trailing:
                return None
            shape = inner
        op = graph.op(op.inputs[0])
    if op is None or op.kind != "param":
        return None
    param = graph.params[op.params["value"]]
    sizes = [s for s in shape if s != 1]
    tail = list(like.shape[len(like.shape) - len(sizes) :]) if sizes else []
    return param if sizes == tail and product(param.type.shape) == product(tuple(sizes)) else None


# -- rows -----------------------------------------------------------------------------------------------
def raise_embeddings(graph: Graph) -> None:
    """gather of whole rows of a parameter -> embed."""
    for op in graph.order():
        if op.kind == "lax.gather":
            _rows(graph, graph.op(op.outputs[0].name) or op)
        elif op.kind == "lax.dot_general" and not op.attrs.get("batch"):
            _one_hot(graph, graph.op(op.outputs[0].name) or op)


def _one_hot(graph: Graph, op: Op) -> None:
    """A product of a table with vectors that are 1 at an index and 0 elsewhere is rows of the table."""
    contract = op.attrs["contract"]
    assert isinstance(contract, tuple)
    for side in (0, 1):
        table, axes = parameter_view(graph, op.inputs[side]), contract[side]
        if table is None or not isinstance(axes, tuple) or len(axes) != 1:
            continue
        along, axis = contract[1 - side][0], int(axes[0])  # type: ignore[index, arg-type]
        ids = _index(graph, op.inputs[1 - side], int(along))  # type: ignore[arg-type]
        if ids is None or table[1] != tuple(range(len(table[1]))):
            continue
        sizes = table[0].type.shape
        kept = (*sizes[:axis], *sizes[axis + 1 :])
        order = None if axis == 0 else (axis, *(a for a in range(len(sizes)) if a != axis))
        name, shape = view(graph, table[0], (sizes[axis], product(kept)), order), graph.type(ids).shape
        type = Type(op.out.type.dtype, (*shape, product(kept)))
        (rows,) = graph.add("embed", [ids], type, params={"table": name}, loc=op.loc)
        wide = reshaped(graph, rows, (*shape, *kept), op)
        front = (*range(len(shape), len(shape) + len(kept)), *range(len(shape))) if side == 0 else ()
        graph.become(op.outputs[0].name, transposed(graph, wide, front, op) if front else wide)
        return


def _index(graph: Graph, name: str, axis: int) -> str | None:
    """i where a value is [i == 0, i == 1, ...] along `axis`, without that axis."""
    op = graph.op(name)
    while op is not None and op.kind == "lax.convert_element_type":
        name, op = op.inputs[0], graph.op(op.inputs[0])
    if op is None or op.kind != "lax.eq":
        return None
    for side in (0, 1):
        shape = graph.type(op.inputs[1 - side]).shape
        if _counts_along(graph, op.inputs[side], axis) and shape and shape[axis] == 1:
            wide = (*op.out.type.shape[:axis], *op.out.type.shape[axis + 1 :])
            flat = reshaped(graph, op.inputs[1 - side], (*shape[:axis], *shape[axis + 1 :]), op)
            return flat if graph.type(flat).shape == wide and graph.type(flat).dtype == "i32" else None
    return None


def _counts_along(graph: Graph, name: str, axis: int) -> bool:
    """Whether a value is 0, 1, 2 ... along one axis, and of size 1 along all others."""
    shape = graph.type(name).shape
    op = graph.op(name)
    while op is not None and op.kind in {"lax.reshape", "lax.convert_element_type"}:
        op = graph.op(op.inputs[0])
    lone = len(shape) > axis and all(size == 1 for a, size in enumerate(shape) if a != axis)
    if op is None or op.kind != "lax.iota" or not lone or not isinstance(shape[axis], int):
        return False
    return op.out.type.shape[int(op.attrs["dimension"])] == shape[axis]  # type: ignore[arg-type]


def _rows(graph: Graph, op: Op) -> None:
    table, ids = parameter_view(graph, op.inputs[0]), graph.type(op.inputs[1])
    axis = _row_axis(graph, op)
    if table is None or table[1] != tuple(range(len(table[1]))) or axis is None or ids.shape[-1] != 1:
        return
    sizes = table[0].type.shape
    kept = (*sizes[:axis], *sizes[axis + 1 :])
    first = all(size == 1 for size in sizes[:axis])
    order = None if first else (axis, *(a for a in range(len(sizes)) if a != axis))
    name = view(graph, table[0], (sizes[axis], product(kept)), order)
    flat = reshaped(graph, op.inputs[1], ids.shape[:-1], op)
    type = Type(op.out.type.dtype, (*ids.shape[:-1], product(kept)))
    (rows,) = graph.add("embed", [flat], type, params={"table": name}, loc=op.loc)
    wide = reshaped(graph, rows, (*ids.shape[:-1], *kept), op)
    graph.become(op.outputs[0].name, transposed(graph, wide, _places(op, len(ids.shape) - 1, len(kept)), op))


def _row_axis(graph: Graph, op: Op) -> int | None:
    """The axis along which a gather takes one whole row for each index."""
    collapsed, shape = op.attrs["collapsed"], graph.type(op.inputs[0]).shape
    if (
        not isinstance(collapsed, tuple)
        or len(collapsed) != 1
        or collapsed != op.attrs["index_map"]
        or "batch" in op.attrs
    ):
        return None
    axis = int(collapsed[0])  # type: ignore[arg-type]
    whole = (*shape[:axis], 1, *shape[axis + 1 :])
    return axis if op.attrs["slice_sizes"] == whole else None


def _places(op: Op, indexed: int, kept: int) -> tuple[int, ...]:
    """For each axis of the gather's result, the axis of [indices..., row...] that it is."""
    offset = op.attrs["offset"]
    assert isinstance(offset, tuple)
    ids, row = iter(range(indexed)), iter(range(indexed, indexed + kept))
    return tuple(next(row) if a in offset else next(ids) for a in range(indexed + kept))
