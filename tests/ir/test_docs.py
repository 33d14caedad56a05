"""docs/ir.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from effc.ir import parse, verify
from effc.ir.op_docs import table, updated
from effc.ir.ops import OPS

PAGE = Path(__file__).parents[2] / "docs" / "ir.md"


def test_the_op_table_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert page == updated(page), "write it anew: python -m effc.ir.op_docs docs/ir.md"


def test_every_op_is_in_the_table():
    assert [name for name in OPS if f"### `{name}`" not in table()] == []


def test_the_module_on_the_page_is_legal():
    (text,) = re.findall(r"```\n(effc 1\n.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert verify(parse(text, file="docs/ir.md")) == []
