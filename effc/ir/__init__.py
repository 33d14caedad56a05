"""The compiler's intermediate representation: data, text, checks and rewriting. No JAX here."""

from effc.ir.core import (
    NAN,
    Attr,
    Decode,
    Func,
    Loc,
    Module,
    Op,
    Param,
    Ref,
    Value,
    all_ops,
    param_uses,
    walk,
)
from effc.ir.ops import OPS, Along, OpSpec, spec_of
from effc.ir.parser import parse, parse_func, parse_type
from effc.ir.printer import dump
from effc.ir.types import Dim, DType, Quant, Size, Type, name_dim

__all__ = [
    "NAN", "OPS", "Along", "Attr", "DType", "Decode", "Dim", "Func", "Loc", "Module", "Op", "OpSpec",
    "Param", "Quant", "Ref", "Size", "Type", "Value", "all_ops", "dump", "name_dim", "param_uses",
    "parse", "parse_func", "parse_type", "spec_of", "walk",
]  # fmt: skip
