"""Quantize from Python: a checkpoint in, an artifact out, the numbers read back.

python examples/quantize.py examples/stdlib12/model.ckpt out
"""

import sys

import effc


def main(model: str, out: str) -> None:
    report = effc.optimize(model, out, "quant4{group=64},fuse", speed=False, eval_tokens=1024)
    before, after = report.before, report.after
    print(f"{before.nbytes / 1e6:.1f} MB -> {after.nbytes / 1e6:.1f} MB")
    if before.quality and after.quality:
        print(f"perplexity {before.quality.perplexity:.2f} -> {after.quality.perplexity:.2f}")
    for step in report.passes:
        print(step.spelling, "-", "; ".join(step.choices))


if __name__ == "__main__":
    main(*sys.argv[1:])
