"""Tool use: the model writes a query, a tool answers, the model goes on with the answer; a failed tool rejects.

    python examples/programs/tool_use.py [MODEL]

The model names a module; the tool reads that module's source and lists what it defines, running none of it; the model
chooses what to import among these. So what it writes can be imported, which by itself it often could not.
"""

import ast
import sys
import sysconfig
from pathlib import Path

from effc.programs import LM, forward, program, reject, sample, tool

BUNDLED = Path(__file__).parent.parent / "stdlib12" / "model.ckpt"


def defined_in(module):
    """Public classes and functions of a module of the standard library; LookupError where there is none."""
    folder = Path(sysconfig.get_path("stdlib"))
    file = next((f for f in (folder / f"{module}.py", folder / module / "__init__.py") if f.is_file()), None)
    if not module.isidentifier() or file is None:
        raise LookupError(f"no module '{module}'")
    kinds = (ast.ClassDef, ast.FunctionDef)
    names = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds)]
    return tuple(dict.fromkeys(name for name in names if not name.startswith("_")))[:8]


@program
def imported(lm, prompt, tokens):
    module = yield sample(lm(f"{prompt}\nfrom", stop=" import", max_tokens=tokens), "query")
    names = yield sample(tool(defined_in, module.strip(), rejects=(LookupError,)), "tool")
    if not names:
        yield reject("it defines nothing")
    line = f"from{module} import"
    name = yield sample(lm.choice(f"{prompt}\n{line}", [f" {name}" for name in names]), "name")
    return line + name


def main(model=BUNDLED, n=12, tokens=6):
    lm = LM(model)
    samples = forward(imported(lm, "import os\nimport re", tokens), n)
    for trace in samples:
        print(trace.value or trace.rejected)
    return samples


if __name__ == "__main__":
    main(*sys.argv[1:2])
