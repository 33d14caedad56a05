"""`quant4{group=64},fuse` <-> passes: grammar, phases, which passes go together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import combinations

from lark import Lark, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from effc.errors import EffcError, nearest
from effc.passes import PASSES
from effc.passes.base import Exactness, Pass, Phase
from effc.passes.draft import Draft
from effc.passes.mor import Mor

_TWICE = "both code the same weights; keep one, e.g. quant4{rules=*.down:8} or mixed{bits=5} for a mix of widths"

_EXITS = (
    "both say how tokens are decoded; keep one: calm leaves layers out within a bound, a cascade asks a smaller model "
    "within one"
)

_DRAFTS: Mapping[str, str] = {
    "speccascade": "speccascade has a drafter of its own; keep one: speccascade{kind=head} or {model=PATH} for what "
    "draft{kind=...} would attach; lookup has no probabilities that a rule could weigh",
    "cascade": "both say which small model speaks; keep one: cascade{model=PATH} for its own text, draft{kind=model} "
    "for the large model's; drafts by lookup have no probabilities to be sure of",
}

_EXITS_DRAFT = "both say what drafts; write draft{kind=exits} for drafts by exits, or leave calm out"

CONFLICTS: Mapping[frozenset[str], str] = {
    **{frozenset(pair): _TWICE for pair in combinations(("quant4", "quant8", "mixed", "qat"), 2)},
    frozenset({"kv8", "kv4"}): "both say how keys and values are kept; keep one",
    **{frozenset({"calm", name}): _EXITS for name in ("speccascade", "cascade")},
    **{frozenset({"draft", name}): mend for name, mend in _DRAFTS.items()},
    frozenset(
        {"speccascade", "cascade"}
    ): "both put a small model before the large one; keep one: speccascade asks the "
    "large one of every token, cascade only where the small one is unsure",
}
"""Pairs that cannot run in one pipeline, and what to write instead. Every other pair is legal and tested."""

ROUTED: Mapping[str, str] = {
    "calm": "both say at which depth a token stops; write mor{router=none}: exits between recursions decide it",
    "speccascade": "drafts that are refused cannot be taken back out of a depth's own keys; write mor{router=none}",
    "cascade": "what a small model says cannot be read again out of a depth's own keys; write mor{router=none}",
    "draft": "drafts that are refused cannot be taken back out of a depth's own keys; write mor{router=none}",
}
"""What does not go with tokens that are routed, and what to write instead."""

WHY: Mapping[Phase, str] = {
    Phase.CLEAN: "before others look for what they know",
    Phase.FOLD: "says which arrays there are: what learns from them or counts them comes after",
    Phase.EXITS: "on the layers as folded",
    Phase.DRAFT: "a drafter imitates the model as it will be",
    Phase.HEAL: "training needs floats, and all that is to be trained",
    Phase.SMOOTH: "moves outliers before they are rounded",
    Phase.QUANTIZE: "shared arrays are coded once, after they have learned",
    Phase.FUSE: "joins arrays of one coding",
    Phase.CALIBRATE: "measured on the weights as they are served",
}
"""Why a phase stands where it stands."""


@dataclass(frozen=True)
class Pipeline:
    """Passes as written; `ordered` is how they run."""

    passes: tuple[Pass, ...] = ()

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    @staticmethod
    def parse(text: str) -> Pipeline:
        """Passes from their spelling; EffcError for what is unknown, misspelt or does not go together."""
        pipeline = Pipeline(tuple(_build(name, options) for name, options in _items(text)))
        _check(pipeline.passes)
        return pipeline

    def ordered(self) -> tuple[Pass, ...]:
        """In the order of their phases; as written within a phase."""
        return tuple(sorted(self.passes, key=lambda p: p.phase))

    def order_note(self) -> str:
        """What to tell the user where the order written is not the order run, else nothing."""
        ordered = self.ordered()
        if ordered == self.passes:
            return ""
        shown = " -> ".join(f"{p.name} ({p.phase})" for p in ordered)
        return f"passes run by phase, not as written: {shown}"

    def phases(self, heals: bool, calibrates: bool) -> list[str]:
        """A line a phase that something is done in: who, and why there."""
        own = {phase: [str(p) for p in self.passes if p.phase == phase] for phase in Phase}
        own[Phase.HEAL] += ["training"] * heals
        own[Phase.CALIBRATE] += ["calibration"] * calibrates
        return [f"{phase}: {', '.join(names)}: {WHY[phase]}" for phase, names in own.items() if names]

    def exactness(self) -> Exactness:
        """That of its worst pass."""
        return max((p.exactness for p in self.passes), default=Exactness.EXACT)


def _build(name: str, options: list[tuple[str, str]]) -> Pass:
    if name not in PASSES:
        raise EffcError(f"--passes: no pass '{name}', want some of {', '.join(PASSES)}{nearest(name, PASSES)}")
    twice = [key for key, count in Counter(key for key, _ in options).items() if count > 1]
    if twice:
        raise EffcError(f"{name}: option '{twice[0]}' is given twice, want it once")
    return PASSES[name].build(dict(options))


def _check(passes: tuple[Pass, ...]) -> None:
    names = [p.name for p in passes]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise EffcError(f"--passes: '{twice[0]}' is there {names.count(twice[0])} times, want it once")
    for pair, mend in CONFLICTS.items():
        if pair <= set(names):
            first, second = sorted(pair, key=names.index)
            raise EffcError(f"--passes: '{first}' and '{second}' do not go together: {mend}")
    for other in (p for p in passes if isinstance(p, Draft) and p.kind not in ("lookup", "exits")):
        if "calm" in names:
            raise EffcError(f"--passes: 'calm' and '{other}' do not go together: {_EXITS_DRAFT}")
    for routed in (p for p in passes if isinstance(p, Mor) and p.router != "none"):
        for name in (name for name in ROUTED if name in names):
            raise EffcError(f"--passes: '{routed}' and '{name}' do not go together: {ROUTED[name]}")


class _Read(Transformer):  # type: ignore[type-arg]
    """Parse tree -> [(pass name, [(option, text)])]."""

    def pipeline(
        self, items: list[tuple[str, list[tuple[str, str]]] | None]
    ) -> list[tuple[str, list[tuple[str, str]]]]:
        return [item for item in items if item]

    def item(self, parts: list) -> tuple[str, list[tuple[str, str]]]:  # type: ignore[type-arg]
        return str(parts[0]), [part for part in parts[1:] if part]

    def option(self, parts: list) -> tuple[str, str]:  # type: ignore[type-arg]
        return str(parts[0]), parts[1]

    def quoted(self, parts: list[str]) -> str:
        return json.loads(parts[0])

    def bare(self, parts: list[str]) -> str:
        return str(parts[0])


@cache
def _parser() -> Lark:
    text = resources.files("effc").joinpath("pipeline.lark").read_text()
    return Lark(text, parser="lalr", maybe_placeholders=False)


def _items(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    try:
        return _Read().transform(_parser().parse(text))
    except UnexpectedInput as error:
        raise EffcError(_message(text, error)) from None


_WORDS = {
    "COMMA": "','", "LBRACE": "'{'", "RBRACE": "'}'", "EQUAL": "'='", "NAME": "a name", "BARE": "a value",
    "STRING": "a quoted value", "$END": "the end",
}  # fmt: skip


def _message(text: str, error: UnexpectedInput) -> str:
    """Place, what was wanted, and the text with a caret."""
    column = len(text) + 1 if error.column in (None, -1) or _at_end(error) else error.column
    wanted: set[str] = set()
    if isinstance(error, UnexpectedToken):
        wanted = error.accepts or error.expected
    if isinstance(error, UnexpectedCharacters):
        wanted = error.allowed or set()
    words = " or ".join(sorted(_WORDS.get(name, name) for name in wanted - {"STRING"}))
    what = "unexpected end" if _at_end(error) else "unexpected text"
    return f"--passes:1:{column}: {what}, want {words}\n  {text}\n  {' ' * (column - 1)}^"


def _at_end(error: UnexpectedInput) -> bool:
    return isinstance(error, UnexpectedToken) and error.token.type == "$END"
