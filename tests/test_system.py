"""Machines as they are: launchers, folders that two want, streams, Ctrl-C, other systems."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from make_assignment import ROOT
from test_data import write_coco

import evaluate
import train
from data import TRAIN, VAL
from evaluate import hold, launched, one_sentence
from model import UserError, load_checkpoint

TINY = "--arch tiny --size 128 --protocol toy --epochs 1 --batch-size 2 --device cpu --workers 0".split()
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500", "MASTER_ADDR": "localhost"}
BOX = [1, 2, 30, 20]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """None of a launcher's variables is set."""
    for name in (*LAUNCHED, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def script(name, *flags, **options):
    """A script of the project, started in a process of its own; what it prints goes into pipes."""
    command = [sys.executable, ROOT / name, *flags]
    return subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_launcher(monkeypatch):
    """Oracle: torchrun's variables. All of them, or none, or those of one process alone."""
    assert launched() == (0, 1, 0)
    for alone in ({"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"MASTER_ADDR": "here"}):
        with monkeypatch.context() as patch:
            for name, value in alone.items():
                patch.setenv(name, value)
            assert launched() == (0, 1, 0)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert launched() == (1, 2, 1)
    for name in LAUNCHED:  # an image of docker that sets them to nothing
        monkeypatch.setenv(name, " ")
    assert launched() == (0, 1, 0)


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("value", [None, "", "a b", "-1", "1.5", "65536"])
def test_half_a_launcher(name, value, monkeypatch):
    """Oracle: by hand. One of its variables lacking, empty or no number: a sentence that names it and torchrun. An
    address may be any text."""
    for other, sound in LAUNCHED.items():
        monkeypatch.setenv(other, sound)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    if name == "MASTER_ADDR" and value:
        assert launched() == (1, 2, 1)
    else:
        with pytest.raises(
            UserError, match=f"the launcher's {name} is '{value or ''}'; start with torchrun, or unset RANK"
        ):
            launched()


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"])
def test_tasks_of_slurm_without_torchrun(name, monkeypatch):
    """Oracle: by hand. Several tasks and no rank are as many runs: the sentence names torchrun, which sets a rank."""
    monkeypatch.setenv(name, "1")
    assert launched() == (0, 1, 0)
    monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match="SLURM has 4 tasks, each a run of its own; let srun start one torchrun per"):
        launched()
    for other, value in LAUNCHED.items():
        monkeypatch.setenv(other, value)
    assert launched() == (1, 2, 1)


@pytest.mark.parametrize("value", ["", "0", "many", "2"])
def test_the_number_of_local_processes(value, monkeypatch):
    """Oracle: by hand. Whatever LOCAL_WORLD_SIZE says, the flags are read, and a number of workers is found."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert 0 <= train.parse_args([]).workers <= 8


def test_processes_that_do_not_find_each_other(capsys):
    """Oracle: torch's message. An address that nobody has is one sentence."""
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise dist.DistNetworkError("The client socket has failed to connect to nowhere:29500.\nmore")
    said = "error: the processes don't find each other: The client socket has failed to connect to nowhere:29500.\n"
    assert stop.value.code == 2 and capsys.readouterr().err == said


def take(folder, pipe):
    """Hold a folder, say whether that went well, and keep it until told to go."""
    try:
        lock = hold(folder)
        pipe.send("mine")
    except UserError as error:
        lock = None
        pipe.send(str(error))
    pipe.recv()
    del lock


@pytest.fixture
def holder(tmp_path):
    """A function that starts a process which holds tmp_path: (the process, its pipe, what it said)."""
    context, started = multiprocessing.get_context("spawn"), []

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=take, args=(tmp_path, theirs))
        process.start()
        started.append(process)
        return process, ours, ours.recv() if ours.poll(60) else "hung"

    yield start
    for process in started:
        process.kill()


def test_a_folder_is_one_process_s(holder, tmp_path):
    """Oracle: by hand. The second to come is refused, whatever started it; after the first's death the folder is
    free."""
    first, _pipe, said = holder()
    assert said == "mine"
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} is in use by another process; give another --out")):
        hold(tmp_path)
    first.kill()
    first.join(30)
    hold(tmp_path).close()


