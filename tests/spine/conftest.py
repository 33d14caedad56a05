"""The fixtures of the pass tests, here too."""

import runpy
from pathlib import Path

_FIXTURES = runpy.run_path(str(Path(__file__).parent.parent / "passes" / "conftest.py"))

tiny, random_store, apply = (_FIXTURES[name] for name in ("tiny", "random_store", "apply"))
