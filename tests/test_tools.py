"""tools/: every script's command line, the picture of a network, the generated set's errors, tensorboard's events."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree
from types import ModuleType

import compare
import draw_network
import make_shapes
import numpy as np
import pytest
import to_tensorboard
from PIL import Image
from test_train import rows

from data import TRAIN, VAL, split_paths
from model import ARCHS, UserError

TOOLS = Path(__file__).parents[1] / "tools"
NAMES = [
    *("bench_data", "bench_evaluate", "bench_step", "compare", "draw_network", "import_official"),
    *("look", "make_assignment", "make_shapes", "plot_log", "to_tensorboard"),
]


def test_all_tools_are_tested():
    """Oracle: the folder."""
    assert [path.stem for path in sorted(TOOLS.glob("*.py"))] == NAMES


def tool(name, *flags, cwd):
    """What a script prints that is called from another folder, and its exit code."""
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    return done.stdout + done.stderr, done.returncode


@pytest.mark.parametrize("name", NAMES)
def test_help_from_another_folder(name, tmp_path):
    """Oracle: by hand. `--help` says the use and ends with exit code 0, wherever it is called; nothing is written."""
    said, code = tool(name, "--help", cwd=tmp_path)
    assert code == 0 and f"usage: {name}.py" in said and "Traceback" not in said, said
    assert not list(tmp_path.iterdir())


def test_picture_that_can_not_be_written(tmp_path, capsys):
    """Oracle: by hand. One sentence and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        draw_network.main([str(tmp_path / "missing" / "a.svg")])
    assert stop.value.code == 2 and "a.svg can't be written (No such file or directory)" in capsys.readouterr().err


def test_picture_of_the_network(tmp_path, capsys):
    """Oracle: the table. The SVG is well-formed XML with a box per block, a line per parent and a mark per output."""
    for name, arch in (("49", ARCHS["49"]), ("143", ARCHS["143"])):
        draw_network.main([str(tmp_path / "a.svg"), "--arch", name])
        assert "wrote" in capsys.readouterr().out
        root = ElementTree.parse(tmp_path / "a.svg").getroot()
        texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
        lines = [e for e in root.iter("{http://www.w3.org/2000/svg}path")]
        assert [t for t in texts if t.isdigit()] == [str(k) for k in range(17)]
        assert [t for t in texts if t.startswith("P")] == ["P4", "P3", "P5", "P7", "P6"]
        assert len(lines) == 1 + sum(len(b.parents) + len(b.as_is) for b in arch.spine)
        assert sum("stroke-dasharray" in e.attrib for e in lines) == 1
        assert f"bottleneck x {arch.repeats}" in texts


