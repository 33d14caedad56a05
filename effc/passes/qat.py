"""Weights that learn to be coded: what a fitted quantizer makes is trained on as codes and scales (QAT).

While training, what linears read may be rounded too (`act`), and the gradients that come back to them (`backward`).
The arrays that are stored, and their types, are those of the quantizer it begins with: quant4's, or mixed's (`spend`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from effc.ir.core import Module, Op, Value
from effc.ir.rewrite import names_of, replace_ops
from effc.ir.types import Quant
from effc.passes.act import Act8, readers
from effc.passes.base import Notes, PassError, option
from effc.passes.mixed import Mixed
from effc.passes.quant.options import WeightPass
from effc.passes.quant.spans import Came
from effc.passes.quantizer import as_stored
from effc.passes.weight_rules import Rules
from effc.weights import Arrays, Lazy, Store, parts

if TYPE_CHECKING:
    from effc.passes.context import Context, Model
    from effc.runtime.train.plan import Tree

LOUD = 1e3
"""What the loss is multiplied with: Adam takes gradients near 1e-8 for none."""


@dataclass(frozen=True)
class Qat(WeightPass):
    """Codes as quant4 does, then trains codes, scales and what is not coded to give the input model's distribution."""

    name: ClassVar[str] = "qat"
    width: ClassVar[int] = 4
    writes: ClassVar[frozenset[str]] = frozenset({"*"})

    bits: Literal[4, 2, 3, 5, 6, 7, 8] = option(4, "of a code, where `spend` does not decide")
    spend: float = option(0.0, "begin as mixed{bits=..} does: bits a weight, put where they are missed; 0: alike")
    cut: str = option("", "with spend: as of mixed")
    probe: int = option(1024, "with spend: as of mixed")
    method: Literal["mse", "absmax", "percentile", "gptq", "awq", "awq+gptq"] = option(
        "awq+gptq", "what training begins with, as of quant4"
    )
    minutes: float = option(10.0, "of training, where --heal does not say")
    lr: float = option(0.004, "learning rate, in steps between codes")
    rows: int = option(8, "sequences a batch")
    dense: bool = option(True, "norms and biases learn too")
    stochastic: bool = option(False, "round up or down at random while training, by nearness")
    act: int = option(0, "bits of what linears read, while training; 0 is floats. Serve with act8{bits=..}")
    backward: int = option(0, "bits of the gradients of linears, rounded at random by nearness; 0 is floats")

    def requires(self, module: Module) -> None:
        WeightPass.requires(self, module)
        if self.minutes < 0 or self.lr <= 0 or self.rows < 1:
            told = f"minutes={self.minutes:g}, lr={self.lr:g}, rows={self.rows}"
            raise PassError(f"{self.name}: {told}, want more than nothing of each")
        for name, bits in (("act", self.act), ("backward", self.backward)):
            if bits and not 2 <= bits <= 8:
                raise PassError(f"{self.name}: {name}={bits}, want 0 or 2 to 8")

    def asked(self) -> Rules:
        return replace(WeightPass.asked(self), bits=self.bits)

    def reads_text(self) -> bool:
        return True

    def _mixed(self) -> Mixed:
        """What decides the bits, where `spend` asks for that."""
        shared = {f.name: getattr(self, f.name) for f in (*fields(WeightPass), *fields(Mixed)) if f.name != "bits"}
        return Mixed(bits=self.spend, **shared)

    def run(self, module: Module, notes: Notes) -> Module:
        return self._mixed().run(module, notes) if self.spend else WeightPass.run(self, module, notes)

    def prepared(self, before: Module, store: Store) -> tuple[Module, Store, Came]:
        return self._mixed().prepared(before, store) if self.spend else WeightPass.prepared(self, before, store)

    def decided(self, module: Module, store: Store, context: Context) -> Self:
        if not self.spend:
            return self
        self.requires(module)
        found = self._mixed().decided(module, store, context)
        return replace(self, cut=found.cut, rules=found.rules)

    def training_minutes(self) -> float:
        return self.minutes

    def arrays(self, before: Module, after: Module, store: Store, context: Context, notes: Notes) -> Store:
        coded = WeightPass.arrays(self, before, after, store, context, notes)
        if before == after or not context.budget:
            return coded
        return self._trained(after, coded, context)

    def _trained(self, module: Module, store: Store, context: Context) -> Store:
        """Codes, scales and dense arrays after the budget."""
        from effc.runtime.train import Plan, fake  # optax, for who trains

        model, teacher = context.model(observed(module, self.act, self.backward), store), context.teacher
        told, look = fake.forms(model.params), context.looks(model.program)
        fitted = context.fit(
            self._loss(model, teacher, told),
            {"student": fake.loose(model.params), "teacher": teacher.params},
            context.batches_beside(self.rows),
            Plan(context.budget, lr=self.lr, clip=0.0, seed=context.seed),
            trainable={"student": fake.trainable(told, self.dense), "teacher": False},
            evaluate=lambda tree: look(fake.faked(told, tree["student"])),
            tag=str(self),
            title=f"{self.name}: {self.bits} bits",
        )
        return store.replace(_arrays(model, told, fitted.params["student"]), module)

    def _loss(self, model: Model, teacher: Model, told: Tree) -> Any:
        from effc.runtime.train import fake, forward_kl, mean

        def loss(tree: Any, batch: Mapping[str, Any], tick: Any) -> tuple[Any, dict[str, Any]]:
            ids = batch["tokens"][:, :-1]
            student = fake.faked(told, tree["student"], tick.key if self.stochastic else None)
            wanted, said = teacher.program.forward(tree["teacher"], ids), model.program.forward(student, ids)
            apart = mean(forward_kl(wanted, said), batch["mask"])
            return LOUD * apart, {"count": batch["mask"].sum(), "kl": apart}

        return loss


