"""Read a model's IR, look something up, change it, and write it as text.

python examples/edit_ir.py examples/stdlib12/model.ckpt > edited.effc
effc optimize examples/stdlib12/model.ckpt --ir edited.effc -o out
"""

import sys
from dataclasses import replace

import effc
from effc.ir import Quant, Type, all_ops


def main(path: str) -> None:
    module = effc.lower(effc.load(path)).module
    linears = [op for _, op in all_ops(module) if op.kind == "linear"]
    print(f"{len(linears)} linears, {len(module.params)} parameters", file=sys.stderr)
    for op in linears:
        param = module.params[op.params["w"]]
        if param.stack:  # those in the repeated block: 8 bits, a scale an output column
            coded = Type(Quant(bits=8), param.type.shape)
            module = module.with_params(replace(param, type=coded))
    text = effc.dump(module)
    assert effc.parse(text) == module
    print(text, end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
