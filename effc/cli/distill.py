"""`effc distill`: a smaller student from a teacher."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effc.cli.arguments import (
    json_option,
    measuring_options,
    output_options,
    positive,
    progress_console,
    show,
    verb,
    work_options,
)
from effc.errors import EffcError

if TYPE_CHECKING:
    from effc.distilling import Distillation
    from effc.opened import Opened


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "distill",
        run,
        "train a smaller student on what its teacher says, beside one trained on the text alone",
        "effc distill --layers 5 --from examples/stdlib12/model.ckpt --text examples/stdlib12/calib.txt -o small",
        "effc distill small.ckpt --from big.ckpt --text *.txt --budget 30m --loss jsd -o out",
        "effc distill model.py:build --config '{\"layers\": 4}' --from out-big --on-policy 0.5 --budget 2000 -o out",
    )
    parser.add_argument(
        "student",
        nargs="?",
        metavar="STUDENT",
        help="checkpoint, artifact, or FILE.py:FUNC that builds a Flax module",
    )
    parser.add_argument("--from", dest="teacher", type=Path, required=True, metavar="TEACHER", help="its teacher")
    parser.add_argument("--layers", help="no STUDENT, but layers of the teacher: how many (5), or which (0,3,6,11)")
    parser.add_argument("--config", default="{}", metavar="JSON", help="arguments for FUNC")
    output_options(parser)
    _training(parser)
    measuring_options(parser).add_argument(
        "--no-baseline", action="store_true", help="do not train on the text alone as well"
    )
    json_option(parser)


def _training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="else the teacher's samples")
    group.add_argument("--budget", default="5m", help="steps (500) or a time (90s, 10m); default 5m")
    group.add_argument("--loss", default="fkl", choices=("fkl", "rkl", "jsd", "tvd"), help="distance (default fkl)")
    group.add_argument("--beta", type=float, default=0.5, help="of jsd: 0 is forward KL, 1 reverse KL (default 0.5)")
    group.add_argument("--alpha", type=float, default=1.0, help="share of the distance, not the text (default 1)")
    group.add_argument("--temperature", type=float, default=1.0, help="of both sides' logits (default 1)")
    group.add_argument("--on-policy", type=float, default=0.0, metavar="SHARE", help="of steps on its own text")
    group.add_argument("--rows", type=positive, default=16, help="sequences a step (default 16)")
    group.add_argument("--length", type=positive, default=128, help="tokens of each (default 128)")
    group.add_argument("--accumulate", type=positive, default=1, help="parts a step is cut into, to save memory")
    group.add_argument("--lr", type=float, default=1e-3, help="greatest learning rate (default 0.001)")
    work_options(group)


def run(args: argparse.Namespace) -> None:
    if bool(args.student) == bool(args.layers):
        raise EffcError("distill: want a STUDENT, or --layers of the teacher, one of them")
    from effc import distilling
    from effc.opened import open_model

    how = _settings(args)
    teacher = open_model(args.teacher)
    student = distilling.of_layers(teacher, args.layers) if args.layers else _student(args, teacher)
    show(args, distilling.distill(student, teacher, args.output, how, progress_console()))


def _student(args: argparse.Namespace, teacher: Opened) -> Opened:
    """A checkpoint or artifact; or a module as its own code initialises it."""
    from effc.opened import open_fresh, open_model

    if ":" not in args.student or Path(args.student).exists():
        return open_model(Path(args.student))
    return open_fresh(args.student, _config(args.config), teacher, args.seed)


def _config(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise EffcError(f"--config: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise EffcError(f"--config: {text}, want an object of arguments by name")
    return found


def _settings(args: argparse.Namespace) -> Distillation:
    from effc.distilling import asked

    return asked(
        kind=args.loss,
        alpha=args.alpha,
        beta=args.beta,
        temperature=args.temperature,
        budget=args.budget,
        text=args.text,
        on_policy=args.on_policy,
        rows=args.rows,
        length=args.length,
        accumulate=args.accumulate,
        lr=args.lr,
        seed=args.seed,
        baseline=not args.no_baseline,
        eval_text=args.eval,
        speed=not args.no_speed,
        force=args.force,
        work=args.work,
    )
