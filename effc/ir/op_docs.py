"""The op table as Markdown: `python -m effc.ir.op_docs docs/ir.md` writes it between its markers."""

from __future__ import annotations

import sys
from pathlib import Path

from effc.ir.ops import ELEMENTWISE, OPS, OpSpec

BEGIN = "<!-- op table: python -m effc.ir.op_docs docs/ir.md -->\n"
END = "<!-- end of op table -->\n"


def table() -> str:
    """A section for every op of the transformer level, then the `lax` level."""
    names = ", ".join(f"`{name.removeprefix('lax.')}`" for name in sorted(ELEMENTWISE))
    elementwise = f"**Elementwise `lax` ops** (sizes of 1 stretch, shapes are checked): {names}.\n"
    return "\n".join([*map(_section, OPS.values()), elementwise])


def updated(page: str) -> str:
    """The page with the table of today between the markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _section(spec: OpSpec) -> str:
    """Signature as it is written in a dump, the meaning, and what the op does along the tokens."""
    outside = [f"[{', '.join(f'{name}=@...' for name in spec.params)}]"] if spec.params else []
    outside += [f"{{{', '.join(_attr(*item) for item in spec.attrs.items())}}}"] if spec.attrs else []
    outside += [f"{name}(...) {{ ... }}" for name in spec.regions]
    operands = ", ".join("%" + name for name in spec.inputs)
    line = " ".join([f"{spec.kind}({operands})", *outside])
    return f"### `{spec.kind}`\n\n```\n{line}\n```\n\n{spec.doc}. Tokens: {spec.along.value}.\n"


def _attr(name: str, kind: str) -> str:
    wanted, _, default = kind.partition("=")
    return f"{name}: {wanted}{f' = {default}' if default else ''}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
