"""`effc optimize`: from a checkpoint to an artifact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from effc.cli.arguments import (
    json_option,
    measuring_options,
    memory,
    model_options,
    output_options,
    progress_console,
    show,
    verb,
    work_options,
)

if TYPE_CHECKING:
    from effc.driver import Settings


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "optimize",
        run,
        "compile a checkpoint into a cheaper program, with a report of what it cost",
        "effc optimize examples/stdlib12/model.ckpt --passes quant4 -o out",
        "effc optimize SmolLM2.gguf --passes quant4{group=64},fuse --eval heldout.txt -o out",
        "effc optimize weights.safetensors --module model.py:build --dry-run --passes quant8",
    )
    parser.add_argument("model", type=Path, help="checkpoint: model.ckpt, Hugging Face folder, .gguf, .msgpack, Orbax")
    parser.add_argument(
        "--passes", default="", help="what to do, in any order: quant4{group=64},fuse (see effc passes)"
    )
    parser.add_argument("--calib", type=Path, metavar="FILE", help="text for passes that train or calibrate")
    parser.add_argument(
        "--heal", default="", metavar="BUDGET", help="training of all passes together: 10m, 90s, 500 steps"
    )
    work_options(parser)
    parser.add_argument(
        "--max-memory", type=memory, default=0, metavar="SIZE", help="stop, writing nothing, where it takes more: 3GB"
    )
    parser.add_argument("--export", action="store_true", help="also write StableHLO programs (jax.export)")
    output_options(parser, default="NAME-effc here, by the model's name")
    measuring_options(parser)
    _ir_options(parser)
    model_options(parser)
    json_option(parser)
    _add_plan(verbs)


def _add_plan(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "plan",
        show_plan,
        "show what optimize would do, in which order and why, and what it would take; reads no weights",
        "effc plan examples/stdlib12/model.ckpt --passes quant4,calm,mor",
    )
    parser.add_argument("model", type=Path, help="checkpoint, as for optimize")
    parser.add_argument("--passes", default="", help="what to do, in any order (see effc passes)")
    parser.add_argument("--heal", default="", metavar="BUDGET", help="training of all passes together: 10m, 500 steps")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write the IR after every pass to DIR/NN-pass.effc")
    model_options(parser)
    json_option(parser)


def show_plan(args: argparse.Namespace) -> None:
    from effc import driver
    from effc.frontend.checkpoints import open_checkpoint

    source = open_checkpoint(args.model, module=args.module, dtype=args.dtype)
    show(args, driver.plan(source, driver.Settings(passes=args.passes, heal=args.heal, dump=args.dump)))


def _ir_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the IR")
    group.add_argument("--dry-run", action="store_true", help="show what would be done; read no weights, write nothing")
    group.add_argument("--print-ir-after-all", action="store_true", help="print the IR after every pass to stderr")
    group.add_argument("--dump", type=Path, metavar="DIR", help="write the IR after every pass to DIR/NN-pass.effc")
    group.add_argument("--ir", type=Path, metavar="FILE.effc", help="start from this dump, edited by hand, instead")


def run(args: argparse.Namespace) -> None:
    from effc import driver
    from effc.frontend.checkpoints import open_checkpoint

    source = open_checkpoint(args.model, module=args.module, dtype=args.dtype)
    if args.dry_run:
        show(args, driver.plan(source, _settings(args)))
        return
    out, console = args.output or Path(f"{source.name.replace('/', '-')}-effc"), progress_console()
    show(args, driver.optimize(source, out, _settings(args), console))
    console.print(f"written: {out}", highlight=False, soft_wrap=True)


def _settings(args: argparse.Namespace) -> Settings:
    from effc.driver import Settings

    return Settings(
        passes=args.passes,
        seed=args.seed,
        eval_text=args.eval,
        calib=args.calib,
        ir=args.ir,
        force=args.force,
        export=args.export,
        speed=not args.no_speed,
        dump=args.dump,
        print_ir=args.print_ir_after_all,
        heal=args.heal,
        work=args.work,
        max_memory=args.max_memory,
    )