def observed(module: Module, act: int, backward: int) -> Module:
    """What is trained: with what linears read rounded, and the gradients of what they give."""
    wanted = readers(module)
    if act:
        module = Act8(bits=act).run(module, Notes())
    for func in list(module.funcs.values()) if backward else ():
        fresh = names_of(func)

        def one(op: Op, fresh: Any = fresh) -> list[Op] | None:
            if op.kind != "linear" or op.params["w"] not in wanted:
                return None
            made = Value(fresh.fresh(f"{op.out.name}_g"), op.out.type)
            attrs = {"bits": backward, "of": "gradient"}
            return [replace(op, outputs=(made,)), Op("fake_quant", (made.name,), (op.out,), {}, attrs, {}, op.loc)]

        module = module.with_func(replace_ops(func, one))
    return module


def _arrays(model: Model, told: Tree, params: Tree) -> list[Lazy]:
    """Every array of the model as trained, in the types of its module."""
    import jax

    from effc.runtime.train import fake, places

    names: dict[str, list[Any]] = {}
    own = jax.tree.map(lambda leaf, form, value: (leaf.name, form, value), places(model.program.params), told, params)
    for name, form, value in jax.tree.leaves(own, is_leaf=lambda x: isinstance(x, tuple)):
        kept = value if isinstance(form, fake.Dense) else _host(form, value)
        names.setdefault(name, []).append(kept)
    return [_lazy(model.module, name, arrays) for name, arrays in names.items() if _floats(arrays[0])]


def _host(form: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    """Codes, scales and zeros as numpy arrays."""
    from effc.runtime.train import fake

    zeros = {"zeros": np.asarray(value["zero"])} if "zero" in value else {}
    codes, scales = fake.codes(form, value), fake.scales(form, value)
    return {"codes": np.asarray(codes).astype(np.int8), "scales": np.asarray(scales), **zeros}


def _floats(array: Any) -> bool:
    return isinstance(array, dict) or array.dtype.kind == "f" or str(array.dtype) == "bfloat16"


def _lazy(module: Module, name: str, arrays: list[Any]) -> Lazy:
    param = module.params[name]
    quant = param.type.dtype

    def read(layer: int) -> Arrays:
        here = arrays[layer]
        if not isinstance(quant, Quant):
            return {"": np.asarray(here).astype(parts(param.type)[""].dtype)}
        return as_stored(here["codes"], here["scales"], here.get("zeros"), quant)

    return Lazy(param, read)
