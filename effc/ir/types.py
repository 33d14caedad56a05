"""Sizes and types: integers or formulas of `b` and `t`, dense dtypes or quantized ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from effc.widths import row_bytes

Monomial = tuple[tuple[str, int], ...]  # (("b", 1), ("t", 2)) is b*t^2; () is 1


@dataclass(frozen=True)
class Dim:
    """A size that depends on the call: a polynomial in named sizes with rational coefficients.

    `terms` is sorted, holds no zero, and names at least one size: constants are plain ints.
    """

    terms: tuple[tuple[Monomial, Fraction], ...]

    def __str__(self) -> str:
        ordered = sorted(self.terms, key=lambda term: (term[0] == (), term))
        text = "".join(_term(monomial, value) for monomial, value in ordered)
        return text.removeprefix("+")

    __repr__ = __str__

    def __add__(self, other: Size) -> Size:
        return _build([*self.terms, *_terms(other)])

    __radd__ = __add__

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + (other * -1)

    def __rsub__(self, other: Size) -> Size:
        return self * -1 + other

    def __mul__(self, other: Size | Fraction) -> Size:
        return _build([(_times(m, n), x * y) for m, x in self.terms for n, y in _terms(other)])

    __rmul__ = __mul__

    def names(self) -> frozenset[str]:
        """The sizes it depends on."""
        return frozenset(name for monomial, _ in self.terms for name, _ in monomial)


Size = int | Dim


def name_dim(name: str) -> Dim:
    """The size called `name`."""
    return Dim(((((name, 1),), Fraction(1)),))


def polynomial(terms: Mapping[Monomial, Fraction]) -> Size:
    """The size with these coefficients; an int where nothing is named."""
    return _build(list(terms.items()))


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """The number `size` is when `sizes` says what each name is; ValueError if not whole."""
    if isinstance(size, int):
        return size
    total = sum(
        (value * math.prod(sizes[n] ** p for n, p in monomial) for monomial, value in size.terms),
        Fraction(0),
    )
    if total.denominator != 1:
        raise ValueError(f"{size} is {total} at {dict(sizes)}, not a whole number")
    return int(total)


def depends(size: Size, name: str) -> bool:
    """Whether `size` changes with `name`."""
    return isinstance(size, Dim) and name in size.names()


def divide(size: Size, by: Size) -> Size | None:
    """`size / by` where that is again a size, else None; `by` is one term."""
    divisor = _terms(by)
    if len(divisor) != 1:
        return 1 if size == by else None
    value, powers = divisor[0][1], dict(divisor[0][0])
    out: list[tuple[Monomial, Fraction]] = []
    for mono, coefficient in _terms(size):
        left = dict(mono)
        for name, power in powers.items():
            left[name] = left.get(name, 0) - power
        if any(p < 0 for p in left.values()):
            return None
        out.append((tuple(sorted((n, p) for n, p in left.items() if p)), coefficient / value))
    result = _build(out)
    return result


def product(sizes: tuple[Size, ...]) -> Size:
    """The number of elements of a shape."""
    out: Size = 1
    for size in sizes:
        out = size * out if isinstance(size, Dim) else out * size
    return out


def _terms(size: Size | Fraction) -> list[tuple[Monomial, Fraction]]:
    if isinstance(size, Dim):
        return list(size.terms)
    return [((), Fraction(size))]


def _times(left: Monomial, right: Monomial) -> Monomial:
    powers = dict(left)
    for name, power in right:
        powers[name] = powers.get(name, 0) + power
    return tuple(sorted(powers.items()))


def _build(terms: list[tuple[Monomial, Fraction]]) -> Size:
    merged: dict[Monomial, Fraction] = {}
    for monomial, value in terms:
        merged[monomial] = merged.get(monomial, Fraction(0)) + value
    kept = {m: v for m, v in merged.items() if v}
    if not kept:
        return 0
    if set(kept) == {()} and kept[()].denominator == 1:
        return int(kept[()])
    return Dim(tuple(sorted(kept.items())))


def _term(monomial: Monomial, value: Fraction) -> str:
    sign = "-" if value < 0 else "+"
    factors = [f"{n}^{p}" if p > 1 else n for n, p in monomial]
    if abs(value.numerator) != 1 or not factors:
        factors.insert(0, str(abs(value.numerator)))
    tail = f"/{value.denominator}" if value.denominator != 1 else ""
    return f"{sign}{'*'.join(factors)}{tail}"


@dataclass(frozen=True)
class Quant:
    """How a quantized array is coded: `x ~ (code - zero) * scale`, scale per group along `axis`.

    bits  2..8;   group  codes per scale along `axis`, 0 = the whole axis;   sym  no zero points;
    scale  dtype of the scales;   axis  the contracted axis, negative;   form  what codes are: `int`, two's
    complement, or one of BITS (`effc.widths`), without zero points and with bits of its own.
    """

    bits: int
    group: int = 0
    sym: bool = True
    scale: str = "f32"
    axis: int = -2
    form: str = "int"

    @property
    def dtype(self) -> str:
        """As it is written: q4, nf4."""
        return f"q{self.bits}" if self.form == "int" else self.form

    def __str__(self) -> str:
        fields = [f"group={self.group}" if self.group else "channel", "sym" if self.sym else "asym"]
        fields += [f"scale={self.scale}"] * (self.scale != "f32")
        fields += [f"axis={self.axis}"] * (self.axis != -2)
        return f"{self.dtype}{{{','.join(fields)}}}"


DType = str | Quant

BYTES: Mapping[str, Fraction] = {
    "f64": Fraction(8), "f32": Fraction(4), "bf16": Fraction(2), "f16": Fraction(2),
    "f8e4m3": Fraction(1), "f8e5m2": Fraction(1), "f8e8m0": Fraction(1),
    "i64": Fraction(8), "i32": Fraction(4), "i16": Fraction(2), "i8": Fraction(1), "i4": Fraction(1, 2),
    "u64": Fraction(8), "u32": Fraction(4), "u16": Fraction(2), "u8": Fraction(1), "u4": Fraction(1, 2),
    "bool": Fraction(1),
}  # fmt: skip
"""Bytes an element takes, by the IR's dtype name."""

NUMPY: Mapping[str, str] = {
    "f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16",
    "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "f8e8m0": "float8_e8m0fnu",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "i4": "int4",
    "u64": "uint64", "u32": "uint32", "u16": "uint16", "u8": "uint8", "u4": "uint4",
    "bool": "bool",
}  # fmt: skip
"""The array library's name for each dtype (ml_dtypes brings what numpy lacks)."""

FROM_NUMPY: Mapping[str, str] = {long: short for short, long in NUMPY.items()}


@dataclass(frozen=True)
class Type:
    """An array's dtype and shape, printed `f32[b,t,576]` or `q4{group=64,sym}[30,576,576]`."""

    dtype: DType
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    __repr__ = __str__

    def size(self) -> Size:
        """Number of elements."""
        return product(self.shape)

    def nbytes(self) -> int:
        """Bytes stored for a constant shape: codes, scales and zero points included."""
        count = evaluate(self.size(), {})
        if isinstance(self.dtype, str):
            return math.ceil(count * BYTES[self.dtype])
        quant, extent, width = self.dtype, evaluate(self.shape[self.dtype.axis], {}), evaluate(self.shape[-1], {})
        groups = count // extent * math.ceil(extent / (quant.group or extent)) if extent else 0
        codes = count // max(width, 1) * row_bytes(width, quant.bits)
        return codes + math.ceil(groups * BYTES[quant.scale]) * (1 if quant.sym else 2)
