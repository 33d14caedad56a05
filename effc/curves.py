"""Cost and quality of ways to decode on one plot: as lines and letters for the terminal, as a picture for the page.

A row is a way at a setting: `way`, `setting`, `mark` (certified, by hand, or nothing), `loss`, `speed` over plain
speculation's, `rate` in tokens/s, and what it came to: `deferral`, `acceptance`, `large_calls`, `small_calls`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Row = Mapping[str, Any]

PLAIN = ("large", "small", "speculation")
"""Ways without a setting: each model alone, and plain speculation."""

RULELESS = ("token", "answer")
"""Plain cascades: of each token, of whole answers."""

HEAD = (
    f"{'way':12} {'setting':>7} {'':>9} {'loss':>8} {'score':>8} {'deferred':>9} {'accepted':>9} "
    f"{'large':>7} {'small':>7} {'tokens/s':>8}  to plain speculation"
)


def line(row: Row) -> str:
    """A row under HEAD."""
    shares = [_or_none(row.get(n), "9.1%", 9) for n in ("deferral", "acceptance")]
    calls = [_or_none(row.get(n), "7.0f", 7) for n in ("large_calls", "small_calls")]
    setting = _or_none(row["setting"], "g", 0).replace("-inf", "never").rjust(7)
    score, rate = _or_none(row.get("score"), "8.4f", 8), _or_none(row.get("rate"), "8.1f", 8)
    return (
        f"{row['way']:12} {setting} {row['mark']:>9} {row['loss']:8.4f} {score} {' '.join(shares)} "
        f"{' '.join(calls)} {rate}  x{row['speed']:.3f}"
    )


def _or_none(value: float | None, how: str, wide: int) -> str:
    return format(value, how) if value is not None else "-".rjust(wide) if wide else ""


def told(row: Row) -> str:
    """A row as a sentence."""
    setting = "" if row["setting"] is None else f" {row['setting']:g}"
    parts = [f"{row['way']}{setting}: loss {row['loss']:.4f}"]
    parts += [f"{row['deferral']:.1%} deferred"] if row.get("deferral") is not None else []
    parts += [f"{row['acceptance']:.1%} of drafts accepted"] if row.get("acceptance") is not None else []
    if row.get("large_calls") is not None:
        parts += [f"{row['large_calls']:.0f} forwards of the large model, {row['small_calls']:.0f} of the small one"]
    return ", ".join([*parts, f"{row['rate']:.1f} tokens/s, x{row['speed']:.2f} of plain speculation"])


def summary(curve: Mapping[str, Any]) -> list[str]:
    """What runs or is certified, and the curve with a line for each way."""
    rows: Sequence[Row] = curve.get("rows", ())
    out = [f"{row['mark']}, on {curve['prompts']} prompts: {told(row)}" for row in rows if row["mark"]]
    for name in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == name]
        settings = "" if name in PLAIN else f" ({'; '.join(format(row['setting'], 'g') for row in mine)})"
        out.append(f"curve of {name}{settings}: " + "; ".join(f"{r['loss']:.3f} at x{r['speed']:.2f}" for r in mine))
    return out


def verdict(rows: Sequence[Row], delta: float) -> str:
    """Whether a certified rule beats plain speculation in this run."""
    found = [row for row in rows if row["mark"] == "certified" and row["way"] not in RULELESS and row["speed"] > 1]
    if not found:
        return f"at a certified loss of {delta:g} no rule is faster than plain speculation"
    best = max(found, key=lambda row: row["speed"])
    return (
        f"at a certified loss of {delta:g} {best['way']}, alpha {best['setting']:g}, is "
        f"x{best['speed']:.3f} of plain speculation"
    )


def _most(rows: Sequence[Row]) -> tuple[float, float]:
    return max(row["loss"] for row in rows) or 1.0, max(row["speed"] for row in rows) or 1.0


def chart(rows: Sequence[Row], wide: int = 72, high: int = 20) -> str:
    """Loss upwards from none at the top, speed to the right; a letter a way."""
    worst, most = _most(rows)
    grid = [[" "] * (wide + 1) for _ in range(high + 1)]
    names = list(dict.fromkeys(row["way"] for row in rows))
    for row in rows:
        place = round(high * row["loss"] / worst), round(wide * row["speed"] / most)
        grid[place[0]][place[1]] = chr(ord("a") + names.index(row["way"]))
    lines = [f"{worst * i / high:6.3f} |{''.join(cells).rstrip()}" for i, cells in enumerate(grid)]
    lines.append(f"  loss +{'-' * wide} speed over plain speculation, to x{most:.2f}")
    return "\n".join([*lines, "  ".join(f"{chr(ord('a') + i)} {name}" for i, name in enumerate(names))])


COLOURS = ("#777", "#bbb", "#c00", "#06c", "#0a0", "#f80", "#909", "#088", "#a60", "#c69", "#579", "#690")


def svg(rows: Sequence[Row]) -> str:
    """The same as a picture: lines join the settings of a way, large dots are what runs or is certified."""
    worst, most = _most(rows)
    names, out = list(dict.fromkeys(row["way"] for row in rows)), list[str]()
    for i, name in enumerate(names):
        mine, colour = sorted((row for row in rows if row["way"] == name), key=_setting), COLOURS[i % len(COLOURS)]
        at = [(60 + 500 * row["speed"] / most, 20 + 340 * row["loss"] / worst, row) for row in mine]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        out += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if row["mark"] else 3}" fill="{colour}">'
            f"<title>{escape(told(row))}</title></circle>"
            for x, y, row in at
        ]
        out.append(f'<text x="580" y="{30 + 18 * i}" fill="{colour}">{escape(name)}</text>')
    axes = '<path d="M60 20V360H560" fill="none" stroke="currentColor"/>'
    words = f"speed over plain speculation, to x{most:.2f}; downwards loss, to {worst:.3f}"
    label = f'<text x="60" y="385" fill="currentColor">{words}</text>'
    style = 'xmlns="http://www.w3.org/2000/svg" width="700" height="400" font-family="sans-serif" font-size="13"'
    return f'<svg {style} role="img" aria-label="loss against speed">{axes}{label}{"".join(out)}</svg>\n'


def _setting(row: Row) -> float:
    return 0.0 if row["setting"] is None else row["setting"]


__all__ = ["HEAD", "PLAIN", "RULELESS", "chart", "line", "summary", "svg", "told", "verdict"]
