"""Faults in the middle of a run: kills, full disks, dead workers, overflows, errors on one rank. Nothing is lost."""

import functools
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import equal, rows

import data
import evaluate
import train
from evaluate import one_sentence
from model import UserError, load_checkpoint

ROOT = Path(__file__).parents[1]
SHORT = "--arch tiny --size 128 --protocol toy --device cpu --limit 8 --batch-size 4 --epochs 4 --workers 0".split()


def die_in_save():
    """SIGKILL between the writing of a checkpoint's draft and its renaming."""
    train.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)


def disk_fills_after_a_save():
    """From the second checkpoint on, no file may grow beyond 100 kB."""
    save = train.save

    def saving(path, parts, state, place):
        save(path, parts, state, place)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    train.save = saving


def worker_dies():
    """The worker that loads sample 27, in the seventh step, is killed, as by the system when memory runs out."""
    get = data.TrainSet.__getitem__

    def getting(self, n):
        if n == 27:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, n)

    data.TrainSet.__getitem__ = getting


def one_of_two(rank, port):
    """This process is a rank of two; on rank 1 the third step's box loss is not a number."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    step = train.train_step

    def stepping(*inputs):
        means, norm = step(*inputs)
        if rank == 1 and inputs[-1] == 2:
            means["box"] = means["box"] * torch.nan
        return means, norm

    train.train_step = stepping


def train_in_child(flags, said, prepare):
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method("fork", force=True)  # of the data workers, as in a run from the command line
    torch.set_num_threads(1)
    if prepare:
        prepare()
    with one_sentence():
        train.main(flags)


@pytest.fixture(scope="module")
def child():
    """A function that starts a training in a new process, forked from one that has only imported: quick, and clean."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def starting(flags, said, prepare=None):
        process = context.Process(target=train_in_child, args=([str(f) for f in flags], said, prepare))
        process.start()
        return process

    return starting


def to_its_end(process, code=0):
    process.join(120)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == code


@pytest.mark.slow
def test_kills_at_random_moments(child, shapes, tmp_path):
    """Oracle: the run that nobody killed. After each of 10 SIGKILLs, the first of them inside a save, last.pt is whole
    or not there yet; the run that goes on from it ends with the same bits, and its log has every step once."""
    said = tmp_path / "said.txt"
    for name in ("straight", "again"):  # the first start takes longer
        began = time.monotonic()
        to_its_end(child([*SHORT, "--data", shapes, "--out", tmp_path / name], said))
        seconds = time.monotonic() - began
    expected = load_checkpoint(tmp_path / "straight" / "last.pt")
    rng, killed, resumed = np.random.default_rng(0), 0, 0
    for k in range(10):
        out = tmp_path / str(k)
        flags = [*SHORT, "--data", shapes, "--out", out]
        process = child(flags, said, None if k else die_in_save)
        process.join(rng.uniform(0.3, 0.95) * seconds if k else 60)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if (out / "last.pt").exists():
            if load_checkpoint(out / "last.pt")["evaluated"] == expected["evaluated"]:
                assert equal(load_checkpoint(out / "last.pt"), expected)
                continue
            flags.append("--resume")
            resumed += 1
        to_its_end(child(flags, said))
        assert equal(load_checkpoint(out / "last.pt"), expected)
        steps = [row["step"] for row in rows(out) if "step" in row]
        assert steps == list(range(1, 9)) and sum("eval_step" in row for row in rows(out)) == 1
    assert killed >= 7 and resumed >= 3, (killed, resumed)


def test_a_full_disk(child, shapes, tmp_path):
    """Oracle: the checkpoint before. What can't be written is said in one sentence, with exit code 2; last.pt is whole,
    from before, and no draft takes the room that is left."""
    out, said = tmp_path / "out", tmp_path / "said.txt"
    to_its_end(child([*SHORT, "--data", shapes, "--out", out], said, disk_fills_after_a_save), code=2)
    assert load_checkpoint(out / "last.pt")["step"] == 2 and not (out / "last.tmp").exists()
    text = said.read_text()
    assert (
        f"error: could not write {out / 'last.pt'}" in text and "what it held is intact: make room and --resume" in text
    )
    assert "Traceback" not in text


def test_a_dead_worker(child, shapes, tmp_path):
    """Oracle: by hand. The sentence names what died and what to do; last.pt is from an epoch before."""
    out, said = tmp_path / "out", tmp_path / "said.txt"
    flags = [*SHORT, "--data", shapes, "--out", out, "--workers", "2"]
    to_its_end(child(flags, said, worker_dies), code=2)
    text = said.read_text()
    assert "error: DataLoader worker" in text and "use fewer --workers" in text and "Traceback" not in text
    assert load_checkpoint(out / "last.pt")["step"] in (2, 4, 6)


