"""IR to a Python program a person would write: one function a block, the layer loop, the calls."""

from __future__ import annotations

import linecache
import textwrap
from typing import Any

import libcst as cst

from effc.backend import syntax
from effc.backend.function import LAYERS, RESERVED, Body, Statements, signature
from effc.backend.heads import parted
from effc.backend.plan import Plan, entries, reached
from effc.backend.syntax import Names
from effc.ir.core import Func, Module, Ref
from effc.runtime.program import Program


def emit(module: Module, *, version: str = "", pipeline: str = "") -> str:
    """The source of `program.py`; version and pipeline go in its docstring. EffcError for an unknown op."""
    source = _Emitter(module, version, pipeline).source()
    compile(source, "program.py", "exec")
    return source


def load_program(source: str) -> Program:
    """The program that emitted source defines. Runs it: never give it text from an artifact."""
    title = f"<effc program {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[title] = (len(source), None, source.splitlines(True), title)
    space: dict[str, Any] = {"__name__": "effc_program", "__file__": title}
    exec(compile(source, title, "exec"), space)
    names = ("ENTRIES", "DECODE")
    return Program(space["extend"], space["PARAMS"], space.get("CONTEXT"), *(space.get(name, {}) for name in names))


class _Emitter:
    """Source of one module: blocks in the order they are met, then `extend` and `forward`."""

    def __init__(self, module: Module, version: str, pipeline: str):
        self.module, self.version, self.pipeline = parted(module), version, pipeline
        self.plan, self.titles = Plan(self.module), Names(RESERVED)
        self.entries: dict[str, str] = {}  # function of the module -> its name in the program

    def source(self) -> str:
        main, others = self.module.forward(), entries(self.module)
        blocks = {block.name: block for func in [main, *others] for block in reached(self.module, func)}
        bodies = [Body(self.plan, f, self.plan.block(f, self.titles.new(f.name))).block() for f in blocks.values()]
        extend = Body(self.plan, main, None).extend()
        more = [Body(self.plan, func, None).extend(self._entry(func)) for func in others]
        forward = syntax.statements(_FORWARD.format(tokens=extend.params.params[1].name.value))[0]
        main_parts = [syntax.statements(text)[0] for text in (*self._table(), self._main(), _START)]
        functions = [*bodies, extend, *more, forward, *main_parts]
        body = [*self._head(), *(syntax.spaced(part, 2) for part in functions)]
        return cst.Module(body).code

    def _entry(self, func: Func) -> str:
        self.entries[func.name] = self.titles.new(func.name)
        return self.entries[func.name]

    def _main(self) -> str:
        """`main`, which gives `run` what the program has."""
        decode = ", DECODE" if self._strategy() else ""
        more = f", {'ENTRIES' if self.entries else 'None'}{decode}" if self.entries or decode else ""
        return _MAIN.format(more=more)

    def _strategy(self) -> list[str]:
        """`DECODE`, where decoding is more than taking one token after another."""
        decode = self.module.decode
        if decode is None or decode.strategy == "greedy":
            return []
        attrs = {name: value.name if isinstance(value, Ref) else value for name, value in decode.attrs.items()}
        pairs = {"strategy": decode.strategy, **attrs}
        lines = [f"    {_quoted(name)}: {syntax.code(syntax.literal(value))}," for name, value in pairs.items()]
        return ["\n".join(["DECODE = {", *lines, "}"]) + "\n"]

    def _table(self) -> list[str]:
        """`ENTRIES`, where `decode` names functions beside the forward one."""
        pairs = ", ".join(f"{_quoted(name)}: {title}" for name, title in self.entries.items())
        return [f"\nENTRIES = {{{pairs}}}  # functions that decoding calls beside extend\n"] if pairs else []

    def _head(self) -> Statements:
        meta, forward = self.module.meta, self.module.forward()
        source = f", from {meta['source']}" if "source" in meta else ""
        doc = [f"{self.module.name}{source}: written by {f'effc {self.version}'.strip()}."]
        doc += ["", f"Passes: {self.pipeline}."] if self.pipeline else []
        doc += ["", *textwrap.wrap(_TELLS.format(types=signature(forward)).strip(), syntax.WIDTH)]
        imports = syntax.statements(self._imports())
        return [syntax.docstring(doc), syntax.spaced(imports[0], 1), *imports[1:], *self._constants()]

    def _imports(self) -> str:
        used = self.plan.used
        layers = sorted(used & {*LAYERS, "top", "normed"})
        lines = ["import jax"] * ("jax" in used) + ["import jax.numpy as jnp"] * ("jnp" in used)
        lines += ["from jax import lax"] * ("lax" in used) + [""] * bool(lines or "lax" in used)
        lines += ["from effc.runtime import primitives as ops"] * ("ops" in used)
        lines += ["from effc.runtime.cache import Step"]
        lines += ["from effc.runtime.exits import Stack, early"] * ("early" in used)
        lines += [f"from effc.runtime.layers import {', '.join(layers)}"] * bool(layers)
        lines += ["from effc.runtime.primitives import LAX"] * ("LAX" in used)
        lines += ["from effc.runtime.program import run"]
        lines += ["from effc.runtime.recursion import recurse"] * ("recurse" in used)
        looking = sorted(used & {"window", "running", "recur"})
        lines += [f"from effc.runtime.window import {', '.join(looking)}"] * bool(looking)
        return "\n".join(lines) + "\n"

    def _constants(self) -> Statements:
        context = f"CONTEXT = {self.module.meta.get('context')!r}  # tokens a sequence may hold"
        texts = (self._params_table(), context, *self._strategy())
        return [syntax.spaced(syntax.statements(text)[0], 1) for text in texts]

    def _params_table(self) -> str:
        """`PARAMS`: a line a parameter; nested groups are lists of one such dict a layer."""
        groups: dict[str, list[str]] = {}
        for name, param in self.module.params.items():
            group, key = self.plan.place(name)
            stored = f"{group}.{key}" if group else key
            elsewhere = f" = {name}" if stored != name else ""
            count = f"{param.stack} * " if param.stack else ""
            groups.setdefault(group, []).append(f"{_quoted(key)}: {_quoted(f'{count}{param.type}{elsewhere}')},")
        lines = [f"    {entry}" for entry in groups.pop("", [])]
        for group, lines_of in groups.items():
            lines += [f"    {_quoted(group)}: {{", *(f"        {entry}" for entry in lines_of), "    },"]
        return "\n".join(["PARAMS = {", *lines, "}"]) + "\n"


_TELLS = """
`forward(params, tokens)` is the whole model, {types}. `extend` is the same with a cache of
keys and values: it takes the next t tokens of each sequence, so it serves prefill, decoding a token
and verifying several. `params` are the arrays of `PARAMS`, stacked ones as a list of layers.
"""

_FORWARD = '''
def forward(params, {tokens}):
    """Logits of every token, from the start of each sequence."""
    return extend(params, {tokens})[0]
'''

_MAIN = '''
def main():
    """Continue a prompt: python program.py [--help]."""
    run(__file__, extend, PARAMS, CONTEXT{more})
'''

_START = """
if __name__ == "__main__":
    main()
"""


def _quoted(text: str) -> str:
    return syntax.string(text).value
