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
from effc.ir.diff import Delta, deltas, diff
from effc.ir.ops import OPS, Along, OpSpec, attribute, spec_of
from effc.ir.parser import parse, parse_func, parse_type
from effc.ir.printer import dump
from effc.ir.types import Dim, DType, Quant, Size, Type, name_dim
from effc.ir.verify import Fault, check, verify, warnings

__all__ = [
    "NAN", "OPS", "Along", "Attr", "DType", "Decode", "Delta", "Dim", "Fault", "Func", "Loc", "Module", "Op",
    "OpSpec", "Param", "Quant", "Ref", "Size", "Type", "Value", "all_ops", "attribute", "check", "deltas",
    "diff", "dump", "name_dim", "param_uses", "parse", "parse_func", "parse_type", "spec_of", "verify",
    "walk", "warnings",
]  # fmt: skip
