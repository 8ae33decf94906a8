"""What the documents promise (symbols, commands, tables, links), and the house that they describe."""

import ast
import dataclasses
import importlib
import re
import runpy
import shlex
import sys
import textwrap

import make_shapes
import numpy as np
import pytest
import torch
from import_official import RELEASED
from make_assignment import ASSIGNMENTS, ROOT, body_of
from test_model import unresampled

import blocks
import data
import heads
import loss
import model
import train
from evaluate import Place

LIMITS = {"blocks": 190, "heads": 320, "loss": 310, "model": 440, "data": 520, "evaluate": 445, "train": 445}
MODULES = list(LIMITS)  # in the order in which they import each other
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
DOCUMENTS = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, TEXT = DOCUMENTS[ROOT / "README.md"], "\n".join(DOCUMENTS.values())
COURSE = DOCUMENTS[ROOT / "docs" / "COURSE.md"]


def test_every_symbol_exists():
    """Oracle: the modules. Each `file.symbol`, and each `NAME` in `file.py`, is there, dataclass fields included."""
    symbols = set(re.findall(rf"`((?:{'|'.join(MODULES + TOOLS)})\.(?!py`)[\w.]+)`", TEXT))
    symbols |= {f"{module}.{name}" for name, module in re.findall(r"`(\w+)`\s+in\s+`(?:tools/)?(\w+)\.py`", TEXT)}
    assert len(symbols) > 60
    for symbol in symbols:
        module, *names = symbol.split(".")
        value = importlib.import_module(module)
        for name in names:
            fields = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            assert hasattr(value, name) or name in fields, symbol
            value = getattr(value, name, None)


SCRIPTS = re.findall(r"((?:\w+/)?\w+\.py)((?: +[^\s`|#&()\"]+)*)", TEXT)  # with what follows, to a quote


def test_every_script_and_flag_exists():
    """Oracle: the sources. Each script that is named is there and has the flags that it is called with; every tool is
    named in the README."""
    assert len(SCRIPTS) > 40
    for script, flags in SCRIPTS:
        source = (ROOT / script).read_text()
        for flag in re.findall(r"--[\w-]+", flags):
            assert f'"{flag}"' in source, f"{script} {flag}"
    assert [tool for tool in TOOLS if f"`tools/{tool}.py`" not in README] == []


ROWS = [shlex.split(flags) for flags in re.findall(r"`(--arch [^`]*--batch-size[^`]*)`", TEXT)]
COMMANDS = [shlex.split(flags) for script, flags in SCRIPTS if script == "train.py" and "--arch" in flags]


@pytest.mark.parametrize("flags", [*ROWS, *COMMANDS], ids=" ".join)
def test_training_commands_are_accepted(flags):
    """Oracle: the parser and the recipe. Every training command resolves to a recipe; in the accuracy table's the
    micro-batch divides what 8 devices share."""
    args = train.parse_args(flags)
    recipe = train.resolve(args, model.ARCHS[args.arch])
    if "--batch-size" in flags and "--weights" not in flags:
        train.split_batch(recipe, args.micro_batch, Place(torch.device("cpu"), world=8))


def test_there_are_commands():
    """Oracle: counting, so that the test above can't run out of them unseen."""
    assert len(ROWS) == 19 and len(COMMANDS) >= 12


def test_the_ablations(monkeypatch, tmp_path):
    """Oracle: model.count. The commands build what the table says, and call train.main with flags that it takes."""
    calls = [(["--arch", "tiny"], model.ARCHS["tiny"])]
    monkeypatch.setattr(train, "main", lambda *given: calls.append(given))
    monkeypatch.setattr(sys, "argv", ["-c", "--seed", "3"])
    for code in re.findall(r'python -c "\n(.*?)"$', TEXT, re.MULTILINE | re.DOTALL):
        (tmp_path / "ablation.py").write_text(textwrap.dedent(code))
        runpy.run_path(tmp_path / "ablation.py")
    said = re.findall(r"\| ([\d.]+) M, ([\d.]+) G \|", TEXT)
    assert len(said) == len(calls) == 3
    for numbers, (flags, arch) in zip(said, calls):
        parameters, macs = model.count(arch, 128)
        assert numbers == (f"{parameters / 1e6:.2f}", f"{macs / 1e9:.3f}")
        train.resolve(train.parse_args(flags), arch)


