"""A drafter that is a model of its own: another checkpoint or artifact, or a 4-bit copy of the target."""

from __future__ import annotations

import json
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from effc.ir.core import Decode, Module, Ref, walk
from effc.passes.base import Notes, PassError
from effc.passes.draft.parts import PREFIX, lazily, renamed
from effc.passes.quant4 import Quant4
from effc.weights import Lazy, Store

if TYPE_CHECKING:
    from effc.frontend.tokenizer import Tokenizer

PADDED = 0.05
"""Share of a vocabulary that may be padding: tables are rounded up to a multiple."""


@cache
def opened(path: Path) -> tuple[Module, Store]:
    """A model wherever it is, as it is or lowered; no array is read."""
    from effc.artifact import Artifact, is_artifact  # these import the passes
    from effc.frontend.checkpoints import open_checkpoint
    from effc.frontend.lowering import lower

    if is_artifact(path):
        found = Artifact.load(path)
        return _alone(found.module), found.store
    lowered = lower(open_checkpoint(path))
    return _alone(lowered.module), lowered.store


def int4(module: Module, store: Store | None) -> tuple[Module, Store]:
    """The model itself with 4-bit weights; arrays where a store is given."""
    coder, alone = Quant4(), _alone(module)
    after = coder.run(alone, Notes())
    return after, coder.weights(alone, after, store) if store else Store({})


def attached(module: Module, other: Module, name: str = "draft") -> Module:
    """With the other model beside as @draft; PassError where it cannot have the same vocabulary."""
    mine, its = _vocab(module), _vocab(other)
    if abs(mine - its) > PADDED * max(mine, its):
        raise PassError(f"{name}: @{other.name} has logits of {its} tokens, want {mine} as @{module.name}")
    params, funcs = renamed(other)
    taken = sorted({*params, *funcs} & {*module.params, *module.funcs})
    if taken:
        raise PassError(f"{name}: @{taken[0]} is there already, want a model without a drafter")
    return Module(module.name, module.meta, {**module.params, **params}, {**module.funcs, **funcs}, module.decode)


def arrays(other: Module, after: Module, store: Store) -> list[Lazy]:
    """The other model's arrays under their new names."""
    return [lazily(after.params[f"{PREFIX}.{name}"], store[name]) for name in other.params]


def check_tokens(mine: Tokenizer | None, path: Path, vocab: int, name: str = "draft") -> None:
    """PassError naming the first token that differs; what either pads its table with is no token."""
    its = tokenizer_of(path)
    if mine is None or its is None:
        who = "the model" if mine is None else str(path)
        raise PassError(f"{name}: {who} has no tokenizer, so nobody can tell whether tokens mean the same")
    for number, (a, b) in enumerate(zip_longest(_tokens(mine, vocab), _tokens(its, vocab))):
        if a != b:
            raise PassError(
                f"{name}: token {number} is {_shown(a)} here and {_shown(b)} in {path}, want one vocabulary"
            )


def tokenizer_of(path: Path) -> Tokenizer | None:
    """The one that came with a checkpoint or artifact."""
    from effc.artifact import Artifact, is_artifact
    from effc.frontend.checkpoints import open_checkpoint
    from effc.frontend.tokenizer import Tokenizer

    files = Artifact.load(path).tokenizer if is_artifact(path) else open_checkpoint(path).tokenizer
    return Tokenizer(files, str(path)) if files else None


def _tokens(tokenizer: Tokenizer, vocab: int) -> list[str | None]:
    """Token strings by number, without what lies past the last token there is."""
    out = [tokenizer.rust.id_to_token(number) for number in range(vocab)]
    while out and out[-1] is None:
        out.pop()
    return out


def _shown(token: str | None) -> str:
    return "none" if token is None else json.dumps(token, ensure_ascii=False)


def _alone(module: Module) -> Module:
    """What the forward function reaches."""
    todo, funcs = [module.forward().name], dict[str, None]()
    while todo:
        name = todo.pop()
        if name not in funcs and name in module.funcs:
            funcs[name] = None
            todo += [v.name for op in walk(module.funcs[name]) for v in op.attrs.values() if isinstance(v, Ref)]
    read = {n for name in funcs for op in walk(module.funcs[name]) for n in op.params.values()}
    return Module(
        module.name, module.meta, {n: p for n, p in module.params.items() if n in read},
        {n: f for n, f in module.funcs.items() if n in funcs},
        Decode("greedy", {"forward": Ref(module.forward().name)}),
    )  # fmt: skip


def _vocab(module: Module) -> int:
    size = module.forward().result_types()[0].shape[-1]
    assert isinstance(size, int)
    return size
