"""train.py: the learning rate, the recipe, exact resume, several processes, and what happens when things go wrong."""

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
import heads
import train
from data import TrainSet, load_annotations, make_loader, micro_batches
from evaluate import Place, finish, try_device
from model import ARCHS, HEADS, Arch, UserError, build_model, load_checkpoint, load_model, load_weights
from train import PROTOCOLS, lr_at, main, make_optimizer, parse_args, read_step, resolve, save, split_batch, train_step

ROOT = Path(train.__file__).parent
CPU = Place(torch.device("cpu"))
TINY = ["--arch", "tiny", "--size", "128", "--protocol", "toy", "--device", "cpu"]


def test_learning_rate_of_the_official_schedule():
    """Oracle: the authors' step counts, 463 per epoch at 256: warm-up of 2000 steps, drops at 320/340 and 470/490."""
    for epochs, first, second in ((350, 320, 340), (500, 470, 490), (250, 220, 240)):
        rate = {k: lr_at(k, epochs=epochs, steps_per_epoch=463) for k in range(0, 2001, 500)}
        assert list(rate.values()) == pytest.approx([0.0067, 0.075025, 0.14335, 0.211675, 0.28])
        for drop, before, after in ((first, 0.28, 0.028), (second, 0.028, 0.0028)):
            assert lr_at(drop * 463 - 1, epochs, 463) == pytest.approx(before)
            assert lr_at(drop * 463, epochs, 463) == pytest.approx(after)
        assert lr_at(epochs * 463 - 1, epochs, 463) == pytest.approx(0.0028)


def test_learning_rate_of_other_batches_and_short_runs():
    """Oracle: SPEC by hand. Linear scaling with the batch; under 60 epochs the drops are shares of the run."""
    assert lr_at(0, 350, 1849, batch_size=64) == pytest.approx(0.0067 / 4)
    assert lr_at(4000, 350, 1849, batch_size=64) == pytest.approx((0.0067 + 0.28) / 2 / 4)
    assert lr_at(8000, 350, 1849, batch_size=64) == pytest.approx(0.07)
    assert lr_at(100000, 350, 529, batch_size=224, lr=0.28) == pytest.approx(0.245)
    short = [lr_at(k, 36, 10, batch_size=256, lr=0.8) for k in range(360)]
    assert short[18] == pytest.approx((0.0067 + 0.8) / 2) and short[36] == pytest.approx(0.8)
    assert short[329] == pytest.approx(0.8) and short[330] == pytest.approx(0.08)
    overfit = [lr_at(k, 200, 1, batch_size=8, lr=1.2) for k in (0, 20, 169, 170, 190)]
    assert overfit == pytest.approx([0.0067 / 32, 0.0375, 0.0375, 0.00375, 0.000375])
    assert short[349] == pytest.approx(0.08) and short[350] == pytest.approx(0.008)


def recipe_of(*flags):
    return resolve(parse_args([str(flag) for flag in flags]))


def test_protocols():
    """Oracle: the paper's protocols and the authors' yaml files."""
    a, b, c = (SimpleNamespace(**PROTOCOLS[name]) for name in "ABC")
    assert [p.jitter for p in (a, b, c)] == [[0.8, 1.2], [0.5, 2.0], [0.5, 2.0]]
    assert [p.epochs for p in (a, b, c)] == [250, 350, 500]
    assert [(p.activation, p.drop_path, p.drop_rate) for p in (a, b, c)] == [
        ("relu", 0, 0.1),
        ("relu", 0, 0),
        ("swish", 0.2, 0),
    ]
    assert {(p.batch_size, p.lr, p.clip, p.flip) for p in (a, b, c)} == {(256, 0.28, 10.0, True)}
    rois = [recipe_of("--protocol", name, "--head", "mask_rcnn") for name in "ABC"]
    assert {(recipe["rois"], recipe["mask_rois"], recipe["clip"]) for recipe in rois} == {(512, 128, math.inf)}


def test_recipe_rows_exceptions_and_flags():
    """Oracle: by hand. A row, its exception for an arch, --overfit, and flags, in this order."""
    default = recipe_of()
    assert (default["arch"], default["size"], default["head"], default["epochs"]) == ("49", 640, "retinanet", 350)
    exception = recipe_of("--arch", 190, "--protocol", "C")
    assert (exception["epochs"], exception["lr"], exception["jitter"]) == (400, 0.3, [0.1, 1.9])
    assert recipe_of("--arch", 143, "--protocol", "C")["drop_path"] == 0.16
    masks = recipe_of("--arch", 190, "--size", 1536, "--protocol", "C", "--head", "mask_rcnn")
    assert (masks["epochs"], masks["lr"], masks["jitter"], masks["activation"]) == (400, 0.28, [0.1, 2.0], "swish")
    assert (masks["clip"], masks["rois"], masks["mask_rois"], masks["drop_path"]) == (math.inf, 512, 128, 0.2)
    assert default["clip"] == 10 and "rois" not in default and "mask_rois" not in default
    assert recipe_of("--arch", 143, "--jitter", 0.1, 1.9)["jitter"] == [0.1, 1.9]
    toy = recipe_of("--arch", 49, "--protocol", "toy", "--head", "mask_rcnn")
    assert (toy["rois"], toy["mask_rois"], toy["epochs"], toy["eval_every"]) == (64, 16, 28, 14)
    tiny = recipe_of("--arch", "tiny", "--protocol", "toy", "--head", "mask_rcnn")
    assert (tiny["rois"], tiny["mask_rois"], tiny["epochs"], tiny["eval_every"]) == (64, 16, 18, 9)
    overfit = recipe_of("--overfit", 8, "--epochs", 7)
    assert (overfit["jitter"], overfit["flip"], overfit["batch_size"], overfit["epochs"]) == ([1, 1], False, 8, 7)
    assert default["network"] == ARCHS["49"].plain()
    assert PROTOCOLS["B"]["jitter"] == [0.5, 2.0] and PROTOCOLS["B"]["epochs"] == 350  # the tables stay as they are