def test_links():
    """Oracle: the files. Each relative link and picture leads to a file, and to a heading of it if it says one."""
    links = [(path, link) for path, text in DOCUMENTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    links = [(path, *link.partition("#")[::2]) for path, link in links if not link.startswith("http")]
    assert len(links) > 8
    for path, file, heading in links:
        target = (path.parent / file).resolve() if file else path
        assert target.is_file() and target.is_relative_to(ROOT), (path, file)
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, (path, heading)


def test_the_shapes_table():
    """Oracle: make_shapes.SHAPES. The table says its ranges."""
    shapes = make_shapes.SHAPES
    names = ", ".join(shapes["classes"].values())
    assert names in TEXT and ", ".join(map(str, shapes["classes"])) in TEXT
    assert f"{shapes['object_side'][0]} – {shapes['object_side'][1]}" in TEXT
    assert f"{shapes['images'][data.TRAIN]} training and {shapes['images'][data.VAL]} validation images" in TEXT


def test_the_protocols_table():
    """Oracle: train.PROTOCOLS. Each has a row, with its jitter and its epochs."""
    for name, protocol in train.PROTOCOLS.items():
        low, high = protocol["jitter"]
        assert re.search(rf"^\| {name}[^|]*\| {low} – {high} \| {protocol['epochs']}\b", TEXT, re.MULTILINE), name


def test_the_table_of_released_files():
    """Oracle: tools/import_official.py. The table says each released file's protocol, AP and size."""
    rows = re.findall(r"^\| `(retinanet|maskrcnn)/([\w-]+)` \| (\w) \| ([\d.() ]+) \| (\d+) \|", TEXT, re.MULTILINE)
    said = {(head.replace("maskrcnn", "mask_rcnn"), name): (int(size), p, ap) for head, name, p, ap, size in rows}
    assert said == RELEASED


def test_the_memory_table(monkeypatch):
    """Oracle: train.FITS, through split_batch. The table's images are the most that a micro-batch has by default, on 16
    GB and, with FITS doubled, on 32; what they need leaves an eighth free."""
    rows = re.findall(r"^\| (RetinaNet|Mask R-CNN) (\w+), (\d+) \| ([\d.]+) \| (\d+), (\d+) \|", TEXT, re.MULTILINE)
    assert len(rows) == 11
    place = Place(torch.device("cpu"), amp=torch.bfloat16)  # which counts as 16 GB
    for double in (False, True):
        if double:
            monkeypatch.setattr(train, "FITS", {arch: (2 * a, 2 * b) for arch, (a, b) in train.FITS.items()})
        for head, arch, size, gigabytes, *images in rows:
            said, head = int(images[double]), {"RetinaNet": "retinanet", "Mask R-CNN": "mask_rcnn"}[head]
            args = train.parse_args(["--arch", arch, "--size", size, "--head", head])
            recipe = train.resolve(args, model.ARCHS[arch])
            whole = [n for n in (said, said + 1) if train.split_batch(recipe | {"batch_size": n}, None, place) == n]
            assert whole == [said] and said * float(gigabytes) < (28 if double else 14), (head, arch, size)


def test_the_assignments_table():
    """Oracle: tools/make_assignment.py. There is a row for each, in order, with the lines that are blanked."""
    rows = re.findall(r"^\| (a\d) \| [^|]+ \| (\d+) \|", TEXT, re.MULTILINE)
    assert [name for name, _ in rows] == list(ASSIGNMENTS)
    for name, lines in rows:
        count = 0
        for function in ASSIGNMENTS[name].functions:
            module, qualified = function.split(".", 1)
            body = body_of((ROOT / f"{module}.py").read_text(), qualified)
            count += sum(bool(line.strip()) and not line.strip().startswith("#") for line in body)
        assert abs(int(lines) - count) <= 5, (name, count)


def test_the_worked_examples_of_a1():
    """Oracle: blocks.py. The steps, the pooled row and the numbers are what it makes."""
    resample = blocks.Resample(256, 64, 2, 1024, 5, 0.5)
    seen = []
    for part in (resample.squeeze, resample.down, resample.expand):
        part.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    resample(torch.empty(1, 256, 160, 160))
    assert [(out[1], out[2]) for _, out in seen] == [(32, 160), (32, 80), (1024, 20)] and seen[2][0][2] == 20
    row = torch.tensor([-5.0, -1, -7, -2, -8, -3, -6, -4]).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    assert blocks.max_pool_same(row, 3, 2)[0, 0, 0].tolist() == [-1, -2, -3, -4]
    for said in ("-5 -1 -7 -2 -8 -3 -6 -4 |", "| -1 -2 -3 -4 |", "| 1024 | 20 |", "= 0.0042", "= 0.0474", "0.0947"):
        assert said in TEXT, said
    assert f"{0.1 * 400 / (49 * 14**2):.4f}" == "0.0042" and f"{2 / 24 / 0.87962566:.4f}" == "0.0947"


def test_the_worked_examples_of_a2():
    """Oracle: the rows themselves, and the rule as tests/test_model.py has it. The table of block 3 adds up; the
    made-up table has the unresampled parent that is said; what is to be found in SPINE is said nowhere."""
    row = r"^\| [^|]*?(\d)×\d[^|]*? (\d+) → (\d+) \| ([\d,]+) \| (\d+) \| (\d+)² \| ([\d,]+) \|"
    rows = re.findall(row, TEXT, re.MULTILINE)
    assert len(rows) == 4
    rows = [[int(number.replace(",", "")) for number in row] for row in rows]
    for kernel, inputs, outputs, weights, norm, side, macs in rows:
        assert (weights, norm, macs) == (kernel**2 * inputs * outputs, 2 * outputs, weights * side**2)
    weights, norms, macs = (2 * sum(row[k] for row in rows) for k in (3, 4, 6))
    assert f"**{weights:,}** | **{norms:,}** | | **{macs:,}**" in TEXT and f"{weights + norms:,} parameters" in TEXT
    parent = [sum(row[k] for row in rows[:3]) for k in (3, 4, 6)]
    assert "| *one parent* | {:,} | {} | | {:,} |".format(*parent) in TEXT

    rows = re.findall(r"^\| (\d) \| (\d), (\w+)(, output)? \| (\d), (\d) \| [\d ]+ \| (.*)\|$", TEXT, re.MULTILINE)
    spine = [model.Block(int(n), int(L), kind, (int(a), int(b)), (), bool(out)) for n, L, kind, out, a, b, _ in rows]
    assert len(spine) == 8
    said = {int(row[0]): tuple(map(int, re.findall(r"as_is=\((\d),\)", row[-1]))) for row in rows if row[3]}
    assert said == unresampled(spine) == {6: (), 8: (7,)}
    assert not any(text in TEXT for _, text in ASSIGNMENTS["a2"].removed)


def test_the_worked_examples_of_a3_to_a8():
    """Oracle: the functions themselves. Each figure of the examples is what they make of the example's input."""
    anchors = torch.tensor([[0.0, 0, 20, 20], [16, 0, 36, 20]])
    boxes, labels = torch.tensor([[0.0, 0, 20, 16], [4, 0, 24, 20], [8, 8, 10, 10]]), torch.tensor([5, 3, 7])
    assert loss.match_anchors(anchors, boxes, labels)[0].tolist() == [5, -1]
    assert loss.match_anchors(anchors, boxes.flip(0), labels.flip(0))[0].tolist() == [7, -1]
    code = heads.encode_boxes(torch.tensor([4.0, 0, 24, 10]), anchors[0])
    assert code.tolist() == pytest.approx([0.2, -0.25, 0, -0.693], abs=1e-3)
    for logit, label, said in (
        (0, 0, "0.0613"),
        (0, -1, "0.1838"),
        (4, 0, "0.00001"),
        (4, -1, "2.93"),
        (-4.6, 0, "1.13"),
    ):
        value = loss.focal_loss(torch.tensor([[float(logit)]]), torch.tensor([label])).item()
        assert value == pytest.approx(float(said), abs=0.6 * 10.0 ** -len(said.split(".")[1])) and said in COURSE, said
    view = data.View(33, 0, 167, 100, 128, 96)
    for flip, said in ((False, "(0, 19.2, 83.1, 76.8)"), (True, "(44.9, 19.2, 128, 76.8)")):
        (box,) = view._replace(flip=flip).boxes(np.array([[20.0, 20, 120, 80]])).round(1).tolist()
        assert "({:g}, {:g}, {:g}, {:g})".format(*box) == said and said in COURSE
    toy = train.PROTOCOLS["toy"]
    corners = train.schedule(toy["epochs"], 38, toy["batch_size"], toy["lr"])
    for (step, rate), said in zip(corners, ("| 0 | 0.0067 / 16 = 0.00042", "106.4", "976", "1035")):
        assert f"{step:.4g}" in said and said in COURSE and f"{rate:.2g}"[-2:] in COURSE
    assert [list(data.micro_batches(0, 1, 8, 2, rank, 2)) for rank in (0, 1)] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    squares = torch.tensor([[0.0, 0, 224, 224], [0, 0, 448, 112], [0, 0, 112, 112], [0, 0, 30, 30]])
    assert heads.roi_levels(squares).tolist() == [4, 4, 3, 3]


# The house: seven files, each to be read at one sitting.


def parsed(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def test_the_files_are_short():
    """Oracle: counting. No file at the root, nor all together, nor the README, is longer than its limit."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(MODULES)
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in MODULES}
    assert {name: count for name, count in lines.items() if count > LIMITS[name]} == {}
    assert sum(lines.values()) <= 2655 and len(README.splitlines()) <= 220


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_long(name):
    """Oracle: counting. A function of more than 45 lines is usually two ideas; parse_args is a list of flags."""
    functions = [node for node in ast.walk(parsed(name)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {node.name for node in functions if node.end_lineno - node.lineno + 1 > 45}
    assert long <= {"parse_args"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    """Oracle: the order of MODULES. A file imports, at its top, from those before it; resolve_root alone imports where
    it needs it, the tool that writes the generated set. Up to model.py nothing but torch and torchvision is needed."""
    tree, late = parsed(name), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (name, node.name) == ("evaluate", "resolve_root"):
            late = {inner for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom)}
    assert {node.module for node in late} == ({"make_shapes"} if name == "evaluate" else set())
    imported = set()
    top = [inner for node in tree.body for inner in (node.body if isinstance(node, ast.With) else [node])]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in late:
            assert node in top, f"{name}.py:{node.lineno}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            imported |= {full.split(".")[0] for full in names}
    packages = {"torch", "torchvision"}
    if MODULES.index(name) > MODULES.index("model"):
        packages |= {"numpy", "PIL", "pycocotools", "tqdm"}
    assert imported - sys.stdlib_module_names <= packages | set(MODULES[: MODULES.index(name)])
