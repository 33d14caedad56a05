"""One run at a time in a folder that it keeps its work in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effc.errors import EffcError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """The folder, made if need be, is this run's; EffcError where it is another's.

    The system lets go of it when the process ends, however that is. Where it has no such locks nothing is checked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EffcError(f"{folder}: another run is at work there, want its end, or another --work") from None
        except OSError:  # a file system without locks
            pass
        yield