def overflowing(monkeypatch, made, scale, gradient):
    """Put a GradScaler of that scale, and gradients changed by a function, into the next run."""
    make_parts = train.make_parts

    def parts_with_float16(recipe, categories, place):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        parts = make_parts(recipe, categories, place) | {"scaler": scaler}
        made.extend((parts, [p.detach().clone() for p in parts["model"].parameters()]))
        for p in parts["model"].parameters():
            p.register_hook(gradient)
        return parts

    monkeypatch.setattr(train, "make_parts", parts_with_float16)


def test_an_overflow_is_skipped_and_counted(shapes, tmp_path, monkeypatch):
    """Oracle: the weights before. With gradients that overflow as float16's, steps change no weight, are counted and
    logged, and halve the scale."""
    made = []
    overflowing(monkeypatch, made, 2.0**40, lambda gradient: gradient.half().float())
    train.main([*SHORT, "--epochs", "1", "--data", str(shapes), "--out", str(tmp_path / "out")])
    parts, before = made
    assert parts["scaler"].get_scale() == 2.0**38
    assert all(torch.equal(a, b) for a, b in zip(before, parts["model"].parameters()))
    logged = [row for row in rows(tmp_path / "out") if "step" in row]
    assert [row["skipped"] for row in logged] == [1, 2] and all(row["grad_norm"] is None for row in logged)
    last = load_checkpoint(tmp_path / "out" / "last.pt")
    assert last["skipped"] == 2 and last["scaler"]["scale"] == 2.0**38


def test_fifty_overflows_in_a_row_end_the_run(shapes, tmp_path, monkeypatch, capsys):
    """Oracle: by hand. Of 50 steps that were skipped one after the other the run ends with what to try; the progress
    shows how many were. One good step between them, and it goes on."""
    monkeypatch.setattr(train, "MAX_SKIPPED", 5)
    monkeypatch.setattr(train, "PRINT_STEPS", 5)
    flags = [*SHORT, "--limit", "4", "--batch-size", "2", "--epochs", "4", "--eval-every", "4", "--data", str(shapes)]
    overflowing(monkeypatch, [], 2.0**16, lambda gradient: gradient * math.inf)
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--out", str(tmp_path / "stuck")])
    message = str(stop.value.code)
    assert "5 steps in a row overflowed float16, the last at step 5:" in message
    assert "try --amp off, a lower --lr" in message and load_checkpoint(tmp_path / "stuck" / "last.pt")["step"] == 4

    monkeypatch.undo()
    monkeypatch.setattr(train, "MAX_SKIPPED", 5)
    monkeypatch.setattr(train, "PRINT_STEPS", 5)
    steps = []
    weights = sum(1 for _ in train.build_model("tiny", num_classes=6).parameters())

    def nearly_always(gradient):
        steps.append(1)
        return gradient * (1 if (len(steps) - 1) // weights in (3, 6) else math.inf)

    overflowing(monkeypatch, [], 2.0**16, nearly_always)
    train.main([*flags, "--out", str(tmp_path / "well")])
    logged = [row for row in rows(tmp_path / "well") if "step" in row]
    assert len(logged) == 8 and logged[-1]["skipped"] == 6 and "skipped 4" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_under_float16(shapes, tmp_path, monkeypatch):
    """Oracle: by hand. The sentence names --amp off, since a resumed run would meet the same step again."""
    overflowing(monkeypatch, [], 1.0, lambda gradient: gradient)
    step = train.train_step

    def diverging(*given):
        means, norm = step(*given)
        return {name: value * math.nan for name, value in means.items()}, norm

    monkeypatch.setattr(train, "train_step", diverging)
    with pytest.raises(SystemExit) as stop:
        train.main([*SHORT, "--data", str(shapes), "--out", str(tmp_path / "out")])
    message = str(stop.value.code)
    assert "training diverged at step 1" in message and "try --amp off, a lower --lr" in message


@pytest.mark.parametrize(
    "error, sentence",
    [
        (UserError("a.json is empty"), "a.json is empty"),
        (UserError("Traceback: ...\nmodel.UserError: cannot decode a.jpg\n"), "cannot decode a.jpg"),
        (OSError(28, "No space left on device", "runs/log.jsonl"), "runs/log.jsonl .*No space left on device"),
        (OSError(24, "Too many open files"), "Too many open files"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "CUDA out of memory. Tried .*smaller --micro-batch"),
        (RuntimeError("DataLoader worker (pid 7) is killed\nby"), "DataLoader worker .pid 7. is killed .*--workers"),
    ],
)
def test_what_is_no_fault_of_the_code_is_one_sentence(error, sentence, capsys, monkeypatch):
    """Oracle: by hand. One line, exit code 2. Processes but a machine's first wait for 5 seconds before they say it."""
    slept = []
    monkeypatch.setattr(evaluate.time, "sleep", lambda seconds: slept.append((seconds, capsys.readouterr().err)))
    for local, waits in ((None, []), ("0", []), ("1", [(5, "")]), ("7", [(5, "")])):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local:
            monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit) as stop, one_sentence():
            raise error
        said = capsys.readouterr().err
        assert stop.value.code == 2 and slept == waits and said.count("\n") == 1
        assert re.fullmatch(f"error: .*{sentence}.*\n", said)
        slept.clear()


