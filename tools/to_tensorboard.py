"""Turns a run's log.jsonl and grid.png into tensorboard's event files, in the same folder.

python tools/to_tensorboard.py RUN          then: tensorboard --logdir RUN
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate import one_sentence  # noqa: E402
from model import UserError  # noqa: E402


def read_log(run):
    """The rows of a run's log: {"step": n, ...} after a step, {"eval_step": n, ...} after an evaluation."""
    try:
        lines, rows = (run / "log.jsonl").read_text().splitlines(), []
    except OSError as error:
        raise UserError(f"{run / 'log.jsonl'} can't be read ({error.strerror}); give a run's --out") from None
    for line in lines:
        with contextlib.suppress(ValueError):  # a kill can cut the last line
            rows.append(json.loads(line))
    return rows


def convert(run):
    """Write a run's event file: scalars train/NAME and eval/NAME, and its picture at the last evaluation."""
    rows, evaluated = read_log(run), 0
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard's format needs a package more: pip install tensorboard") from None
    with SummaryWriter(run, purge_step=0) as board:  # which hides the events of an earlier call
        for row in rows:
            if "step" in row:
                kind, step = "train", row.pop("step")
            else:
                kind, step = "eval", row.pop("eval_step")
                evaluated = step
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    board.add_scalar(f"{kind}/{name}", value, step)
        if (run / "grid.png").exists():
            board.add_image("detections", np.asarray(Image.open(run / "grid.png")), evaluated, dataformats="HWC")
    print(f"wrote the {len(rows)} rows of {run / 'log.jsonl'} as events: tensorboard --logdir {run}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Turn a run's log into tensorboard's event files.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out of a run")
    convert(parser.parse_args(argv).run)


if __name__ == "__main__":
    with one_sentence():
        main()
