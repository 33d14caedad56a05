"""What a pass is: a frozen dataclass whose fields are its options, spelled `name{field=value}`."""

from __future__ import annotations

import inspect
import json
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from effc.errors import EffcError, check_exists, nearest
from effc.ir.core import Module
from effc.weights import Lazy, Store

if TYPE_CHECKING:
    from effc.passes.context import Context


class Exactness(IntEnum):
    """What a pass may do to the model, best first: a pipeline is as good as its worst pass."""

    EXACT = 0
    DISTRIBUTION_EXACT = 1
    GUARANTEED = 2
    LOSSY = 3

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")

    def meaning(self) -> str:
        """One line for reports and `effc passes`."""
        return _MEANING[self]


_MEANING = {
    Exactness.EXACT: "same logits to f32 rounding",
    Exactness.DISTRIBUTION_EXACT: "same distribution of samples, greedy tokens identical in f32",
    Exactness.GUARANTEED: "differs by no more than a calibrated bound",
    Exactness.LOSSY: "changes logits; measured, not bounded",
}


class Phase(IntEnum):
    """When a pass runs; passes of one phase run as written."""

    CLEAN = 0
    FOLD = 1
    EXITS = 2
    DRAFT = 3
    HEAL = 4
    SMOOTH = 5
    QUANTIZE = 6
    FUSE = 7
    CALIBRATE = 8

    def __str__(self) -> str:
        return self.name.lower()


class PassError(EffcError):
    """What a pass cannot take, or a promise it broke."""


@dataclass
class Notes:
    """What a pass says of its run: choices made, and what it left alone with the reason."""

    choices: list[str] = field(default_factory=list[str])
    skips: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    measured: dict[str, Any] = field(default_factory=dict[str, Any])
    """Numbers for report.json: of a calibration, say."""

    def chose(self, text: str) -> None:
        """A decision the reader should know of."""
        self.choices.append(text)

    def skip(self, what: str, why: str) -> None:
        """Something left as it was, and why."""
        self.skips.append((what, why))


@dataclass(frozen=True)
class Option:
    """A field of a pass as the command line sees it."""

    name: str
    kind: str
    default: Value
    doc: str


Value = bool | int | float | str


def option(default: Any, doc: str, *, file: bool = False) -> Any:
    """A dataclass field with a default and one line for `effc passes`; `file` where it names a file or folder."""
    return field(default=default, metadata={"doc": doc, "file": file})


def check_rate(where: str, lr: float) -> None:
    """PassError where an option is no learning rate; 0 stands for the pass's own."""
    if not 0 <= lr < 1:
        raise PassError(f"{where}: lr is {lr:g}, want 0 (as usual) or more, less than 1")


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of the module (`run`) and of its arrays (`weights`); the runner checks every claim below."""

    name: ClassVar[str]
    phase: ClassVar[Phase]
    exactness: ClassVar[Exactness]
    writes: ClassVar[frozenset[str]]
    """Op kinds it may add, drop or alter, `*` for any; parameters it may always change."""

    @abstractmethod
    def run(self, module: Module, notes: Notes) -> Module:
        """The module after; deterministic, so `weights` can find out again what was done."""

    def requires(self, module: Module) -> None:  # noqa: B027
        """Raise PassError for a module it cannot take."""

    def check_files(self) -> None:
        """EffcError for an option that names a file or folder that is not there: asked before any work."""
        for f in fields(self):
            if f.metadata.get("file") and (path := getattr(self, f.name)):
                check_exists(Path(path), f"{self.name}: {f.name}")

    def weights(self, before: Module, after: Module, store: Store) -> Store:
        """The store of `after`, read through that of `before`: nothing is computed yet."""
        return store.replace(self.made(before, after, store), after)

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        """Arrays for the parameters it made or changed."""
        return []

    def ensures(self, before: Module, after: Module) -> None:  # noqa: B027
        """Raise PassError where a promise was broken."""

    def decided(self, module: Module, store: Store, context: Context) -> Self:
        """The pass as it is to run, where that depends on arrays or text; `run` comes after, where there are both."""
        return self

    def arrays(self, before: Module, after: Module, store: Store, context: Context, notes: Notes) -> Store:
        """`weights`, for a pass that looks at text to make them."""
        return self.weights(before, after, store)

    def reads_text(self) -> bool:
        """Whether `decided` or `arrays` look at --calib."""
        return False

    def training_minutes(self) -> float:
        """How long it trains unless --heal says otherwise; 0 where it trains nothing, and `train` is not called."""
        return 0.0

    def train(self, module: Module, store: Store, context: Context) -> Store:
        """In the phase `heal`, the module as it is then (passes of phases before it have run): trained arrays."""
        return store

    def calibrates(self) -> bool:
        """Whether `calibrate` is to be called."""
        return False

    def calibrate(self, module: Module, store: Store, context: Context, notes: Notes) -> Module:
        """In the phase `calibrate`, last of all: the final module with measured numbers in its attributes."""
        return module

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = [f"{o.name}={spell(given[o.name])}" for o in self.options() if given[o.name] != o.default]
        return f"{self.name}{{{','.join(shown)}}}" if shown else self.name

    @classmethod
    def doc(cls) -> str:
        """The class's docstring on one line."""
        return " ".join((inspect.getdoc(cls) or "").split())

    @classmethod
    def options(cls) -> list[Option]:
        """Its fields: name, type, default and meaning."""
        hints = typing.get_type_hints(cls)
        return [Option(f.name, _kind(hints[f.name]), _default(f), f.metadata.get("doc", "")) for f in fields(cls)]

    @classmethod
    def build(cls, given: Mapping[str, str]) -> Self:
        """The pass with these options as text; EffcError for a misspelt name or a bad value."""
        hints = typing.get_type_hints(cls)
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise EffcError(f"{cls.name}: no option '{name}', want {_listed(known)}{nearest(name, known)}")
        return cls(**{name: _read(cls.name, name, text, hints[name]) for name, text in given.items()})


def spell(value: Value) -> str:
    """A value as the pipeline's grammar reads it back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    bare = not isinstance(value, str) or re.fullmatch(r'[^\s,{}="]+', text)
    return text if bare else json.dumps(text)


def _default(f: Field[Any]) -> Value:
    assert f.default is not MISSING, f"option '{f.name}' has no default"
    return f.default


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    return hint.__name__


def _listed(names: list[str]) -> str:
    return f"one of {', '.join(names)}" if names else "none"


def _read(pass_name: str, name: str, text: str, hint: Any) -> Value:
    """`text` as the field's type."""
    where = f"{pass_name}: {name}={text}"
    if typing.get_origin(hint) is Literal:
        return _choice(where, text, typing.get_args(hint))
    if hint is bool:
        return _choice(where, text, ("true", "false")) == "true"
    try:
        return hint(text)
    except ValueError:
        article = "an" if hint is int else "a"
        raise EffcError(f"{where} is not {article} {hint.__name__}") from None


def _choice(where: str, text: str, choices: tuple[Any, ...]) -> Value:
    by_text = {str(choice): choice for choice in choices}
    if text not in by_text:
        raise EffcError(f"{where}, want {' or '.join(by_text)}{nearest(text, by_text)}")
    return by_text[text]


__all__ = ["Exactness", "Notes", "Option", "Pass", "PassError", "Phase", "Value", "option", "spell"]