def test_a_fault_of_the_code_is_none(capsys, monkeypatch):
    """Oracle: by hand. Any other error passes as it is, at once, and so does a block that ends well."""
    monkeypatch.setattr(evaluate.time, "sleep", lambda seconds: pytest.fail("waited"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    for error in (RuntimeError("size mismatch"), ValueError("no"), KeyError("k"), SystemExit(1)):
        with pytest.raises(type(error)) as passed, one_sentence():
            raise error
        assert passed.value is error
    with one_sentence():
        pass
    assert capsys.readouterr().err == ""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_loss_that_is_not_finite_on_one_rank(child, shapes, tmp_path):
    """Oracle: by hand. Both ranks end at that step with exit code 1; one of them says step, losses and image ids, and
    last.pt is from the epoch before."""
    out, said, port = tmp_path / "out", tmp_path / "said.txt", free_port()
    flags = [*SHORT, "--data", shapes, "--out", out]
    ranks = [child(flags, said, functools.partial(one_of_two, rank, port)) for rank in (0, 1)]
    for rank in ranks:
        to_its_end(rank, code=1)
    text = said.read_text()
    a = data.load_annotations(shapes).select(slice(8))
    ids = [int(a.ids[k]) for k in data.permutation(0, 1, 8)[:4]]
    assert text.count("error: ") == 1 and "diverged at step 3: " in text and "box loss nan" in text
    assert f"image ids {ids}" in text and "Traceback" not in text
    assert load_checkpoint(out / "last.pt")["step"] == 2 and [row["step"] for row in rows(out)] == [1, 2]


def torchrun(*arguments):
    """What two processes of train.py print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", free_port(), ROOT / "train.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1, done  # torchrun's own, where a process has failed
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("flag", "--micro-batch 3 must divide"),
        pytest.param("folder", "nowhere/train2017", marks=pytest.mark.slow),
        pytest.param("json", "is not a COCO", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_all_ranks_is_said_once(fault, sentence, shapes, tmp_path):
    """Oracle: by hand. What both of two processes find, in the data or in the arguments, is said by one of them, and
    neither has a traceback (torchrun's own is not ours)."""
    flags = [*SHORT, "--data", shapes, "--out", tmp_path / "out"]
    if fault == "folder":
        flags += ["--data", tmp_path / "nowhere"]
    elif fault == "json":
        (tmp_path / "set" / data.TRAIN).mkdir(parents=True)
        (tmp_path / "set" / "annotations").mkdir()
        data.split_paths(tmp_path / "set", data.TRAIN)[0].write_text("{}")
        flags += ["--data", tmp_path / "set"]
    else:
        flags += ["--micro-batch", "3"]
    said = torchrun(*flags)
    assert said.count("error: ") == 1 and len(re.findall(f"error: .*{sentence}", said)) == 1, said
    assert "rank0]: Traceback" not in said and "rank1]: Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.parametrize("split", [data.TRAIN, data.VAL])
def test_an_error_on_one_rank_ends_all(split, shapes, tmp_path):
    """Oracle: the clock of torchrun. An image that can't be read on one rank, in training or in the evaluation, ends
    the job within a minute, with that rank's sentence; last.pt is from before the evaluation."""
    root = tmp_path / "set"
    (root / split).mkdir(parents=True)
    (root / "annotations").symlink_to(shapes / "annotations")
    other = data.VAL if split == data.TRAIN else data.TRAIN
    (root / other).symlink_to(shapes / other)
    for path in (shapes / split).iterdir():
        (root / split / path.name).symlink_to(path)
    a = data.load_annotations(root, split)
    number = data.permutation(0, 0, 8)[7] if split == data.TRAIN else 1  # rank 1's in the second step; rank 1's
    victim = Path(a.path(number))
    victim.unlink()
    victim.write_bytes(b"not an image")
    began = time.monotonic()
    said = torchrun(*SHORT, "--eval-every", "2", "--data", root, "--out", tmp_path / "out")
    assert time.monotonic() - began < 90  # a minute, and the start
    assert f"error: cannot decode {victim} (image id {a.ids[number]})" in said
    if split == data.VAL:
        assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 4