def refused(root, capsys):
    """What the command line of make_shapes says where it refuses to write."""
    with pytest.raises(UserError) as error:
        make_shapes.write_shapes(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        make_shapes.main(["--out", str(root)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: {error.value}\n" in said
    return str(error.value)


def test_generated_set_that_can_not_be_written(tmp_path, monkeypatch, capsys):
    """Oracle: by hand. What else is there is left as it is; what can't be written leaves nothing behind; a set that
    another process has put there in the meantime is taken."""
    monkeypatch.setitem(make_shapes.SHAPES, "images", {TRAIN: 2, VAL: 1})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_text("mine")
    assert "other exists, but is not the generated set; remove it" in refused(tmp_path / "other", capsys)
    assert [p.name for p in tmp_path.rglob("*")] == ["other", "photo.jpg"]
    below = refused(tmp_path / "other" / "photo.jpg" / "shapes", capsys)
    assert "shapes can't be written (Not a directory); make room, or work in another folder" in below

    def full(image, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert "shapes can't be written (No space left on device)" in refused(tmp_path / "shapes", capsys)
    assert [p.name for p in tmp_path.rglob("*")] == ["other", "photo.jpg"]

    def overtaken(source, target):
        rename(source, target)
        raise OSError(39, "Directory not empty")

    rename = make_shapes.os.rename
    monkeypatch.setattr(make_shapes.os, "rename", overtaken)
    make_shapes.main(["--out", str(tmp_path / "shapes")])
    assert f"the generated shapes are in {tmp_path / 'shapes'}\n" in capsys.readouterr().out
    assert all(split_paths(tmp_path / "shapes", split)[0].is_file() for split in (TRAIN, VAL))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "shapes"]


class Board:
    """Stands in for tensorboard's SummaryWriter."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.pictures, self.closed = folder, purge_step, {}, [], False
        Board.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def add_scalar(self, name, value, step):
        assert (name, step) not in self.scalars
        self.scalars[name, step] = value

    def add_image(self, name, picture, step, dataformats):
        self.pictures.append((name, picture, step, dataformats))


@pytest.fixture
def board(monkeypatch):
    stub = ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    monkeypatch.setattr(Board, "last", None, raising=False)
    return lambda: Board.last


def test_tensorboard(run, board, capsys):
    """Oracle: log.jsonl, whose numbers the curves are, all of them and no other; the picture is grid.png."""
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    to_tensorboard.main([str(run)])
    expected, logged = {}, rows(run)
    for row in logged:
        kind, place = ("train", "step") if "step" in row else ("eval", "eval_step")
        expected |= {(f"{kind}/{k}", row[place]): v for k, v in row.items() if k != place and v is not None}
    assert board().scalars == expected and board().closed and (board().folder, board().purge_step) == (run, 0)
    assert {("train/loss", 1), ("train/grad_norm", 4), ("eval/AP", 4)} <= expected.keys()
    ((name, picture, step, layout),) = board().pictures
    assert (name, step, layout) == ("detections", 4, "HWC")
    assert np.array_equal(picture, np.asarray(Image.open(run / "grid.png")))
    assert f"wrote the {len(logged)} rows" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_tensorboard_of_a_run_that_was_cut(board, tmp_path):
    """Oracle: by hand. Of a run without an evaluation, killed while it wrote a line, under float16: whole lines count,
    what is no number is no point, and there is no picture."""
    lines = [{"step": 1, "loss": 2.5, "grad_norm": None}, {"step": 2, "loss": 1.5, "grad_norm": 3.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    to_tensorboard.main([str(tmp_path)])
    assert board().scalars == {("train/loss", 1): 2.5, ("train/loss", 2): 1.5, ("train/grad_norm", 2): 3.0}
    assert board().pictures == []


def test_tensorboard_without_the_package_or_the_log(run, tmp_path, monkeypatch):
    """Oracle: by hand. Each is a sentence with what to do, and nothing is written."""
    with pytest.raises(UserError, match="log.jsonl can't be read .No such file or directory.; give a run's --out"):
        to_tensorboard.main([str(tmp_path)])
    before = sorted(run.iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        to_tensorboard.main([str(run)])
    assert sorted(run.iterdir()) == before and not list(tmp_path.iterdir())


def numbers(text, row):
    """The numbers of the line of a table that begins with `row`."""
    line = re.search(f"^ *{row} +(.*)", text, re.MULTILINE)[1]
    return [float(number) for number in re.findall(r"(?<![^\s<])\d+(?:\.\d+)?(?!\S)", line)]


FAKE = """
import json, sys
from pathlib import Path
out, seed = Path(sys.argv[sys.argv.index("--out") + 1]), int(sys.argv[sys.argv.index("--seed") + 1])
Path("calls.txt").open("a").write("r" if "--resume" in sys.argv else "x")
if %s == 0.4 and seed == 1 and "--resume" not in sys.argv:
    (out / "last.pt").touch()
    sys.exit("step 1: stopped as asked; go on with --resume")
rows = [{"step": 1, "seconds": 30 * (seed + 1)}, {"eval_step": 1, "AP": 0.1 * seed + %s, "mask_AP": 0.2}]
rows += [{"step": 2, "seconds": 30}, {"eval_step": 2, "AP": 0.0, "mask_AP": 0.5}]
(out / "log.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
print("step 2: best AP 0.1; done")
"""


def test_compare(tmp_path, monkeypatch, capsys):
    """Oracle: by hand. Mean and deviation of a sample over seeds of the best AP, of that evaluation's mask AP, and the
    minutes; a run that is there is not run again, one that was stopped goes on, and one that fails is named."""
    monkeypatch.chdir(tmp_path)
    for name, base in (("a", 0.2), ("b", 0.4)):
        Path(f"{name}.py").write_text(FAKE % (base, base))
    commands = [f"{sys.executable} {name}.py" for name in "ab"]
    with pytest.raises(UserError, match="b.py --seed 1 --out runs/1_1 ended with code 1: step 1: stopped as asked"):
        compare.main([*commands, "--seeds", "2", "--out", "runs"])
    for _ in range(2):
        compare.main([*commands, "--seeds", "2", "--out", "runs"])
        assert Path("calls.txt").read_text() == "xxxxr"
        table = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[-3:]]
        same = ["0.200 ± 0.000 (0.200 to 0.200)", "1.2 ± 0.4 (1.0 to 1.5)"]
        assert table == [
            ["variant", "AP", "mask_AP", "minutes", "command"],
            ["0", "0.250 ± 0.071 (0.200 to 0.300)", *same, commands[0]],
            ["1", "0.450 ± 0.071 (0.400 to 0.500)", *same, commands[1]],
        ]
    with pytest.raises(UserError, match="runs/0_0 holds another run, .*a.py --seed 0 .*; give another --out"):
        compare.main([*commands[::-1], "--seeds", "2", "--out", "runs"])
    said, code = tool("compare", "--arch none", "--out", "other", cwd=tmp_path)
    assert code == 2 and "error: " in said and "--arch none --seed 0" in said and "ended with code 2" in said


def test_plot_log(run, tmp_path):
    """Oracle: the log. The SVG is well-formed, its four panels have a curve for each term, and a curve's last point is
    at the last step."""
    said, code = tool("plot_log", run, "--out", tmp_path / "log.svg", cwd=tmp_path)
    assert code == 0 and "wrote" in said
    tree = ElementTree.parse(tmp_path / "log.svg").getroot()
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("class", "box", "lr", "grad_norm", "AP", "AP50", "AP75", "step 4"):
        assert name in texts, texts
    curves = [line.get("points").split() for line in tree.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(curves) == 7 and [len(points) for points in curves[:4]] == [4] * 4
    assert {points[-1].split(",")[0] for points in curves} == {"408.0"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text("")
    said, code = tool("plot_log", tmp_path / "empty", cwd=tmp_path)
    assert code == 2 and "error: the log has no step yet" in said


@pytest.mark.slow
def test_benchmarks_measure(shapes, tmp_path):
    """Oracle: arithmetic on what is printed. Ratios are those of the milliseconds beside them; a step's images take as
    long as its parts, within the half; what fits 14 and 28 GB is what the account beside it leaves."""
    said, code = tool("bench_data", "--data", shapes, "--rounds", 2, "--samples", 3, cwd=tmp_path)
    assert code == 0, said
    for row in ("640, boxes", "1024, boxes and masks"):
        this, *pairs = numbers(said, row)
        assert len(pairs) == 6 and this > 0
        assert pairs[1::2] == pytest.approx([value / this for value in pairs[::2]], abs=0.02, rel=0.02)
    said, code = tool("bench_evaluate", "--rounds", 1, cwd=tmp_path)
    assert code == 0, said
    for row in ("640 x 480", "4000 x 3000"):
        theirs, this, ratio, same = numbers(said, row)
        assert ratio == pytest.approx(theirs / this, rel=0.1) and 0.9 < same <= 1
    said, code = tool("bench_step", "--memory", "--rows", "retinanet 49S", "--activations", "relu", cwd=tmp_path)
    fixed, each, fits, planned, twice, _ = numbers(said, "retinanet 49S@640 +relu")
    assert code == 0 and (fits, twice) == (int((14 - fixed) / each), int((28 - fixed) / each)) and planned == fits
    flags = ["--rows", "retinanet 49S", "--size", 128, "--rounds", 3, "--device", "cpu"]
    said, code = tool("bench_step", *flags, cwd=tmp_path)
    images, speed, forward, loss, backward, update, *_ = numbers(said, "retinanet 49S@128")
    assert code == 0 and images == 2
    assert 1000 * images / speed == pytest.approx(forward + loss + backward + update, rel=0.5)
