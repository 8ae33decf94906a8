"""Draws a run's log.jsonl as an SVG: loss terms, learning rate, gradient norm and AP over the steps.

python tools/plot_log.py RUN                 writes RUN/log.svg
python tools/plot_log.py RUN --out FILE.svg
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from evaluate import METRICS, PALETTE, make_folder, one_sentence  # noqa: E402
from model import UserError  # noqa: E402
from to_tensorboard import read_log  # noqa: E402

WIDTH, HEIGHT, LEFT, TOP, POINTS = 420, 220, 64, 28, 200  # of a panel, its margins, points of a curve at most
NOT_LOSSES = {"step", "epoch", "lr", "loss", "grad_norm", "skipped", "seconds", "waited"}


def thinned(points):
    """At most POINTS of [(step, value)], each the mean of its neighbours; values that are none are left out."""
    points = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    size = max(math.ceil(len(points) / POINTS), 1)
    groups = [points[k : k + size] for k in range(0, len(points), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group)) for group in groups]


def panel(title, curves, last, logarithmic):
    """The SVG of one panel at (0, 0): curves {name: [(step, value)]} over steps 0..last."""
    curves = {name: thinned(points) for name, points in curves.items()}
    values = [value for points in curves.values() for _, value in points if not logarithmic or value > 0]
    if not values:
        return ""
    low, high = (min(values), max(values)) if logarithmic else (0, max(max(values), 1e-9))
    scale = math.log10 if logarithmic else float
    bottom, span = scale(low), max(scale(high) - scale(low), 1e-9)

    def place(step, value):
        x = LEFT + step / max(last, 1) * (WIDTH - LEFT - 12)
        return f"{x:.1f},{HEIGHT - 30 - (scale(max(value, low)) - bottom) / span * (HEIGHT - 30 - TOP):.1f}"

    text = 'font-family="sans-serif" font-size="11" fill="#333333"'
    lines = [f'<text x="{LEFT}" y="16" {text} font-weight="bold">{title}</text>']
    lines.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - 30}H{WIDTH - 12}" fill="none" stroke="#888888"/>')
    for value, y in ((high, TOP + 8), (low, HEIGHT - 30)):
        lines.append(f'<text x="{LEFT - 6}" y="{y}" {text} text-anchor="end">{value:.3g}</text>')
    lines.append(f'<text x="{LEFT}" y="{HEIGHT - 14}" {text}>0</text>')
    lines.append(f'<text x="{WIDTH - 12}" y="{HEIGHT - 14}" {text} text-anchor="end">step {last}</text>')
    for k, (name, points) in enumerate(curves.items()):
        colour = "#{:02x}{:02x}{:02x}".format(*PALETTE[k % len(PALETTE)])
        path = " ".join(place(*point) for point in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point in path.split() if len(points) < 40 else ():  # few enough to be told apart
            lines.append('<circle cx="{}" cy="{}" r="2" fill="{}"/>'.format(*point.split(","), colour))
        at = f'x="{WIDTH - 14}" y="{TOP + 6 + 14 * k}" text-anchor="end"'
        lines.append(f"<text {at} {text.replace('#333333', colour)}>{name}</text>")
    return "\n".join(lines)


def draw(rows):
    """The SVG of a log's rows: {"step": ...} after a step, {"eval_step": ...} after an evaluation."""
    steps, evaluations = [r for r in rows if "step" in r], [r for r in rows if "eval_step" in r]
    if not steps:
        raise UserError("the log has no step yet")

    def curve(found, key, name):
        return [(row[key], row[name]) for row in found if name in row]

    losses = [name for name in steps[0] if name not in NOT_LOSSES]
    metrics = [
        prefix + name
        for prefix in ("", "mask_")
        for name in METRICS[:3]
        if any(prefix + name in e for e in evaluations)
    ]
    panels = [
        ("loss terms (logarithmic)", {name: curve(steps, "step", name) for name in losses}, True),
        ("learning rate", {"lr": curve(steps, "step", "lr")}, False),
        ("gradient norm before clipping (logarithmic)", {"grad_norm": curve(steps, "step", "grad_norm")}, True),
        ("AP", {name: curve(evaluations, "eval_step", name) for name in metrics}, False),
    ]
    parts = []
    for k, (title, curves, logarithmic) in enumerate(panels):
        move = f"translate({k % 2 * WIDTH} {k // 2 * HEIGHT})"
        parts.append(f'<g transform="{move}">\n{panel(title, curves, steps[-1]["step"], logarithmic)}\n</g>')
    size = f'width="{2 * WIDTH}" height="{2 * HEIGHT}" viewBox="0 0 {2 * WIDTH} {2 * HEIGHT}"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', ground, *parts, "</svg>"]) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw a run's log as an SVG.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out of a run")
    parser.add_argument("--out", type=Path, help="the SVG to write (default RUN/log.svg)")
    args = parser.parse_args(argv)
    out = args.out or args.run / "log.svg"
    picture = draw(read_log(args.run))
    make_folder(out.parent)
    out.write_text(picture)
    print(f"wrote {out}")


if __name__ == "__main__":
    with one_sentence():
        main()