@pytest.mark.parametrize("head", HEADS)
def test_weight_decay_groups(head):
    """Oracle: by hand. Decay 4e-5 on the weights of convolutions and linear layers, never on a bias or batch norm."""
    model = build_model("tiny", head, 3)
    decayed, others = make_optimizer(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 4e-5 and others["weight_decay"] == 0 and decayed["momentum"] == 0.9
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    assert {names[id(p)] for p in decayed["params"]} == {names[id(m.weight)] for m in layers}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_batch_is_split_the_same_everywhere():
    """Oracle: arithmetic. The micro-batch is what the table says fits, or what is given; it divides the share."""
    half = CPU._replace(amp=torch.bfloat16)  # 16 GB are assumed of a CPU
    for world, micro, expected in ((8, None, 16), (1, None, 16), (8, 4, 4), (2, 128, 128), (32, None, 8)):
        assert split_batch(recipe_of(), micro, half._replace(world=world)) == expected
    assert split_batch(recipe_of(), None, CPU) == 8  # float32 takes twice the memory
    assert split_batch(recipe_of("--protocol", "A"), None, half) == 8  # DropBlock 1.46 times
    assert split_batch(recipe_of("--protocol", "C", "--batch-size", 22), None, half) == 11  # 15 fit with swish
    assert split_batch(recipe_of("--batch-size", 224), 28, CPU._replace(world=8)) == 28
    assert split_batch(recipe_of("--arch", 96, "--size", 1024), None, half._replace(world=8)) == 4
    assert split_batch(recipe_of("--arch", 49, "--size", 896), None, half._replace(world=8)) == 8
    assert split_batch(recipe_of("--arch", 190, "--size", 1280, "--protocol", "C"), None, half) == 1
    with pytest.raises(UserError, match="--batch-size 256 doesn't divide into 3 devices"):
        split_batch(recipe_of(), None, CPU._replace(world=3))


def test_default_batch_at_other_sizes():
    """Oracle: arithmetic. What fits goes with the image's area; Mask R-CNN's, whose RoIs need the same at any size, is
    no larger below 640. An arch that is not in the table gets one image of 640 x 640."""
    half, retinanet, masks = CPU._replace(amp=torch.bfloat16), [], []
    for size in (128, 384, 640, 1280):
        flags = ("--size", size, "--batch-size", 1024)
        retinanet.append(split_batch(recipe_of(*flags), None, half))
        masks.append(split_batch(recipe_of(*flags, "--head", "mask_rcnn"), None, half))
    assert retinanet == [512, 32, 16, 4]  # of 575, 63.9, 23 and 5.75
    assert masks == [8, 8, 8, 2]  # of 14, 14, 14 and 3.5
    for size, expected in ((640, 1), (128, 16), (1280, 1)):
        assert split_batch(recipe_of("--size", size) | {"arch": "own"}, None, half) == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "600"], "--size is 600, but must be a multiple of 128"),
        (["--workers", "-1"], "--workers is -1, but must be at least 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--epochs", "-1"], "--epochs is -1"),
        (["--jitter", "2", "0.5"], "LOW <= HIGH"),
        (["--overfit", "0"], "--overfit is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--batch-size", "16", "--micro-batch", "5"], "--micro-batch 5 must divide 16"),
        (["--micro-batch", "0"], "--micro-batch is 0"),
        (["--eval-every", "0"], "--eval-every is 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--lr", "-1"], "--lr is -1"),
        (["--jitter", "nan", "1"], "LOW <= HIGH"),
        (["--size", "128", "--micro-batch", "1"], "single value per channel"),
        (["--data", "nowhere"], "nowhere/train2017 and nowhere/annotations.* not found"),
        (["--resume", "gone.pt"], "no checkpoint at gone.pt"),
        (["--weights", "gone.pt"], "no checkpoint at gone.pt"),
        (["--amp", "fp16"], "--amp fp16 needs a CUDA device"),
        (["--limit", "0"], "--limit is 0"),
        (["--out", __file__ + "/out"], "the folder .*test_train.py/out can't be made"),
        (["--jitter", "1", "inf"], "--jitter"),
        (["--overfit", "-3"], "--overfit is -3"),
    ],
)
def test_bad_arguments(flags, message, shapes, tmp_path):
    """Oracle: by hand. Each mistake is one sentence that says what and where, before anything is written."""
    with pytest.raises(UserError, match=message):
        main([*TINY, "--data", str(shapes), "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, values", [("--arch", ARCHS), ("--protocol", PROTOCOLS), ("--head", HEADS)])
def test_unknown_names(flag, values, capsys):
    """Oracle: the tables. What is not in a table is refused with exit code 2, and the names that are in it."""
    with pytest.raises(SystemExit) as stop:
        parse_args([flag, "52"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and flag in said and all(name in said for name in values)


def test_resume_and_weights_exclude_each_other(capsys):
    """Oracle: by hand. A run goes on with its own weights: both flags together are refused, and both are named."""
    with pytest.raises(SystemExit) as stop:
        parse_args(["--resume", "--weights", "a.pt"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--weights: not allowed with argument --resume" in said


def test_cuda_asked_for_and_absent(monkeypatch, shapes, tmp_path):
    """Oracle: by hand. The sentence says what torch finds."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--device cuda: torch .* finds 0 CUDA devices"):
        main([*TINY[:-1], "cuda", "--data", str(shapes), "--out", str(tmp_path / "out")])


def test_a_device_that_this_torch_has_no_kernels_for(monkeypatch):
    """Oracle: the message of CUDA on a V100 under torch 2.11. It becomes a sentence with the pip line; a device without
    memory left stays what it is, and what computes is accepted."""

    def failing(error):
        def raising(*inputs):
            raise error

        return raising

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    try_device(CPU)
    lines = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be"
    monkeypatch.setattr(torch.nn, "Conv2d", failing(RuntimeError(lines)))
    with pytest.raises(UserError) as refused:
        try_device(CPU)
    said = str(refused.value)
    assert f"torch {torch.__version__} can't compute on this device (CUDA error: no kernel image" in said
    assert "pip install torch==2.10.0 torchvision==0.25.0" in said and "\n" not in said
    monkeypatch.setattr(torch.nn, "Conv2d", failing(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        try_device(CPU)


def test_the_first_use_of_cuda_is_tried(monkeypatch):
    """Oracle: by hand. On a machine whose torch says it has a GPU, `start` tries it before anything else."""
    tried = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(evaluate, "try_device", tried.append)
    for capability, amp in (((7, 0), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        place = evaluate.start("cuda")
        assert place == Place(torch.device("cuda:0"), amp=amp) and tried[-1] == place
    assert len(tried) == 2 and evaluate.start("cpu") == CPU and len(tried) == 2


def python(*arguments, code=0, **options):
    """Run a script in a process of its own, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_missing_coco(tmp_path):
    """Oracle: by hand. The default command without COCO: every missing path, what to do, exit code 2, no traceback."""
    out = python(ROOT / "train.py", "--arch", "49", "--size", "640", "--protocol", "B", cwd=tmp_path, code=2)
    for part in ("data/coco/train2017", "instances_train2017.json", "wget", "--data shapes"):
        assert part in out
    assert "Traceback" not in out and out.count("error:") == 1


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equal(first, second):
    """Whether two checkpoints are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@pytest.mark.parametrize(
    "how, head, protocol", [(signal.SIGTERM, "retinanet", "C"), (signal.SIGKILL, "mask_rcnn", "toy")]
)
def test_resume_is_exact(how, head, protocol, shapes, tmp_path):
    """Oracle: the run that was not interrupted. Weights, momentum, best AP and log are the same to the last bit after a
    kill or a polite stop in mid-epoch, with two workers, jitter, stochastic depth or sampled RoIs."""
    flags = "--limit 16 --batch-size 4 --micro-batch 2 --epochs 2 --eval-every 1 --workers 2".split()
    command = [ROOT / "train.py", *TINY, *flags, "--head", head, "--protocol", protocol, "--data", shapes]
    python(*command, "--out", tmp_path / "straight")
    broken = tmp_path / "broken"
    victim = subprocess.Popen(
        [sys.executable, *map(str, command), "--out", str(broken)], stdout=subprocess.PIPE, text=True
    )
    while not (broken / "log.jsonl").exists() or '"step": 6' not in (broken / "log.jsonl").read_text():
        assert victim.poll() is None
        time.sleep(0.02)
    victim.send_signal(how)
    printed = victim.communicate(timeout=60)[0]
    stopped_at = load_checkpoint(broken / "last.pt")["step"]
    if how == signal.SIGTERM:
        assert victim.returncode == 0 and "go on with --resume" in printed and 6 <= stopped_at < 8
    else:
        assert victim.returncode == -signal.SIGKILL and stopped_at == 4
    assert "resuming at step" in python(*command, "--out", broken, "--resume")

    straight, resumed = (load_checkpoint(out / "last.pt") for out in (tmp_path / "straight", broken))
    assert straight["step"] == 8 and equal(straight, resumed)
    times = {"seconds", "waited"}
    logs = [
        [{k: v for k, v in row.items() if k not in times} for row in rows(out)]
        for out in (tmp_path / "straight", broken)
    ]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0] if "step" in row] == list(range(1, 9))
    assert [row["eval_step"] for row in logs[0] if "eval_step" in row] == [4, 8]


def new_model(head):
    options = {"rois": 32, "mask_rois": 8} if head == "mask_rcnn" else {}
    return build_model("tiny", head, 6, **options)


def fixed_proposals(objectness, codes, anchors, sizes, candidates):
    """The same boxes for every image: between real ones near ties can fall otherwise in a batch of another size."""
    return [torch.cat(anchors)[::4].clamp(0, 128)] * len(sizes)


def steps_in_a_process(rank, world, micro, accumulate, root, folder, empty_rank, training, head):
    """Three steps of one of `world` processes; rank 0 saves the parameters it ends with."""
    torch.set_num_threads(1)
    if not training:
        heads.propose = fixed_proposals
    place = CPU._replace(rank=rank, world=world)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}{micro}", rank=rank, world_size=world)
    torch.manual_seed(0)
    annotations = load_annotations(root, masks=HEADS[head].masks)
    model = new_model(head).train(training)
    optimizer, scaler = make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    batch = world * micro * accumulate
    loader = make_loader(TrainSet(annotations, 128, (0.8, 1.2)), micro_batches(0, 3, batch, micro, rank, world), 0)

    def batches():
        for sample in loader:
            if empty_rank is not None:  # as if these images had no objects
                half = torch.arange(rank * micro, (rank + 1) * micro) // (world * micro // 2) == empty_rank
                sample["boxes"][half], sample["labels"][half] = 0, -1
            yield sample

    stream, recipe = batches(), {"seed": 0, "clip": 10.0}
    for step in range(3):
        some = [next(stream) for _ in range(accumulate)]
        means, norm = train_step(wrapped, some, recipe, optimizer, scaler, 0.02, place, step)
        losses, norm, _ = read_step(means, norm, False, place)
        assert np.isfinite([*losses.values(), norm]).all()
    if rank == 0:
        torch.save((model.state_dict(), losses), f"{folder}/{world}_{micro}.pt")
    finish(place)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("accumulate, empty_rank", [pytest.param(1, None, marks=pytest.mark.slow), (2, None), (1, 1)])
def test_two_processes_equal_one(accumulate, empty_rank, head, shapes, tmp_path):
    """Oracle: a single process with twice the micro-batch. What 3 steps change of the parameters agrees, and the
    losses do, with accumulation on both sides, too, and where one rank has only images without objects (batch norm in
    evaluation mode; Mask R-CNN's proposals given)."""
    for world, micro in ((1, 4), (2, 2)):
        arguments = (world, micro, accumulate, shapes, tmp_path, empty_rank, False, head)
        mp.spawn(steps_in_a_process, args=arguments, nprocs=world)
    (one, one_losses), (two, two_losses) = (torch.load(tmp_path / name) for name in ("1_4.pt", "2_2.pt"))
    torch.manual_seed(0)
    start = new_model(head).state_dict()
    moved = {
        k: (v - start[k]).double() for k, v in one.items() if v.is_floating_point() and not torch.equal(v, start[k])
    }
    apart = {k: (two[k] - one[k]).double() for k in moved}
    assert len(moved) > 200 and max(v.abs().max() for v in moved.values()) > 1e-2

    def norm(parts):
        return torch.cat([v.flatten() for v in parts]).norm().item()

    # Rounding can turn a ReLU that is as good as 0, and with it some gradients of one layer.
    assert norm(apart.values()) <= 1e-3 * norm(moved.values())
    assert all(norm([apart[k]]) <= 0.02 * norm([moved[k]]) for k in moved)
    assert two_losses == pytest.approx(one_losses, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_rank_with_only_empty_images(head, shapes, tmp_path):
    """Oracle: it ends. In training mode, with one of two ranks seeing no object at all, losses stay finite."""
    mp.spawn(steps_in_a_process, args=(2, 2, 1, shapes, tmp_path, 1, True, head), nprocs=2)
    state, losses = torch.load(tmp_path / "2_2.pt")
    assert all(value.isfinite().all() for value in state.values()) and losses["box"] > 0


def test_noise_depends_on_seed_step_and_micro_step(shapes):
    """Oracle: repetition. Stochastic depth draws the same for the same seed and step, and differently for another of
    either, and for the second micro-batch of a step."""
    annotations = load_annotations(shapes)
    batch = next(iter(make_loader(TrainSet(annotations, 128, (1, 1)), [[0, 1, 2, 3]], 0)))

    def loss(seed, step, batches=1):
        torch.manual_seed(0)
        model = build_model("tiny", num_classes=6, drop_path=0.9).train()
        optimizer, scaler = make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False)
        recipe = {"seed": seed, "clip": 10.0}
        means, norm = train_step(model, [batch] * batches, recipe, optimizer, scaler, 0.0, CPU, step)
        return norm.item()

    assert loss(0, 5) == loss(0, 5) != loss(0, 6) != loss(1, 6)
    assert loss(0, 5, batches=2) != loss(0, 5)  # of one batch twice the mean is the same, unless the draws differ


@pytest.mark.parametrize("head", HEADS)
def test_torchrun(head, shapes, tmp_path):
    """Oracle: counting. Two processes train, evaluate every image once, resume, and log each step once."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    flags = f"--limit 16 --batch-size 4 --eval-every 1 --workers 1 --head {head}".split()
    command = [*launch, ROOT / "train.py", *TINY, *flags, "--data", shapes, "--out", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = python(*command, "--epochs", 1, env=environment)
    assert out.count("evaluated 16/16 images") == 1 and "4 = 2 device(s) x 2 images x 1 micro-steps" in out
    out = python(*command, "--epochs", 2, "--resume", env=environment)
    assert out.count("resuming at step 4") == 1 and "epochs 1 -> 2" in out
    assert [row["step"] for row in rows(tmp_path / "run") if "step" in row] == list(range(1, 9))


def test_sigterm_on_one_rank_stops_all(shapes, tmp_path):
    """Oracle: exit codes. SIGTERM to one of two processes: both save at the same step and exit with 0."""
    command = [sys.executable, ROOT / "train.py", *TINY, "--data", shapes, "--batch-size", "8", "--epochs", "20"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        flags = [*map(str, command), "--workers", "1", "--out", str(tmp_path / "run")]
        ranks.append(subprocess.Popen(flags, env=os.environ | environment, stdout=subprocess.PIPE, text=True))
    while not (tmp_path / "run" / "log.jsonl").exists() or '"step": 3' not in (tmp_path / "run/log.jsonl").read_text():
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "stopped as asked; go on with --resume" in printed[0] and "step" not in printed[1]
    logged = [row["step"] for row in rows(tmp_path / "run")]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == logged[-1] < 160


def test_files_of_a_run(run):
    """Oracle: DESIGN's list. Checkpoints of plain types, a log, results and a picture."""
    assert {"last.pt", "best.pt", "log.jsonl", "results.json", "grid.png", ".lock"} == {p.name for p in run.iterdir()}
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert checkpoint["step"] == 4 and checkpoint["categories"][0] == [1, "disc"]
    assert checkpoint["recipe"]["arch"] == "tiny" and checkpoint["recipe"]["micro_batch"] == 16
    assert rows(run)[0].keys() >= {"step", "epoch", "lr", "loss", "class", "box", "grad_norm", "seconds", "waited"}


def test_an_existing_run_is_not_overwritten(run, shapes):
    """Oracle: by hand."""
    before = (run / "last.pt").read_bytes()
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        main([*TINY, "--data", str(shapes), "--out", str(run)])
    other = run / "other" / "last.pt"
    other.parent.mkdir()
    shutil.copy(run / "last.pt", other)
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        main([*TINY, "--data", str(shapes), "--out", str(run), "--resume", str(other)])
    assert (run / "last.pt").read_bytes() == before


def test_resume_of_a_linked_checkpoint(run, shapes, tmp_path, capsys):
    """Oracle: by hand. last.pt may be a link to another disk."""
    (tmp_path / "last.pt").symlink_to(run / "last.pt")
    main([*TINY, "--data", str(shapes), "--out", str(tmp_path), "--epochs", "1", "--workers", "0", "--resume"])
    assert f"writing to {tmp_path}, resuming at step 4\nstep 4 after" in capsys.readouterr().out


def test_overfit_within_a_limit(shapes):
    """Oracle: by hand. --limit counts first."""
    args = parse_args([*TINY, "--data", str(shapes), "--overfit", "2", "--limit", "3"])
    assert len(train.load_splits(args, resolve(args))[0].ids) == 2
    args.overfit = 5
    with pytest.raises(UserError, match="only 3 images"):
        train.load_splits(args, resolve(args))


def resumed(checkpoint, scaler):
    """(state, scaler) of a run that goes on from a checkpoint with a given scaler."""
    recipe, categories = checkpoint["recipe"], checkpoint["categories"]
    parts = train.make_parts(recipe, categories, CPU) | {"scaler": scaler}
    state = {"step": 0, "evaluated": 0, "best": -math.inf, "skipped": 0, "recipe": recipe, "categories": categories}
    assert train.resume_from(checkpoint, state, parts, 4, "last.pt") == "resuming at step 4"
    assert equal(parts["model"].state_dict(), checkpoint["model"])
    assert equal(parts["optimizer"].state_dict(), checkpoint["optimizer"])
    return state, parts["scaler"]


def test_resume_in_another_precision(run):
    """Oracle: by hand. A run that had no gradient scaler goes on with one, and the other way round."""
    plain, on, off = load_checkpoint(run / "last.pt"), {"enabled": True}, {"enabled": False}
    assert plain["scaler"] == {}
    state, scaler = resumed(plain, torch.amp.GradScaler("cpu", **on))
    assert scaler.get_scale() == 2.0**16 and state["step"] == state["evaluated"] == 4 and state["best"] == plain["best"]
    scaled = plain | {"scaler": torch.amp.GradScaler("cpu", init_scale=4.0).state_dict()}
    assert resumed(scaled, torch.amp.GradScaler("cpu", **on))[1].get_scale() == 4
    assert not resumed(scaled, torch.amp.GradScaler("cpu", **off))[1].is_enabled()
    assert not train.make_parts(plain["recipe"], plain["categories"], CPU)["scaler"].is_enabled()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arch", "49S"], r"network differs \(filter_scale 0.25 -> 0.65, endpoint_channels 64 -> 128"),
        (["--size", "256"], r"size differs \(128 -> 256\)"),
        (["--head", "mask_rcnn"], r"head differs \(retinanet -> mask_rcnn\)"),
    ],
)
def test_resume_as_another_model_is_refused(flags, message, run, shapes):
    """Oracle: by hand. The sentence says what differs and offers --weights."""
    with pytest.raises(UserError, match=message + ".*--weights"):
        main([*TINY, "--data", str(shapes), "--out", str(run), "--resume", *flags])


def test_resume_past_the_end_is_refused(run, shapes):
    """Oracle: by hand. A checkpoint of 4 steps can't go on in a run of 1."""
    with pytest.raises(UserError, match="4 steps behind it, and this recipe only 1"):
        main([*TINY, "--data", str(shapes), "--out", str(run), "--resume", "--epochs", "1", "--batch-size", "60"])


OWN = dataclasses.replace(ARCHS["tiny"], filter_scale=0.2, head_channels=32)
FEW = [*TINY, "--limit", "8", "--batch-size", "4", "--epochs", "2", "--eval-every", "1", "--workers", "0"]


def test_an_arch_of_ones_own_resumes_exactly(shapes, tmp_path, monkeypatch, capsys):
    """Oracle: the run that was not interrupted. An Arch that is no row of ARCHS trains, stops after each step as a
    signal asks, and goes on to the same bits; without it, and with another, it is refused, and what differs is said."""
    assert OWN not in ARCHS.values()
    straight, broken = ([*FEW, "--data", str(shapes), "--out", str(tmp_path / name)] for name in "ab")
    main(straight, OWN)
    with monkeypatch.context() as patch:
        patch.setattr(train, "catch_signals", lambda: [signal.SIGTERM])
        main(broken, OWN)
        main([*broken, "--resume"], OWN)
        main([*broken, "--resume"], OWN)
    assert "step 3 after" in capsys.readouterr().out
    for other, said in (
        (None, "network differs (filter_scale 0.2 -> 0.25, head_channels 32 -> 64)"),
        (dataclasses.replace(OWN, repeats=2), "network differs (repeats 1 -> 2)"),
    ):
        with pytest.raises(UserError) as refused:
            main([*broken, "--resume"], other)
        assert said in str(refused.value) and "--weights" in str(refused.value)
    main([*broken, "--resume"], OWN)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert a["step"] == 4 and equal(a, b) and Arch.of(a["recipe"]["network"]) == OWN
    times = {"seconds", "waited"}
    logs = [[{k: v for k, v in r.items() if k not in times} for r in rows(tmp_path / name)] for name in "ab"]
    assert logs[0] == logs[1] and [r["step"] for r in logs[0] if "step" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("row", [OWN, None])
def test_a_row_of_archs_may_change_or_vanish(row, run, shapes, tmp_path, monkeypatch, capsys):
    """Oracle: the checkpoint, which says its own network. When its row has another value, or is gone, it is loaded and
    evaluated as before, and resumed where the same network is given, under whatever name."""
    same, checkpoint = ARCHS["tiny"], load_checkpoint(run / "last.pt")
    monkeypatch.setitem(ARCHS, "tiny", row) if row else monkeypatch.delitem(ARCHS, "tiny")
    model = load_model(checkpoint, CPU)
    assert model.arch == same and equal(model.state_dict(), checkpoint["model"])
    shutil.copytree(run, tmp_path / "run")
    where = ["--data", str(shapes), "--device", "cpu", "--workers", "0"]
    evaluate.main([*where, "--weights", str(tmp_path / "run" / "last.pt"), "--limit", "3"])
    assert "evaluated 3/3 images" in capsys.readouterr().out
    resume = [*where, "--size", "128", "--protocol", "toy", "--epochs", "1", "--out", str(tmp_path / "run"), "--resume"]
    resume += ["--arch", "tiny" if row else "49"]
    with pytest.raises(UserError, match=r"network differs \(filter_scale 0.25 -> "):
        main(resume)
    capsys.readouterr()
    main(resume, same)
    renamed = "" if row else " with a changed recipe: arch tiny -> 49"
    assert f"resuming at step 4{renamed}\nstep 4 after" in capsys.readouterr().out


def test_late_data_is_warned_of(capsys):
    """Oracle: by hand. Over 20 % of 50 steps' time gives one warning with its cure; 20 % none; rank 1 is silent."""
    for waited, rank, warnings in ((0.3, 0, 1), (0.2, 0, 0), (0.3, 1, 0)):
        bar, recent = tqdm(total=99, disable=True), []
        for step in range(1, 60):
            recent = [*recent, {"step": step, "loss": 1.0, "lr": 0.1, "skipped": 0, "seconds": 1.0, "waited": waited}][
                -50:
            ]
            train.show_progress(bar, recent, 8, 1, CPU._replace(rank=rank))
        printed = "".join(capsys.readouterr())
        assert printed.count("30% of the time") == printed.count("raise --workers (now 1)") == warnings
        assert printed.count("step 50/99: loss 1.000, lr 0.1, 8.0 images/s") == (rank == 0)


def ask_to_stop(rank, world, folder):
    place = CPU._replace(rank=rank, world=world)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    loss = torch.tensor([1.0, 3.0][rank])
    losses, _, asked = read_step({"box": loss}, torch.tensor(1.0), rank == 1, place)
    assert asked and losses == {"box": 2.0}
    losses, _, asked = read_step({"box": loss / (1 - rank)}, torch.tensor(1.0), False, place)
    assert not asked and not np.isfinite(losses["box"])
    finish(place)


class Collective(Exception):
    """Raised in place of a collective, when it is reached."""


def test_workers_are_forked_before_a_collective(shapes, tmp_path, monkeypatch):
    """Oracle: by hand. Of several ranks, training and evaluation start their workers first: a worker that is forked
    while a thread of the collective enters Python inherits a lock that nobody opens, and hangs (seen once)."""
    events, a = [], load_annotations(shapes)

    class Loader:
        def __iter__(self):
            events.append("fork")
            return iter(())

    def collective(*given, **options):
        raise Collective

    for module in (train, evaluate):
        monkeypatch.setattr(module, "make_loader", lambda *given: Loader())
    monkeypatch.setattr(train, "DistributedDataParallel", collective)
    monkeypatch.setattr(dist, "broadcast", collective)
    place = Place(CPU.device, rank=1, world=2)
    recipe = train.resolve(train.parse_args(["--arch", "tiny", "--size", "128", "--protocol", "toy"]))
    state = {"step": 0, "recipe": recipe | {"micro_batch": 8}}
    parts = {"model": nn.BatchNorm2d(1), "optimizer": None, "scaler": None}
    with pytest.raises(Collective):
        train.fit(parts, state, train.TrainSet(a, 128, (1, 1)), a, place, tmp_path, 2)
    with pytest.raises(Collective):
        evaluate.evaluate(parts["model"], a, 128, place)
    assert events == ["fork", "fork"]


def test_all_ranks_see_one_rank_stop_or_diverge(tmp_path):
    """Oracle: by hand. What one of two ranks reads, a wish to stop or an infinite loss, the other reads, too."""
    mp.spawn(ask_to_stop, args=(2, tmp_path), nprocs=2)


def renamed_shapes(shapes, folder):
    """The generated set with other category names."""
    for split in ("train2017", "val2017"):
        path = shapes / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["name"] = "other " + category["name"]
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / path.name).write_text(json.dumps(content))
        (folder / split).symlink_to(shapes / split)
    return folder


def test_weights_from_another_detector(run, shapes, tmp_path, capsys):
    """Oracle: by hand. Mask R-CNN starts from a RetinaNet's backbone; all of its heads are new and said to be; its own
    weights with other classes leave out every layer that depends on them."""
    flags = [*TINY, "--head", "mask_rcnn", "--limit", "2", "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    first = tmp_path / "first"
    main([*flags, "--data", str(shapes), "--weights", str(run / "best.pt"), "--out", str(first)])
    out = capsys.readouterr().out
    backbone = sum(name.startswith("backbone.") for name in load_checkpoint(first / "last.pt")["model"])
    assert f"weights: {backbone} of" in out and "new: ['rpn.tower.convs.0.weight'" in out
    renamed = str(renamed_shapes(shapes, tmp_path / "renamed"))
    main([*flags, "--data", renamed, "--weights", str(first / "last.pt"), "--out", str(tmp_path / "second")])
    layers = ("box_head.class_predict", "box_head.box_predict", "mask_head.mask_predict")
    assert f"new: {[f'{n}.{p}' for n in layers for p in ('weight', 'bias')]}" in capsys.readouterr().out


def test_weights_of_other_classes(run, shapes, tmp_path, capsys):
    """Oracle: by hand. What fits is taken; the class layer is new and named; a bad file is refused."""
    renamed = renamed_shapes(shapes, tmp_path / "renamed")
    flags = [*TINY, "--data", str(renamed), "--limit", "4", "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    main([*flags, "--weights", str(run / "best.pt"), "--out", str(tmp_path / "new")])
    out = capsys.readouterr().out
    assert "new: ['head.class_predict.weight', 'head.class_predict.bias']" in out and "evaluated 4/4 images" in out
    with pytest.raises(UserError, match="classes differs .*disc.* -> .*other disc"):
        main([*flags, "--resume", str(run / "last.pt"), "--out", str(tmp_path / "no")])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "cut.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    for name in ("text.pt", "cut.pt"):
        with pytest.raises(UserError, match=name):
            main([*flags, "--weights", str(tmp_path / name), "--out", str(tmp_path / "no")])


def test_weights_compare_networks_not_names(run, shapes, tmp_path, monkeypatch, capsys):
    """Oracle: by hand. An equal Arch under another name takes every tensor, and nothing is said of the network; another
    Arch under the same name takes what fits, and what differs is said."""
    monkeypatch.setitem(ARCHS, "same", dataclasses.replace(ARCHS["tiny"]))
    flags = [*TINY, "--data", str(shapes), "--limit", "4", "--batch-size", "4", "--epochs", "1", "--workers", "0"]
    flags += ["--lr", "1e-9", "--weights", str(run / "best.pt")]
    given = load_checkpoint(run / "best.pt")["model"]
    main([*flags, "--arch", "same", "--out", str(tmp_path / "same")])
    out = capsys.readouterr().out
    assert f"weights: {len(given)} of {len(given)} tensors from {run / 'best.pt'}; new: []" in out
    assert "network is another" not in out
    main([*flags, "--out", str(tmp_path / "other")], dataclasses.replace(ARCHS["tiny"], head_channels=32, alpha=0.5))
    out = capsys.readouterr().out
    assert "its network is another: head_channels 64 -> 32; new: ['head." in out
    started = load_checkpoint(tmp_path / "other" / "last.pt")["model"]
    changed = [name for name in given if started[name].shape != given[name].shape]
    assert changed and all(name.startswith("head.") for name in changed)
    assert f"weights: {len(started) - len(changed)} of {len(started)} tensors" in out
    kept = [name for name in given if name not in changed and name.endswith("weight") and given[name].ndim == 4]
    assert len(kept) > 100 and all(torch.allclose(started[name], given[name], atol=1e-5) for name in kept)


def test_weights_without_a_layer_that_fits(run):
    """Oracle: by hand. Where no layer fits, the sentence says how the networks differ, and nothing is taken."""
    checkpoint = load_checkpoint(run / "best.pt")
    detector = build_model(OWN, num_classes=6)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    few = {name: value for name, value in checkpoint["model"].items() if value.ndim < 2}
    renamed = {f"other.{name}": value for name, value in checkpoint["model"].items()}
    for given in (few, renamed, {}):
        with pytest.raises(UserError, match="--weights a.pt: no layer of it fits.*filter_scale 0.25 -> 0.2, head_chan"):
            load_weights(detector, checkpoint | {"model": given}, checkpoint["categories"], "a.pt")
    assert equal(detector.state_dict(), before)


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


def test_a_checkpoint_with_code_is_not_run(tmp_path, monkeypatch):
    """Oracle: by hand. It is refused with a sentence, and the code in it leaves no trace."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful(), "recipe": {}, "categories": []}, "bad.pt")
    with pytest.raises(UserError, match="bad.pt is not a checkpoint of tensors and plain values"):
        load_checkpoint("bad.pt")
    assert not Path("harmed").exists()


def test_a_failed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Oracle: by hand. The disk is full: the old file stays, the draft goes, a sentence says so. Only rank 0 writes."""
    path, parts = tmp_path / "last.pt", {"model": nn.Linear(1, 1)}
    save(path, parts, {"step": 0}, CPU._replace(rank=1, world=2))
    assert not path.exists()
    save(path, parts, {"step": 1}, CPU)

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=f"could not write {path} .*No space left on device.*what it held is intact"):
        save(path, parts, {"step": 2}, CPU)
    kept = torch.load(path, weights_only=True)
    assert (
        kept["step"] == 1 and equal(kept["model"], parts["model"].state_dict()) and len(list(tmp_path.iterdir())) == 1
    )


def test_divergence_stops_the_run(shapes, tmp_path, capsys):
    """Oracle: by hand. A loss that is not finite ends the run, naming step, rate, terms, images; last.pt is sound."""
    out = tmp_path / "out"
    flags = [*TINY, "--data", str(shapes), "--overfit", "4", "--workers", "0", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--lr", "1e30", "--epochs", "50"])
    message = str(stop.value.code)
    ids = load_annotations(shapes).ids[:4].tolist()
    assert "training diverged at step" in message and "class loss" in message and "learning rate" in message
    assert all(str(i) in message for i in ids)
    last = load_checkpoint(out / "last.pt")
    assert 0 < last["step"] < int(message.split("at step ")[1].split(":")[0])
    assert all(value.isfinite().all() for value in last["model"].values())


def test_without_a_validation_split(coco_sample, tmp_path, capsys):
    """Oracle: by hand. One line says that train2017 is evaluated; --overfit takes the first images with objects."""
    flags = [*TINY, "--data", str(coco_sample), "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    main([*flags, "--limit", "2", "--out", str(tmp_path / "a")])
    out = capsys.readouterr().out
    assert out.count("evaluating on train2017") == 1 and "evaluated 2/2 images" in out
    main([*flags, "--overfit", "3", "--out", str(tmp_path / "b")])
    a = load_annotations(coco_sample)
    ids = a.ids[a.positives() > 0][:3].tolist()
    found = {row["image_id"] for row in json.loads((tmp_path / "b" / "results.json").read_text())}
    assert "3 images" in capsys.readouterr().out and found <= set(ids)


def test_exceptions_are_fields():
    """Oracle: the recipe's fields. Every row has the same, and what a head or an exception changes is a field."""
    assert train.HEAD_FIELDS.keys() == HEADS.keys()
    assert all(row.keys() == PROTOCOLS["B"].keys() for row in PROTOCOLS.values())
    for (protocol, head, *arch), changed in train.EXCEPTIONS.items():
        assert (
            changed.keys() <= PROTOCOLS[protocol].keys() | train.HEAD_FIELDS[head].keys() and set(arch) <= ARCHS.keys()
        )
    assert train.OVERFIT.keys() <= PROTOCOLS["B"].keys()
    for head, detector in HEADS.items():
        assert set(detector.options) <= PROTOCOLS["B"].keys() | train.HEAD_FIELDS[head].keys()
