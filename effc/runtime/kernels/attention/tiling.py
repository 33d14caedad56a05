"""How many keys a step of the attention kernel takes, by a cost model of its static schedule on each generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

SUBLANES, LANES = 8, 128

BYTES_A_CYCLE = {"v4": 1170, "v5e": 546, "v5p": 1580, "v6e": 937, "tpu7x": 1942}
"""From HBM."""

ROOM = 24 * 2**20
"""Bytes of VMEM that blocks, each there twice, and what is computed of them may take."""

FIXED = 950
"""Cycles of a step that do not depend on its keys: the pipeline's, and one chain through all phases."""

EDGES = 350
"""Cycles that a sequence's first step and its last take more."""

PUSHED = {"int8": 0.65e-3, "bf16": 1.3e-3, "f32": 5e-3}
"""Cycles for each element of keys, its value included: mostly the matrix unit being loaded."""

REGISTER = 7.8
"""Cycles for each register of scores."""

SLACK = 0.55
"""Share of HBM's time that a step's schedule, which leaves waits out, should stay below."""


@dataclass(frozen=True)
class Form:
    """What is compiled: g key/value heads, R rows (queries times query heads) of each, keys a step, steps."""

    heads: int
    rows: int
    width: int
    keys: int
    block: int
    kind: str  # int8, bf16 or f32
    wide: bool  # queries are f32
    scale: float
    window: int
    softcap: float

    @property
    def pack(self) -> int:
        """Heads that share registers."""
        return max(p for p in range(1, self.heads + 1) if self.heads % p == 0 and (p == 1 or p * self.rows <= SUBLANES))

    @property
    def tall(self) -> int:
        """Rows of a pack, whole registers."""
        return -(-self.pack * self.rows // SUBLANES) * SUBLANES

    @property
    def packs(self) -> int:
        return self.heads // self.pack

    @property
    def digits(self) -> int:
        """Parts that a number of queries or weights has."""
        return 2 if self.kind == "int8" or (self.kind == "bf16" and self.wide) else 1

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the cache."""
        return {"int8": 1, "bf16": 2, "f32": 4}[self.kind]

    @property
    def dtype(self) -> jnp.dtype:
        """Of operands of products."""
        return jnp.dtype({"int8": jnp.int8, "bf16": jnp.bfloat16, "f32": jnp.float32}[self.kind])

    @property
    def ragged(self) -> bool:
        """Whether the last block is not full."""
        return self.keys % self.block != 0


def step_bytes(form: Form) -> int:
    """That a step reads from HBM."""
    return 2 * form.heads * form.block * (form.width * form.itemsize + (4 if form.kind == "int8" else 0))


def cycles(form: Form) -> float:
    """Of a step, about: measured for 1 to 64 rows a head and 512 to 2048 keys of 8 heads, v5e and v6e alike."""
    registers = form.packs * form.tall // SUBLANES * -(-form.block // LANES)
    return FIXED + max(PUSHED[form.kind] * form.block * form.heads * form.width, REGISTER * registers)


def vmem(form: Form) -> int:
    """Bytes of blocks, double, and of scores and weights, in f32, and their digits."""
    scores = form.packs * form.tall * form.block
    return 2 * step_bytes(form) + scores * (4 + 4 + 2 * form.digits)


def block_of(form: Form, batch: int, generation: str) -> int:
    """Keys of a step: the first fill and all steps of a full cache take the least time."""
    sizes = [LANES << n for n in range(8)]
    made = [replace(form, block=size) for size in sizes if size < form.keys] + [replace(form, block=form.keys)]
    fitting = [one for one in made if vmem(one) <= ROOM] or made[:1]
    good = [one for one in fitting if _share(one, generation) <= SLACK] or fitting
    return min(good, key=lambda one: _time(one, batch, generation)).block


def _share(form: Form, generation: str) -> float:
    """Of HBM's time that schedules take, a sequence's first and last steps among them."""
    each = cycles(form) + EDGES / -(-form.keys // form.block)
    return each * BYTES_A_CYCLE[generation] / step_bytes(form)


def _time(form: Form, batch: int, generation: str) -> float:
    read = step_bytes(form) / BYTES_A_CYCLE[generation]
    return read + batch * -(-form.keys // form.block) * max(read, cycles(form) / SLACK)
