"""Rules by hand: `*.down:8;@head:4/64;layers.attn.*:4/32a;embed*:keep`, the first that fits a parameter wins.

Left of the colon a glob of names, or `@linear`, `@embed`, `@head`: what reads the parameter. Right of it `keep`, or
bits or a format (nf4, fp8e4m3, fp8e5m2, mxfp4, mxfp8), after a slash the group (0: a whole channel), and at the end
`a` (zero points) or `s` (none). What a rule does not say is as the pass's options have it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from effc.errors import nearest
from effc.passes.base import PassError

_FORM = re.compile(r"(?P<bits>[2-8]|nf4|mxfp4|mxfp8|fp8e4m3|fp8e5m2)(?:/(?P<group>\d+))?(?P<sym>[as])?")

KINDS = ("@linear", "@embed", "@head")


@dataclass(frozen=True)
class Format:
    """What codes are, and what comes with it: the dtype of scales, the group where none is asked for."""

    form: str
    bits: int
    scale: str = ""
    group: int = -1


FORMATS: Mapping[str, Format] = {
    "nf4": Format("nf4", 4),
    "fp8e4m3": Format("fp8e4m3", 8),
    "fp8e5m2": Format("fp8e5m2", 8),
    "mxfp4": Format("fp4e2m1", 4, "f8e8m0", 32),
    "mxfp8": Format("fp8e4m3", 8, "f8e8m0", 32),
}
"""Formats that are no whole numbers, by the name rules have for them."""


@dataclass(frozen=True)
class Rule:
    """What fits `pattern` gets `bits` (0: is kept); None is what the options say."""

    text: str
    pattern: str
    bits: int
    group: int | None = None
    sym: bool | None = None
    form: str = "int"

    def fits(self, name: str, kinds: Collection[str]) -> bool:
        """Whether it speaks of a parameter that ops of these kinds read."""
        return self.pattern in kinds if self.pattern.startswith("@") else fnmatch.fnmatchcase(name, self.pattern)


def parse_rules(where: str, text: str) -> tuple[Rule, ...]:
    """The rules in order; PassError for what is none."""
    return tuple(_parse(where, item.strip()) for item in text.split(";") if item.strip())


def _parse(where: str, text: str) -> Rule:
    pattern, _, form = text.rpartition(":")
    if pattern.startswith("@") and pattern not in KINDS:
        raise PassError(f"{where}: '{text}' speaks of '{pattern}', want {', '.join(KINDS)}{nearest(pattern, KINDS)}")
    if pattern and form == "keep":
        return Rule(text, pattern, 0)
    found = _FORM.fullmatch(form)
    if not pattern or not found or found["group"] == "1":
        raise PassError(f"{where}: '{text}' is no rule, want the like of layers.mlp.*:8, @head:4/64 or embed:keep")
    group, sym = int(found["group"]) if found["group"] else None, {"a": False, "s": True}.get(found["sym"])
    if found["bits"].isdecimal():
        return Rule(text, pattern, int(found["bits"]), group, sym)
    if sym is False:
        raise PassError(f"{where}: '{text}': {found['bits']} has no zero points, want bits (2 to 8) with them")
    return Rule(text, pattern, FORMATS[found["bits"]].bits, group, True, found["bits"])


def first(rules: Sequence[Rule], name: str, kinds: Collection[str]) -> Rule | None:
    """The rule for a parameter."""
    return next((rule for rule in rules if rule.fits(name, kinds)), None)


def check_used(where: str, rules: Sequence[Rule], used: Collection[Rule], names: Sequence[str]) -> None:
    """PassError for a rule that decides nothing."""
    for rule in rules:
        if rule not in used:
            hidden = any(fnmatch.fnmatchcase(name, rule.pattern) for name in names)
            why = "only what cannot be coded or has an earlier rule" if hidden else f"none of {len(names)} names"
            raise PassError(f"{where}: '{rule.text}' matches {why}{'' if hidden else nearest(rule.pattern, names)}")
