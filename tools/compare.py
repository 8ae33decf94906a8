"""Runs variants of a training over several seeds, one after the other, and prints what differs and by how much.

python tools/compare.py --seeds 5 COMMAND...
python tools/compare.py --seeds 5 "--arch tiny --size 128 --protocol toy --data shapes" "bash variant.sh"

A COMMAND is flags of train.py, or a command that takes them at its end. Seed and folder are added to it. A run that is
already there is not run again, and one that was interrupted goes on; a script that has changed needs another --out.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluate import make_folder, one_sentence  # noqa: E402
from model import UserError  # noqa: E402


def run(command, seed, out):
    """Train, or go on, if `out` doesn't hold that run finished, printing into out/said.txt. Raises UserError."""
    words = shlex.split(command)
    if words[0].startswith("-"):
        words = [sys.executable, str(ROOT / "train.py"), *words]
    words += ["--seed", str(seed), "--out", str(out)]
    said = make_folder(out) / "said.txt"
    command, before = shlex.join(words), said.read_text() if said.exists() else ""
    if before and before.splitlines()[0] != command:
        raise UserError(f"{out} holds another run, {before.splitlines()[0]}; give another --out")
    if "best AP" in before:
        return
    with open(said, "w") as file:
        print(command, file=file, flush=True)
        words += ["--resume"] if (out / "last.pt").exists() else []
        code = subprocess.call(words, stdout=file, stderr=subprocess.STDOUT)
    lines = said.read_text().strip().splitlines()
    if code or "best AP" not in lines[-1]:
        raise UserError(f"{command} ended with code {code}: {lines[-1]}; once mended, the same comparison goes on")


def measured(out):
    """{"AP": the best, "mask_AP": that evaluation's, "minutes": of all steps} of a run's log."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    best = max((row for row in rows if "eval_step" in row), key=lambda row: row["AP"])
    found = {name: best[name] for name in ("AP", "mask_AP") if name in best}
    return found | {"minutes": sum(row.get("seconds", 0) for row in rows) / 60}


def spread(values, form=".3f"):
    """Mean and standard deviation (of a sample), and the lowest and highest, in words."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}} ({min(values):{form}} to {max(values):{form}})"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compare variants of a training over several seeds.")
    add = parser.add_argument
    add("commands", nargs="+", metavar="COMMAND", help="quoted flags of train.py, or a command that takes them")
    add("--seeds", type=int, default=5, help="seeds 0, 1, ... of each (default 5)")
    add("--out", type=Path, default=Path("runs/compare"), help="folder of all runs (default runs/compare)")
    args = parser.parse_args(argv)
    if args.seeds <= 0 or not all(command.strip() for command in args.commands):
        raise UserError("--seeds must be positive, and a COMMAND not empty")
    rows = []
    for k, command in enumerate(args.commands):
        found = []
        for seed in range(args.seeds):
            run(command, seed, args.out / f"{k}_{seed}")
            found.append(measured(args.out / f"{k}_{seed}"))
            print(f"variant {k}, seed {seed}: " + ", ".join(f"{n} {v:.3f}" for n, v in found[-1].items()), flush=True)
        rows.append({n: spread([one[n] for one in found], ".1f" if n == "minutes" else ".3f") for n in found[0]})
    names = dict.fromkeys(name for row in rows for name in row)
    print(f"{'variant':<9}" + "".join(f"{name:<32}" for name in names) + "command")
    for k, (row, command) in enumerate(zip(rows, args.commands)):
        print(f"{k:<9}" + "".join(f"{row.get(name, ''):<32}" for name in names) + command)


if __name__ == "__main__":
    with one_sentence():
        main()
