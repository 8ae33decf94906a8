"""Makes a checkpoint of this code from the authors' released weights: for evaluate.py, and train.py --weights.

python tools/import_official.py spinenet-49.tar.gz --out spinenet-49.pt

Takes the released tar.gz, the folder unpacked from it, or the prefix of its three files (.../model.ckpt). What network
it holds is read off its variables' shapes, size and protocol off its name if it is a released one, else off the flags.
TensorFlow reads the file: pip install tensorflow-cpu (207 MB).
"""

import argparse
import contextlib
import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import heads  # noqa: E402
import train  # noqa: E402
from blocks import BN_EPSILON, ConvBN  # noqa: E402
from evaluate import Place, make_folder, one_sentence  # noqa: E402
from model import ARCHS, HEADS, LEVELS, PUBLISHED_CLASSES, STEM_BLOCKS, UserError, build_model  # noqa: E402

RELEASED = {  # the authors' MODEL_ZOO: (head, name): size, protocol, box AP (and mask AP) on val2017
    ("retinanet", "spinenet-49S"): (640, "B", "39.5"),
    ("retinanet", "spinenet-49"): (640, "B", "42.8"),
    ("retinanet", "spinenet-96"): (1024, "B", "46.7"),
    ("retinanet", "spinenet-143"): (1280, "B", "48.0"),
    ("retinanet", "spinenet-49S-best"): (640, "C", "41.5"),
    ("retinanet", "spinenet-49-best"): (640, "C", "44.3"),
    ("retinanet", "spinenet-96-best"): (1024, "C", "48.5"),
    ("retinanet", "spinenet-143-best"): (1280, "C", "50.6"),
    ("retinanet", "spinenet-190-best"): (1280, "C", "52.0"),
    ("mask_rcnn", "spinenet-49"): (640, "B", "42.8 (37.8)"),
    ("mask_rcnn", "spinenet-96"): (1024, "B", "46.8 (41.2)"),
    ("mask_rcnn", "spinenet-143"): (1280, "B", "48.7 (42.6)"),
    ("mask_rcnn", "spinenet-190"): (1536, "C", "52.0 (45.9)"),
}
SCOPES = {"retinanet": "retinanet/", "mask_rcnn": "rpn_head/"}  # each head's own, beside the backbone's spinenet/
OUTPUTS = 91  # one for each of COCO's category ids, most of them in use, and 0 for the background

COCO = """1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat, 10 traffic light,
    11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow,
    22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee,
    35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard,
    43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple,
    54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair, 63 couch,
    64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard,
    77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock, 86 vase,
    87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush"""
CATEGORIES = [[int(number), name] for number, name in re.findall(r"(\d+) ([a-z ]+)", COCO)]