def test_a_second_run_in_the_same_folder(holder, shapes, tmp_path, capsys):
    """Oracle: by hand. train.py refuses a folder in which another process trains, and leaves it as it was."""
    process, pipe, said = holder()
    assert said == "mine"
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match="is in use by another process"):
        train.main([*TINY, "--data", str(shapes), "--out", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == before and process.is_alive() and not pipe.closed


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Oracle: by hand. Where there are no locks, or no fcntl, a run starts without one."""

    def none(*given):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(evaluate.fcntl, "lockf", none)
    hold(tmp_path).close()
    monkeypatch.delattr(evaluate, "fcntl")
    hold(tmp_path).close()


@pytest.mark.parametrize(
    "error, says",
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. Raise your shared memory limit."),
            "Bus",
        ),
        (
            RuntimeError("Caught RuntimeError\nunable to write to file </torch_7_8_9>: No space left on device (28)"),
            "/torch_7",
        ),
        (RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device"), "unable"),
    ],
)
def test_shared_memory_is_full(error, says, capsys):
    """Oracle: torch's messages of /dev/shm's end, 64 MB in docker. The sentence has both cures."""
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise error
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and said.count("\n") == 1
    assert "docker run --shm-size 8g, or --workers 0" in said


@pytest.mark.parametrize("what", ["folder", "json"])
def test_what_may_not_be_read(what, tmp_path, monkeypatch, capsys):
    """Oracle: by hand. A folder or a json without permission can't be read; it is neither missing nor wrong."""
    root = write_coco(tmp_path, [[BOX]])
    path = root / TRAIN if what == "folder" else root / "annotations" / f"instances_{TRAIN}.json"

    def forbidden(given, real):
        if Path(given) == path:
            raise PermissionError(13, "Permission denied", str(given))
        return real(given)

    for owner, name in ((os, "listdir"), (Path, "read_bytes")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda given=".", real=real: forbidden(given, real))
    with pytest.raises(SystemExit) as stop, one_sentence():
        train.main([*TINY, "--data", str(root), "--out", str(tmp_path / "out")])
    assert (
        stop.value.code == 2
        and f"error: {path} can't be read or written: Permission denied\n" == capsys.readouterr().err
    )


def classes(checkpoint):
    """A change that gives a json the classes of a checkpoint."""
    return lambda content: content.update(categories=[{"id": k, "name": name} for k, name in checkpoint["categories"]])


def test_names_that_the_terminal_lacks(run, tmp_path):
    """Oracle: by hand. On a terminal of ASCII a class of other letters is printed in escapes, and results.json, which
    is written first, is there."""
    checkpoint = load_checkpoint(run / "best.pt")
    checkpoint["categories"] = [[k, f"\u6b62\u8840\u94b3 \U0001f436 {k}"] for k, _ in checkpoint["categories"]]
    torch.save(checkpoint, tmp_path / "best.pt")
    root = write_coco(tmp_path / "set", [[BOX]], split=VAL, change=classes(checkpoint))
    flags = ["--weights", tmp_path / "best.pt", "--data", root, "--per-class", "--device", "cpu", "--workers", "0"]
    done = script("evaluate.py", *flags, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    printed, said = done.communicate(timeout=120)
    assert done.returncode == 0 and r"\u6b62\u8840\u94b3" in printed and r"\U0001f436" in printed, said
    assert (tmp_path / "results.json").exists()


def left_over(*words):
    """The command lines of processes that have one of these words in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if any(str(word) in line for word in words) and str(os.getpid()) != path.parent.name:
            found.append(line)
    return found


@pytest.mark.parametrize(
    "name, flags, until",
    [
        ("evaluate.py", ["--workers", "2", "--micro-batch", "1", "--device", "cpu"], "workers"),
        ("train.py", [*TINY[:-1], "2", "--overfit", "2"], "train: "),
        ("tools/look.py", ["--check", "--split", TRAIN], f"{TRAIN}: "),
    ],
)
def test_ctrl_c(name, flags, until, run, shapes, tmp_path):
    """Oracle: by hand. One line, exit code 130, no process left: in evaluation, before training's first step, in a
    tool."""
    root = tmp_path / "set"
    big = write_coco(
        root, [[BOX]] * 400, size=(640, 480), split=TRAIN if name != "evaluate.py" else VAL, names=("disc",)
    )
    weights = ["--weights", run / "best.pt", "--out", tmp_path] if name == "evaluate.py" else []
    process = script(
        name, *flags, *weights, "--data", big, start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    if until == "workers":
        began = time.monotonic()
        while time.monotonic() - began < 60 and len(os.listdir(f"/proc/{process.pid}/task")) < 2:
            time.sleep(0.02)
        while time.monotonic() - began < 60 and len(left_over(root)) < 3:
            time.sleep(0.02)
    else:
        for line in process.stdout:
            if line.startswith(until):
                break
    os.killpg(process.pid, signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode in ((130,) if name != "train.py" else (130, 0)), (printed, said)
    assert "Traceback" not in said and (process.returncode == 0 or said.splitlines()[-1] == "interrupted"), said
    began = time.monotonic()
    while left_over(root) and time.monotonic() - began < 20:
        time.sleep(0.1)
    assert left_over(root) == []


def test_systems_without_some_modules(tmp_path):
    """Oracle: Windows' Python, which lacks these modules and functions. Every script can be imported."""
    for module in ("resource", "fcntl", "pwd", "grp", "termios"):
        (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('no {module}', name='{module}')\n")
    lacking = "import os, sys\nfor name in ('setpgrp', 'getuid', 'fork'):\n    delattr(os, name)\n"
    paths = [str(tmp_path), str(ROOT), str(ROOT / "tools")]
    scripts = ["train", "evaluate", *(path.stem for path in (ROOT / "tools").glob("*.py"))]
    code = f"{lacking}sys.path[:0] = {paths}\nimport {', '.join(scripts)}\nprint(evaluate.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "evaluate.py" in done.stdout, done.stderr


# Splits as they come.


def flags_of(root, out, *more):
    return [*TINY, "--data", str(root), "--out", str(out), *more]


def both_splits(root, train_change=None, val_change=None, names=("a", "b")):
    """A set of 4 and 2 images of two classes."""
    write_coco(root, [[BOX, BOX]] * 4, change=train_change, names=names)
    return write_coco(root, [[BOX, BOX]] * 2, change=val_change, names=names, split=VAL)


def only(k):
    """A change that keeps one class."""

    def change(content):
        content["categories"] = [c for c in content["categories"] if c["id"] == k]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == k]

    return change


@pytest.mark.parametrize("k", [1, 2])
def test_a_validation_split_of_fewer_classes(k, tmp_path):
    """Oracle: by hand. It is taken, its labels in the order of training's classes."""
    args = train.parse_args(flags_of(both_splits(tmp_path / "set", None, only(k)), tmp_path / "out"))
    training, val = train.load_splits(args, train.resolve(args))
    assert val.categories == training.categories == [(1, "a"), (2, "b")] and val.labels.tolist() == [k - 1] * 2


@pytest.mark.parametrize("change", [lambda c: c["categories"][0].update(name="z"), lambda c: c["categories"].append(
    {"id": 3, "name": "c"})])  # fmt: skip
def test_a_validation_split_of_other_classes(change, tmp_path):
    """Oracle: by hand. A class by another name, or one more, is refused by its name."""
    args = train.parse_args(flags_of(both_splits(tmp_path / "set", None, change), tmp_path / "out"))
    with pytest.raises(UserError, match=r"1 classes to evaluate are not trained, as \[\((1, 'z'|3, 'c')\)\], against"):
        train.load_splits(args, train.resolve(args))


def crowds(content):
    for row in content["annotations"]:
        row["iscrowd"] = 1


@pytest.mark.parametrize("change, says", [
    (crowds, r"has no object to train on but crowds \(iscrowd 1\)"), (only(7), "categories"),
    (lambda c: c["annotations"].clear(), "has no object to train on$"),
    (lambda c: c.pop("annotations") and None, "has no object to train on$")])  # fmt: skip
def test_nothing_to_train_on(change, says, tmp_path):
    """Oracle: by hand. A training split without an object is refused, and where all are crowds the sentence says so."""
    with pytest.raises(UserError, match=says):
        train.main(flags_of(both_splits(tmp_path / "set", change), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [crowds, lambda c: c["annotations"].clear()])
def test_no_metric_is_no_best(change, tmp_path, capsys):
    """Oracle: by hand. Where there is nothing to find, AP is -1: best.pt is then the latest, and the run says so; the
    first AP that is one is better."""
    root = both_splits(tmp_path / "set", None, change)
    train.main(flags_of(root, tmp_path / "out", "--epochs", "2", "--eval-every", "1"))
    assert load_checkpoint(tmp_path / "out" / "best.pt")["step"] == 4
    printed = capsys.readouterr().out
    assert printed.count("without an AP to compare, best.pt is the latest") == 2
    write_coco(root, [[BOX, BOX]] * 2, names=("a", "b"), split=VAL)
    train.main(flags_of(root, tmp_path / "out", "--epochs", "3", "--eval-every", "3", "--resume"))
    best = load_checkpoint(tmp_path / "out" / "best.pt")
    assert best["step"] == 6 and best["best"] >= 0


def test_any_json_and_its_images(tmp_path, capsys):
    """Oracle: COCO's layout. A set whose jsons lie elsewhere trains and is evaluated as the same set in that layout."""
    root = both_splits(tmp_path / "set")
    other = tmp_path / "other"
    pairs = {}
    for split, name in ((TRAIN, "train"), (VAL, "valid")):
        (other / name).mkdir(parents=True)
        for path in (root / split).iterdir():
            os.link(path, other / name / path.name)
        content = (root / "annotations" / f"instances_{split}.json").read_text()
        (other / name / "_annotations.coco.json").write_text(content)
        pairs[name] = [str(other / name / "_annotations.coco.json"), str(other / name)]
    train.main(flags_of(root, tmp_path / "a"))
    train.main([*TINY, "--train", *pairs["train"], "--val", *pairs["valid"], "--out", str(tmp_path / "b")])
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert a["best"] == b["best"] and all(torch.equal(v, b["model"][name]) for name, v in a["model"].items())
    capsys.readouterr()
    train.main([*TINY, "--train", *pairs["train"], "--out", str(tmp_path / "c")])
    assert f"evaluating on {TRAIN}: the same images" in capsys.readouterr().out
    weights = [
        "--weights",
        str(tmp_path / "b" / "best.pt"),
        "--device",
        "cpu",
        "--workers",
        "0",
        "--out",
        str(tmp_path),
    ]
    evaluate.main([*weights, "--val", *pairs["valid"]])
    assert "evaluated 2/2 images" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["test2017", "test-dev2017"])
@pytest.mark.parametrize("annotations", [True, False])
def test_images_without_truth(folder, annotations, run, tmp_path, capsys):
    """Oracle: COCO's test-dev. image_info_test-dev2017.json of the images in test2017, with or without a list of no
    annotations: results.json is written, and that there is no truth to score is said."""
    root = write_coco(tmp_path / "set", [[], []], split="test", change=classes(load_checkpoint(run / "best.pt")))
    (root / "test").rename(root / folder)
    info = root / "annotations" / "image_info_test-dev2017.json"
    (root / "annotations" / "instances_test.json").rename(info)
    if not annotations:
        info.write_text(json.dumps({k: v for k, v in json.loads(info.read_text()).items() if k != "annotations"}))
    flags = ["--weights", str(run / "best.pt"), "--device", "cpu", "--workers", "0", "--out", str(tmp_path)]
    evaluate.main([*flags, "--data", str(root), "--split", "test-dev2017"])
    printed = capsys.readouterr().out
    assert "evaluated 2/2 images" in printed and "there is no truth to score" in printed
    assert isinstance(json.loads((tmp_path / "results.json").read_text()), list)
