"""`effc verify` and `doctor`: is this artifact whole, is this machine fit?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effc.cli.arguments import json_option, show, show_json, verb


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "verify",
        verify,
        "check an artifact: every file's hash, the IR, and the logits it was written with",
        "effc verify out",
    )
    parser.add_argument("artifact", type=Path)
    json_option(parser)
    parser = verb(
        verbs,
        "doctor",
        doctor,
        "show versions, processor and devices: paste it into bug reports",
        "effc doctor --json",
    )
    json_option(parser)


def verify(args: argparse.Namespace) -> int:
    """Exit 1 where a fault is found."""
    from effc import artifact

    faults = artifact.verify(args.artifact)
    if args.json:
        show_json({"good": not faults, "faults": faults})
    elif faults:
        print("\n".join(f"effc: {args.artifact}: {fault}" for fault in faults), file=sys.stderr)
    else:
        print(f"{args.artifact}: good")
    return 1 if faults else 0


def doctor(args: argparse.Namespace) -> int:
    from effc.doctor import examine

    health = examine()
    show(args, health)
    return 1 if health.trouble else 0
