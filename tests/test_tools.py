"""tools/: every script's command line, the picture of a network, the generated set's errors, tensorboard's events."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import bench_data
import bench_evaluate
import bench_step
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
    *("bench_data", "bench_evaluate", "bench_step", "draw_network"),
    *("look", "make_assignment", "make_shapes", "to_tensorboard"),
]


def test_all_tools_are_tested():
    """Oracle: the folder."""
    assert [path.stem for path in sorted(TOOLS.glob("*.py"))] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_help_from_another_folder(name, tmp_path):
    """Oracle: by hand. `--help` explains the script's use and ends with exit code 0, wherever it is called, and nothing
    is written; a flag that it has not is refused with exit code 2."""
    for flag, code in (("--help", 0), ("--nothing-of-the-kind", 2)):
        command = [sys.executable, str(TOOLS / f"{name}.py"), flag]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        said = done.stdout + done.stderr
        assert done.returncode == code and f"usage: {name}.py" in said and "Traceback" not in said, said
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


def numbers_of(line):
    return [float(number) for number in re.findall(r"(?<= )\d+(?:\.\d+)?(?= |$)", line)]


def test_benchmarks_measure(shapes, monkeypatch, capsys):
    """Oracle: arithmetic on what is printed. Milliseconds by two are the ratio beside them; a step's images per second
    are its images in the sum of its parts; the images that fit are what their account leaves."""

    def lines_of(tool, *flags):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, flags)])
        tool.main()
        return capsys.readouterr().out.splitlines()

    for line in lines_of(bench_data, "--data", shapes, "--rounds", 1, "--samples", 2)[2:]:
        this, theirs, ratio, *_ = numbers_of(line)[-7:]
        assert 0 < this and theirs / this == pytest.approx(ratio, abs=0.01 + 0.02 * ratio)
    for line in lines_of(bench_evaluate, "--rounds", 1)[1:]:
        theirs, this, ratio, same = numbers_of(line)[-4:]
        assert theirs / this == pytest.approx(ratio, rel=0.2) and 0.9 < same <= 1
    *_, line = lines_of(bench_step, "--memory", "--rows", "retinanet 49S", "--activations", "relu")
    fixed, each, fits, planned, more, _ = numbers_of(line)
    assert fits == int((14 - fixed) / each) and more == int((28 - fixed) / each) and planned == 33
    *_, line = lines_of(bench_step, "--rows", "retinanet 49S", "--size", 128, "--rounds", 1, "--device", "cpu")[:3]
    images, speed, *parts = numbers_of(line)[:6]
    assert images == 2 and 0 < speed and all(part >= 0 for part in parts)
