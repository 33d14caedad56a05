"""Generate text from Python, streaming and in a batch; takes an artifact or a checkpoint.

python examples/generate.py out "import os"
"""

import sys

import effc


def main(path: str, prompt: str) -> None:
    model = effc.Generator.open(path)
    for piece in model.stream(prompt, max_tokens=32):
        print(piece, end="", flush=True)
    print("\n---")
    for text in model.texts([prompt, "def "], max_tokens=16, temperature=0.8, top_k=40, seed=1):
        print(repr(text))


if __name__ == "__main__":
    main(*sys.argv[1:])