@contextlib.contextmanager
def opened(path):
    """The prefix of a checkpoint's files, for as long as the block lasts, and the name under which it was released."""
    with tempfile.TemporaryDirectory() as folder:
        if path.is_file() and path.suffix not in (".index", ".meta") and ".data-" not in path.name:
            unpack(path, folder)
            where, name = Path(folder), re.sub(r"\.(tar\.gz|tgz|tar)($|\?.*)", "", path.name)
        else:
            where, name = path, path.resolve().name
        if where.is_dir():
            found = sorted(where.rglob("*.index"))
            if len(found) != 1:
                names = f": {[file.name for file in found]}" if found else ""
                raise UserError(f"{path} holds {len(found)} checkpoints (*.index){names}; name one of them")
            yield found[0].with_suffix(""), name
            return
        prefix = Path(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", str(path)))
        if not Path(f"{prefix}.index").exists():
            raise UserError(f"no checkpoint at {path}: give a released tar.gz, its folder, or .../model.ckpt")
        yield prefix, prefix.resolve().parent.name


def unpack(path, folder):
    """Write an archive's checkpoint files into a folder; paths in it are ignored."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and re.search(r"\.(index|data-\d+-of-\d+)$", member.name):
                    with archive.extractfile(member) as inside, open(Path(folder, Path(member.name).name), "wb") as out:
                        shutil.copyfileobj(inside, out)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} can't be unpacked ({error}): it is no tar.gz, or cut short; download it again"
        ) from None


def read_checkpoint(prefix):
    """(shapes {variable: shape}, a function that reads one variable as a tensor) of TensorFlow's checkpoint files."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow
    except ImportError:
        what = "TensorFlow's checkpoints are read by TensorFlow, which is not installed"
        raise UserError(f"{what}: pip install tensorflow-cpu (207 MB)") from None

    def unreadable(error):
        reason = str(error).splitlines()[0]
        return UserError(f"{prefix} can't be read ({reason}); it may be cut short: download it again")

    def read(name):
        try:
            return torch.from_numpy(reader.get_tensor(name).astype("float32"))
        except (tensorflow.errors.OpError, RuntimeError, IndexError) as error:  # the last where bytes are lacking
            raise unreadable(f"{name}: {error}") from None

    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        return reader.get_variable_to_shape_map(), read
    except (tensorflow.errors.OpError, ValueError, RuntimeError) as error:
        raise unreadable(error) from None


def find_network(shapes):
    """(head, the row of ARCHS or None, the Arch) of a checkpoint whose variables have these shapes."""
    head = next((head for head, scope in SCOPES.items() if any(name.startswith(scope) for name in shapes)), None)
    if head is None or not any(name.startswith("spinenet/") for name in shapes):
        scopes = sorted({name.split("/")[0] for name in shapes})[:5]
        raise UserError(f"it is no RetinaNet or Mask R-CNN with SpineNet: its variables are of {', '.join(scopes)}")

    def width(scope):
        return (shapes.get(f"{scope}/kernel") or [0])[-1]

    def count(scope):
        return sum(re.fullmatch(scope + "/kernel", name) is not None for name in shapes)

    # Block 3 is a residual one at level 4, and block 6's first parent.
    block3 = width("spinenet/sub_policy1/scale_permuted_block_3/conv2d")
    squeezed = width("spinenet/sub_policy4/resample_with_alpha_resample_4_0/conv2d")
    repeats = count(r"spinenet/sub_policy1/scale_permuted_block_3/conv2d(_\d+)?") // 2
    found = dict(endpoint_channels=width(f"spinenet/conv2d_{count(r'spinenet/conv2d(_[0-9]+)?') - 1}"))
    if head == "retinanet":
        found |= dict(head_channels=width("retinanet/class_net/class-0"))
        found |= dict(head_convs=count(r"retinanet/class_net/class-\d+"))
    else:
        found |= dict(rcnn_channels=width("rpn_head/rpn"), rcnn_fc_channels=width("fast_rcnn_head/fc6"))
        found |= dict(rpn_convs=count(r"rpn_head/rpn(-\d+)?"), rcnn_convs=count(r"fast_rcnn_head/conv_\d+"))
    if not all((block3, squeezed, repeats, *found.values())):
        raise UserError("its variables are not those of a SpineNet: block 3, block 6, the endpoints or the heads lack")
    for name, row in ARCHS.items():
        if (row.width(4), int(row.alpha * row.width(4)), row.repeats) == (block3, squeezed, repeats):
            return head, name, replace(row, **found)
    scale, alpha = block3 / 256, squeezed / block3
    return head, None, replace(ARCHS["49"], filter_scale=scale, alpha=alpha, repeats=repeats, **found)


def backbone_layers(backbone):
    """(own name, the authors' scope) of the backbone's convolutions and norms. They number the layers of each scope,
    which are the stem with the endpoints, each resampling, and each later block group."""
    scopes = {"spinenet": ["stem", *(f"groups.{number}" for number in range(STEM_BLOCKS)), "endpoints"]}
    for number, _, _, parents, *_ in backbone.spine:
        scope = f"spinenet/sub_policy{number - STEM_BLOCKS}"
        for k in range(len(parents)):
            inner = f"resample_with_alpha_resample_{number - STEM_BLOCKS}_{k}"
            scopes[f"{scope}/{inner}"] = [f"resamples.{number}.{k}"]
        scopes[f"{scope}/scale_permuted_block_{number}"] = [f"groups.{number}"]
    for scope, parts in scopes.items():
        modules = [pair for part in parts for pair in backbone.get_submodule(part).named_modules(prefix=part)]
        for k, own in enumerate(own for own, module in modules if isinstance(module, ConvBN)):
            yield f"backbone.{own}.conv", numbered(f"{scope}/conv2d", k)
            yield f"backbone.{own}.bn", numbered(f"{scope}/batch_normalization", k)


def numbered(name, k, mark="_"):
    """TensorFlow's k-th of several layers of one name."""
    return f"{name}{mark}{k}" if k else name


def head_layers(head, arch):
    """(own name, the authors' scope) of the layers of the heads."""
    if head == "retinanet":
        for kind in ("class", "box"):
            scope = f"retinanet/{kind}_net/{kind}"
            for i in range(arch.head_convs):
                yield f"head.{kind}_tower.convs.{i}", f"{scope}-{i}"
                yield from ((f"head.{kind}_tower.norms.{k}.{i}", f"{scope}-{i}-{L}") for k, L in enumerate(LEVELS))
            yield f"head.{kind}_predict", f"{scope}-predict"
        return
    for i in range(arch.rpn_convs):
        yield f"rpn.tower.convs.{i}", numbered("rpn_head/rpn", i, "-")
        for k, L in enumerate(LEVELS):
            yield f"rpn.tower.norms.{k}.{i}", numbered(f"rpn_head/rpn-l{L}-bn", i, "-")
    for kind in ("class", "box"):
        yield f"rpn.{kind}_predict", f"rpn_head/rpn-{kind}"
        yield f"box_head.{kind}_predict", f"fast_rcnn_head/{kind}-predict"
    for i in range(arch.rcnn_convs):
        for part, conv in (("box_head", f"fast_rcnn_head/conv_{i}"), ("mask_head", f"mask_head/mask-conv-l{i}")):
            yield f"{part}.convs.{i}.conv", conv
            yield f"{part}.convs.{i}.bn", numbered(f"{conv.split('/')[0]}/batch_normalization", i)
    last = numbered("batch_normalization", arch.rcnn_convs)
    yield from (("box_head.fc", "fast_rcnn_head/fc6"), ("box_head.bn", f"fast_rcnn_head/{last}"))
    yield from (("mask_head.up.conv", "mask_head/conv5-mask"), ("mask_head.up.bn", f"mask_head/{last}"))
    yield "mask_head.mask_predict", "mask_head/mask_fcn_logits"


LAYER = {"weight": "kernel", "bias": "bias"}
NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def variables(head, arch):
    """{own name: (the authors' name, its shape there)} of every value of a detector with their 91 outputs."""
    with torch.device("meta"):
        detector = build_model(arch, head, PUBLISHED_CLASSES[head])
    table = {}
    for own, scope in (*backbone_layers(detector.backbone), *head_layers(head, arch)):
        layer = detector.get_submodule(own)
        for part, theirs in (NORM if isinstance(layer, nn.BatchNorm2d) else LAYER).items():
            if getattr(layer, part) is not None:
                shape = list(getattr(layer, part).shape)  # (out, in, h, w), (out, in) or (n,)
                table[f"{own}.{part}"] = f"{scope}/{theirs}", shape[2:] + shape[1::-1] if len(shape) > 1 else shape
    return table


def check_variables(table, shapes, row):
    """Raise UserError unless a checkpoint's variables, but for the optimizer's, are exactly those of the table."""
    wanted = dict(table.values())
    given = {name: list(s) for name, s in shapes.items() if name != "global_step" and not name.endswith("/Momentum")}
    named = f"SpineNet{f'-{row}' if row else ''} of these widths"
    for what, names in (("lacks", wanted.keys() - given), ("has more than", given.keys() - wanted)):
        if names:
            raise UserError(f"it {what} a {named}: {len(names)} variables, as {', '.join(sorted(names)[:3])}")
    other = [name for name in sorted(wanted) if wanted[name] != given[name]]
    if other:
        first = f"{other[0]} is {given[other[0]]}, not {wanted[other[0]]}"
        raise UserError(f"{len(other)} of its variables have another shape than a {named} has: {first}")


def convert(value, own, epsilon):
    """One variable in this code's layout, still with 91 outputs."""
    if own == "box_head.fc.weight":  # theirs is of a flattened (H, W, C), here it is (C, H, W)
        value = value.unflatten(0, (heads.BOX_POOL, heads.BOX_POOL, -1)).permute(3, 2, 0, 1).flatten(1)
    elif value.ndim > 1:
        value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
    if own.endswith(("box_predict.weight", "box_predict.bias")):  # (dy, dx, dh, dw) there, (dx, dy, dw, dh) here
        value = value.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
    # variance + their epsilon = (variance + difference) + our epsilon: exact, if odd to look at
    return value + (epsilon - BN_EPSILON) if own.endswith("running_var") else value


def of_coco(value, head):
    """The rows of a class layer for COCO's 80 categories (and Mask R-CNN's background) of those for 91."""
    ids = [0] * (head == "mask_rcnn") + [number for number, _ in CATEGORIES]
    anchors = len(heads.SCALES) * len(heads.ASPECTS) if head == "retinanet" else 1
    return value.unflatten(0, (anchors, OUTPUTS, -1))[:, ids].flatten(0, 2)


def weights(head, arch, read, epsilon):
    """The state dict of a detector of COCO's 80 classes, from a function that reads a variable."""
    state = {}
    for own, (theirs, _) in variables(head, arch).items():
        value = convert(read(theirs), own, epsilon)
        state[own] = (of_coco(value, head) if own.startswith(HEADS[head].class_layers) else value).contiguous()
        if own.endswith("running_var"):
            state[own.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return state


def import_checkpoint(path, size=None, protocol=None, epsilon=BN_EPSILON, arch=None):
    """What `train.save` writes, of the file at `path`: (parts, state), and what was found, in words. Raises UserError.

    Given neither size nor protocol, they are those of the released file of that name; `arch` is only compared.
    """
    with opened(path) as (prefix, name):
        shapes, read = read_checkpoint(prefix)
        try:
            head, row, network = find_network(shapes)
            table = variables(head, network)
            check_variables(table, shapes, row)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        released = RELEASED.get((head, name), (None, None, None))
        for given, said in ((arch, f"--arch {arch}"), (released[2] and name.split("-")[1], f"its name, {name},")):
            if given and given != row:
                raise UserError(f"{path} is not what {said} says: its shapes are {row or 'of no row'} of ARCHS")
        size, protocol = size or released[0], protocol or released[1]
        if not size or not protocol:
            what = f"{path}: '{name}' is not a released file's name for {HEADS[head].__name__}"
            raise UserError(f"{what}; say --size, and --protocol B (ReLU) or C (swish)")
        flags = ["--arch", row or "49", "--head", head, "--size", str(size), "--protocol", protocol]
        recipe = train.resolve(train.parse_args(flags), network)
        parts = train.make_parts(recipe, CATEGORIES, Place(torch.device("cpu")))
        parts["model"].load_state_dict(weights(head, network, read, epsilon))
    said = f"{path}: {HEADS[head].__name__}, SpineNet-{row or '?'}, endpoints {network.endpoint_channels} wide"
    said += f", {network.rpn_convs} RPN convolution(s)" if HEADS[head].masks else ""
    said += f"; released as {head} {name}, AP {released[2]}" if released[2] else "; not a released file's name"
    said += f"; size {size}, protocol {protocol} ({recipe['activation']}), batch norm's epsilon {epsilon:g}"
    if row is None:
        anchors = network.rcnn_anchor_size if HEADS[head].masks else network.anchor_size
        said += f"; no row of ARCHS (filter scale {network.filter_scale}), so anchors of size {anchors} are assumed"
    said += f"; {len(table)} variables taken, {len(shapes) - len(table)} of the optimizer's left"
    state = {"step": 0, "evaluated": 0, "best": -math.inf, "skipped": 0, "recipe": recipe, "categories": CATEGORIES}
    return parts, state, said


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make a checkpoint of this code from the authors' released weights.")
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a released tar.gz, the folder in it, or .../model.ckpt")
    add("--out", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    add("--size", type=int, help="side of the square input (default: as released)")
    add("--protocol", choices=("B", "C"), help="B: ReLU, C: swish (default: as released)")
    add("--arch", choices=ARCHS, help="only to check: the row that it must be")
    add("--epsilon", type=float, default=BN_EPSILON, help=f"batch norm's, of the file (default {BN_EPSILON})")
    args = parser.parse_args(argv)
    if not 0 < args.epsilon < 1:
        raise UserError(f"--epsilon is {args.epsilon}, but must be between 0 and 1, as 1e-3 or 1e-4")
    parts, state, said = import_checkpoint(args.checkpoint, args.size, args.protocol, args.epsilon, args.arch)
    make_folder(args.out.parent)
    train.save(args.out, parts, state, Place(torch.device("cpu")))
    print(f"{said}\nwrote {args.out}")


if __name__ == "__main__":
    with one_sentence():
        main()
