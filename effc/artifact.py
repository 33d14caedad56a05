"""The output folder: written beside its place and renamed; loading it runs nothing; checked by hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from effc import certificate
from effc.errors import EffcError, nearest
from effc.evaluate import recognise
from effc.frontend.source import TokenizerFiles
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.verify import verify as faults_of
from effc.weights import Store, open_safetensors

FORMAT = 1
MANIFEST, MODEL, WEIGHTS, PROGRAM = "manifest.json", "model.effc", "model.safetensors", "program.py"
REPORT, PAGE, TOKENIZER = "report.json", "report.html", "tokenizer.json"


@dataclass(frozen=True)
class Artifact:
    """What `Artifact.load` found in a folder; no array is read yet."""

    path: Path
    module: Module
    store: Store
    tokenizer: TokenizerFiles | None
    manifest: Mapping[str, Any]

    @staticmethod
    def load(path: Path) -> Artifact:
        """EffcError for what is missing, damaged or of a newer format."""
        manifest = read_manifest(path)
        module = read_module(path / MODEL)
        store = open_safetensors(path / WEIGHTS, module)
        certificate.check(module, store, str(path))
        return Artifact(path, module, store, _read_tokenizer(path, manifest), manifest)

    def report(self) -> dict[str, Any]:
        """The numbers measured when it was made."""
        return _read_json(self.path / REPORT)


def is_artifact(path: Path) -> bool:
    """Whether the folder is one that effc wrote."""
    return (path / MANIFEST).is_file() and (path / MODEL).is_file()


def effc_version() -> str:
    """Of the installed distribution."""
    try:
        return version("effc")
    except PackageNotFoundError:
        return "not installed"


# ---- in


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, of a format this version reads."""
    if not path.is_dir():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise EffcError(f"{path}: no such folder, want an artifact made by effc optimize{near}")
    if not (path / MANIFEST).is_file():
        raise EffcError(f"{path}: no {MANIFEST}, want an artifact made by effc optimize")
    manifest = _read_json(path / MANIFEST)
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise EffcError(f"{path}: format {manifest.get('format')}, want {FORMAT}: made by a newer effc")
    return manifest


def read_module(path: Path) -> Module:
    """A legal module from an IR file."""
    try:
        module = parse(path.read_text(), file=str(path))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise EffcError(f"{path}: {why}, want an IR file") from None
    faults = faults_of(module)
    if faults:
        raise EffcError("\n".join([f"{path}: {len(faults)} faults", *map(str, faults)]))
    return module


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EffcError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise EffcError(f"{path}: want a JSON object")
    return data


def _read_tokenizer(path: Path, manifest: Mapping[str, Any]) -> TokenizerFiles | None:
    names = [str(name) for name in manifest.get("tokenizer", [])]
    missing = next((name for name in names if not (path / name).is_file()), None)
    if missing:
        raise EffcError(f"{path}: no {missing}, which {MANIFEST} lists")
    if TOKENIZER not in names:
        return None
    extra = {name: (path / name).read_bytes() for name in names if name != TOKENIZER}
    return TokenizerFiles((path / TOKENIZER).read_bytes(), extra)


# ---- out


def check_free(out: Path, force: bool) -> None:
    """EffcError where `out` may not be written: it is asked before any work is done."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise EffcError(f"{out}: is there already, want a new folder (--force replaces an artifact)")
        if not is_artifact(out):
            raise EffcError(f"{out}: is not an artifact of effc, and --force replaces nothing else")
    parent = _existing(out.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise EffcError(f"{out}: {parent} cannot be written to, want a folder that can")


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


@contextlib.contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """A new folder beside `out` that takes its place if all goes well, and is gone if not."""
    check_free(out, force)
    out = Path(os.path.abspath(out))
    _sweep(out)
    work = _beside(out, "new")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise EffcError(f"{out}: {error.strerror}, want a folder that can be written") from None
    try:
        yield work
        _take_place(work, out)
    except OSError as error:
        raise EffcError(f"{error.filename or out}: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.effc-{what}-{os.getpid()}")


def _sweep(out: Path) -> None:
    """Remove what runs that were killed left beside `out`."""
    pattern = re.compile(re.escape(f".{out.name}.effc-") + r"new-(\d+)")
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        found = pattern.fullmatch(path.name)
        if found and not _alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _take_place(work: Path, out: Path) -> None:
    """Rename `work` to `out`; what was there is moved aside first and back if that fails."""
    for file in work.rglob("*"):
        if file.is_file():
            _settle(file)
    if not out.exists():
        os.rename(work, out)
        return
    old = _beside(out, "old")
    os.rename(out, old)
    try:
        os.rename(work, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _settle(file: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def write_texts(work: Path, module: Module, program: str, tokenizer: TokenizerFiles | None) -> list[str]:
    """The IR, the program and the tokenizer; returns the tokenizer's files."""
    write_module(work, module)
    (work / PROGRAM).write_text(program)
    files = {TOKENIZER: tokenizer.json, **tokenizer.extra} if tokenizer else {}
    for name, data in files.items():
        (work / name).write_bytes(data)
    return list(files)


def write_module(work: Path, module: Module) -> None:
    """The IR by itself."""
    (work / MODEL).write_text(dump(module))


def write_report(work: Path, data: Mapping[str, Any], page: str) -> None:
    """The report for machines and for people."""
    (work / REPORT).write_text(json.dumps(data, indent=1) + "\n")
    (work / PAGE).write_text(page)


def write_manifest(work: Path, fields: Mapping[str, Any]) -> None:
    """Last of all: hashes of every file that is there."""
    files = {str(f.relative_to(work)): file_hash(f) for f in sorted(work.rglob("*")) if f.is_file()}
    head = {"format": FORMAT, "effc": effc_version()}
    (work / MANIFEST).write_text(json.dumps({**head, **fields, "files": files}, indent=1) + "\n")


def file_hash(path: Path) -> str:
    """sha256 of the file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- check


def verify(path: Path) -> list[str]:
    """Every fault: files missing, changed or unlisted, an illegal module, arrays that do not fit, other logits."""
    try:
        manifest = read_manifest(path)
    except EffcError as error:
        return [str(error)]
    faults = list(_file_faults(path, manifest))
    return [*faults, *_content_faults(path, manifest)]


def _file_faults(path: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    listed: Mapping[str, str] = manifest.get("files") or {}
    if not listed:
        yield f"{MANIFEST}: lists no files"
    for name, wanted in listed.items():
        file = path / name
        if not file.is_file():
            yield f"{name}: missing"
        elif file_hash(file) != wanted:
            yield f"{name}: changed since it was written (its sha256 is not the manifest's)"
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and name not in listed and name != MANIFEST:
            yield f"{name}: not listed in the manifest"


def _content_faults(path: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the files hold; the logits are looked at only where all else can be read."""
    try:
        found = Artifact.load(path)
        wrong = recognise((found.module, found.store), manifest["probe"])
    except EffcError as error:
        yield str(error)
    except (KeyError, TypeError):
        yield f"{MANIFEST}: no logits to hold the model against"
    else:
        yield from [wrong] if wrong else []
