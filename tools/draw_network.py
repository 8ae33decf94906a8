"""Draws an arch's scale-permuted network as SVG, like the paper's Figure 4.

python tools/draw_network.py [--arch 49] FILE.svg
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import ARCHS, LEVELS, STEM_BLOCKS, STEM_LEVEL, Block  # noqa: E402

KIND_COLOURS = {"bottleneck": "#f4a261", "residual": "#8ecae6"}
SIDE, COLUMN, ROW = 36, 58, 62  # pixels: of a block; from one to the next; from level to level


def height_of(level):
    """The y of a level's line."""
    return 40 + ROW * (max(LEVELS) - level)


def draw(arch):
    """The scale-permuted network as SVG text, after the paper's Figure 4d: blocks in order from the left, levels up,
    kinds by colour, a line from every parent (dashed where it joins unresampled), outputs with a thick frame."""
    stem = [Block(number, STEM_LEVEL, "bottleneck", (number - 1,) if number else ()) for number in range(STEM_BLOCKS)]
    network = (*stem, *arch.spine)
    place = {block.number: (70 + COLUMN * k, height_of(block.level)) for k, block in enumerate(network)}
    width, height = max(x for x, _ in place.values()) + 60, height_of(STEM_LEVEL) + 90
    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for level in range(STEM_LEVEL, max(LEVELS) + 1):
        y = height_of(level)
        parts.append(f'<line x1="44" y1="{y}" x2="{width - 20}" y2="{y}" stroke="#eeeeee"/>')
        parts.append(f'<text x="22" y="{y + 5}">L{level}</text>')
    parts += draw_lines(network, place) + draw_blocks(network, place) + draw_legend(arch.repeats, height - 40)
    size = f'width="{width}" height="{height}"'
    style = 'font-family="sans-serif" font-size="14" text-anchor="middle"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def draw_lines(network, place):
    """A curve from every parent to its child; place: {block number: (x, y)}."""
    parts = []
    for block in network:
        (x1, y1), half = place[block.number], SIDE // 2
        for parent in block.parents + block.as_is:
            x0, y0 = place[parent]
            dashes = ' stroke-dasharray="4 3"' if parent in block.as_is else ""
            bend = (x1 - x0) / 2
            lift = 34 if y0 == y1 and block.number - parent > 1 else 0  # around the blocks between them
            curve = f"M{x0 + half} {y0} C{x0 + bend:g} {y0 - lift} {x1 - bend:g} {y1 - lift} {x1 - half} {y1}"
            parts.append(f'<path d="{curve}" fill="none" stroke="#666666"{dashes}/>')
    return parts


def draw_blocks(network, place):
    """A numbered box for every block; outputs are named."""
    parts = []
    for block in network:
        x, y = place[block.number]
        frame = 'stroke="#c1121f" stroke-width="3"' if block.output else 'stroke="#444444"'
        box = f'x="{x - SIDE // 2}" y="{y - SIDE // 2}" width="{SIDE}" height="{SIDE}" rx="4"'
        parts.append(f'<rect {box} fill="{KIND_COLOURS[block.kind]}" {frame}/>')
        parts.append(f'<text x="{x}" y="{y + 5}">{block.number}</text>')
        if block.output:
            parts.append(f'<text x="{x}" y="{y - SIDE // 2 - 6}" fill="#c1121f">P{block.level}</text>')
    return parts


def draw_legend(repeats, y):
    """What the colours mean, in one line at y."""
    parts = []
    for k, (name, colour) in enumerate([*KIND_COLOURS.items(), ("output P3 to P7", "white")]):
        x, frame, times = 60 + 190 * k, "#444444", f" x {repeats}"
        if colour == "white":
            frame, times = "#c1121f", ""
        parts.append(f'<rect x="{x}" y="{y}" width="18" height="18" rx="3" fill="{colour}" stroke="{frame}"/>')
        parts.append(f'<text x="{x + 26}" y="{y + 14}" text-anchor="start">{name}{times}</text>')
    return parts


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a picture (SVG) of an arch's network.")
    parser.add_argument("file", type=Path, metavar="FILE.svg")
    parser.add_argument("--arch", default="49", choices=ARCHS, help="default 49")
    args = parser.parse_args(argv)
    try:
        args.file.write_text(draw(ARCHS[args.arch]))
    except OSError as error:
        parser.error(f"{args.file} can't be written ({error.strerror})")
    print(f"wrote {args.file}")


if __name__ == "__main__":
    main()
