"""How do bricks make a SpineNet, a SpineNet plus heads a detector, and a file a detector again? (sections 3, 4)

Dimensions: B images, C channels, H x W pixels, A anchors, K classes. Level L has stride 2^L.

    python model.py     parameters and multiply-adds of every row, beside the paper's
"""

import pickle
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import blocks
import heads
import loss

# Mean and standard deviation of ImageNet's RGB, for images in 0..255.
PIXEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
PIXEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class Block(NamedTuple):
    """One numbered block group of the scale-permuted network."""

    number: int
    level: int
    kind: str
    parents: tuple  # numbers of the blocks that are resampled and summed
    as_is: tuple = ()  # parents of the same size and width that join the sum unresampled
    output: bool = False  # its features leave the network as P<level>


# SpineNet-49's searched permutation (paper Figure 4d; authors' spinenet.py:44-63). Blocks 0 and 1 are the
# stem's. `as_is` is what the authors' rule yields at every input size (spinenet.py:450-458): an output block also gets
# the earlier blocks of its own size and channels, output blocks aside, that no block up to it has consumed.
SPINE = (
    Block(2, 2, "bottleneck", (0, 1)),
    Block(3, 4, "residual", (0, 1)),
    Block(4, 3, "bottleneck", (2, 3)),
    Block(5, 4, "bottleneck", (2, 4)),
    Block(6, 6, "residual", (3, 5)),
    Block(7, 4, "bottleneck", (3, 5)),
    Block(8, 5, "residual", (6, 7)),
    Block(9, 7, "residual", (6, 8)),
    Block(10, 5, "bottleneck", (8, 9)),
    Block(11, 5, "bottleneck", (8, 10)),
    Block(12, 4, "bottleneck", (5, 10), output=True),
    Block(13, 3, "bottleneck", (4, 10), output=True),
    Block(14, 5, "bottleneck", (7, 12), as_is=(11,), output=True),
    Block(15, 7, "bottleneck", (5, 14), output=True),
    Block(16, 6, "bottleneck", (12, 14), output=True),
)

STEM_LEVEL = 2
STEM_CHANNELS = 64  # in every variant: filter_scale does not touch it
STEM_BLOCKS = 2  # blocks 0 and 1: bottlenecks at level 2
BASE_WIDTH = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}  # per level, before filter_scale
LEVELS = heads.LEVELS
MULTIPLE = 2 ** max(LEVELS)  # image sides divide by this


@dataclass(frozen=True)
class Arch:
    """One SpineNet and the sizes of its heads (paper section 3.4; authors' yaml files).

    Any value builds a network: `build_model(dataclasses.replace(ARCHS["49"], alpha=1.0), ...)`.
    """

    filter_scale: float  # multiplies every level's width
    alpha: float  # resampling works on int(alpha * parent's width) channels
    repeats: int  # blocks per block group
    endpoint_channels: int  # channels of P3..P7
    head_channels: int  # RetinaNet's towers: width
    head_convs: int  # and number of convolutions
    anchor_size: float  # RetinaNet's anchors: base side in strides
    rcnn_channels: int = 256  # Mask R-CNN: width of the RPN, box and mask heads
    rcnn_fc_channels: int = 1024  # and of the box head's fully connected layer
    rpn_convs: int = 1
    rcnn_convs: int = 4  # of the box head and of the mask head
    rcnn_anchor_size: float = 3
    spine: tuple = SPINE

    def width(self, level):
        """Channels of a residual block at `level`, rounded down; a bottleneck there has four times as many."""
        return int(BASE_WIDTH[level] * self.filter_scale)

    def plain(self):
        """This Arch as a dict of plain values, from which `Arch.of` makes it again: what a checkpoint stores."""
        return vars(self) | {"spine": tuple(tuple(block) for block in self.spine)}

    @classmethod
    def of(cls, plain):
        """The Arch of a dict of plain values."""
        return cls(**plain | {"spine": tuple(Block(*block) for block in plain["spine"])})


ARCHS = {
    "49S": Arch(0.65, 0.5, 1, 128, 128, 4, 3, rcnn_channels=128, rcnn_fc_channels=512),
    "49": Arch(1.0, 0.5, 1, 256, 256, 4, 3),
    "96": Arch(1.0, 0.5, 2, 256, 256, 4, 3),
    "143": Arch(1.0, 1.0, 3, 256, 256, 4, 4),
    "190": Arch(1.3, 1.0, 4, 512, 512, 7, 4, rcnn_channels=384, rcnn_convs=7, rcnn_anchor_size=5),
    # Not in the paper: for CPUs and lessons.
    "tiny": Arch(0.25, 0.5, 1, 64, 64, 2, 3, rcnn_channels=32, rcnn_fc_channels=256, rcnn_convs=2),
}


class SpineNet(nn.Module):
    """The backbone: images (B, 3, H, W), normalized -> features P3..P7, each (B, endpoint, H / 2^L, W / 2^L).

    Block 0 follows the stem, block 1 block 0; each other is given act(sum of its resampled parents and those `as_is`).
    `drop_path` is stochastic depth's rate at the last block, growing linearly from the first (protocol C);
    `drop_rate` is DropBlock's (protocol A). Raises ValueError where H or W is not a multiple of 128.
    Source: paper section 3, Figure 4d; authors' spinenet.py.
    """

    def __init__(self, arch, activation="relu", drop_path=0.0, drop_rate=0.0):
        super().__init__()
        options = dict(activation=activation, drop_rate=drop_rate)
        level, channels = {}, {}  # of every block's output, by block number

        self.stem = blocks.Stem(STEM_CHANNELS, activation)
        self.groups, self.resamples, self.endpoints = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        stem_channels = STEM_CHANNELS
        for number in range(STEM_BLOCKS):
            group = blocks.block_group("bottleneck", stem_channels, arch.width(STEM_LEVEL), arch.repeats, **options)
            self.groups[str(number)] = group
            level[number], channels[number] = STEM_LEVEL, blocks.KINDS["bottleneck"].expansion * arch.width(STEM_LEVEL)
            stem_channels = channels[number]

        self.spine = arch.spine
        for block in arch.spine:
            width = arch.width(block.level)
            out = blocks.KINDS[block.kind].expansion * width
            self.resamples[str(block.number)] = nn.ModuleList(
                blocks.Resample(channels[p], arch.width(level[p]), level[p], out, block.level, arch.alpha, activation)
                for p in block.parents
            )
            drop = drop_path * (block.number - 1) / len(arch.spine)  # r (i - 1) / 15: linear by block
            group = blocks.block_group(block.kind, out, width, arch.repeats, drop_path=drop, **options)
            self.groups[str(block.number)] = group
            level[block.number], channels[block.number] = block.level, out

        self.outputs = {block.level: block.number for block in arch.spine if block.output}
        for L in LEVELS:
            self.endpoints[str(L)] = blocks.ConvBN(channels[self.outputs[L]], arch.endpoint_channels, 1, 1, activation)
        self.activation = blocks.ACTIVATIONS[activation]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                blocks.init_conv_(module)

    def forward(self, x):
        check_size(*x.shape[-2:])
        x = self.stem(x)  # (B, 64, H/4, W/4)
        features = {}
        for number in range(STEM_BLOCKS):
            x = features[number] = self.groups[str(number)](x)
        for block in self.spine:
            resamples = self.resamples[str(block.number)]
            parts = [resample(features[p]) for p, resample in zip(block.parents, resamples)]
            parts += [features[p] for p in block.as_is]  # all (B, C, H / 2^L, W / 2^L)
            fused = self.activation(sum(parts[1:], start=parts[0]))
            features[block.number] = self.groups[str(block.number)](fused)
        return [self.endpoints[str(L)](features[self.outputs[L]]) for L in LEVELS]


class Normalize(nn.Module):
    """uint8 RGB (B, 3, H, W) -> float32, PIXEL_MEAN as 0 and PIXEL_MEAN + PIXEL_STD as 1, on the images' device."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(self, images):
        return (images - self.mean) / self.std


def own_regions(images, sizes):
    """(B, 2) float32: (height, width) of each image's own part of the batch: `sizes`, or for None all of the input."""
    if sizes is None:
        sizes = torch.stack([images.new_full((len(images),), s, dtype=torch.float32) for s in images.shape[-2:]], dim=1)
    return sizes.to(images.device, non_blocking=True)


class RetinaNet(nn.Module):
    """The one-stage detector (Lin et al. 2017; paper section 4.1): SpineNet, two towers, focal loss.

    `model(images, targets, sizes)` gives a dict of losses whose sum is to be minimized; `model(images, sizes=s)` a
    list of detections. images: uint8 RGB (B, 3, H, W), padded at the right and bottom. targets: see loss.py.
    sizes (B, 2): each image's own (height, width) inside the padding, by default all; detections: see `heads.detect`.
    """

    class_layers = ("head.class_predict.",)  # names of the weights that depend on what the classes are
    options = ("activation", "drop_path", "drop_rate")  # what of the recipe it is built with
    masks = False  # whether it needs and gives masks

    def __init__(self, arch, num_classes, activation="relu", **drop):
        super().__init__()
        self.arch, self.anchor_size = arch, arch.anchor_size
        self.normalize = Normalize()
        self.backbone = SpineNet(arch, activation, **drop)
        sizes = arch.endpoint_channels, arch.head_channels, arch.head_convs
        self.head = heads.RetinaNetHead(*sizes, num_classes, activation)

    def forward(self, images, targets=None, sizes=None):
        class_logits, box_codes = self.every_layer(self.normalize(images))  # (B, A, K), (B, A, 4)
        anchors = heads.make_anchors(tuple(images.shape[-2:]), self.anchor_size, images.device)  # (A, 4)
        if targets is not None:
            return loss.retinanet_loss(class_logits, box_codes, anchors, targets)
        return [
            heads.detect(logits.float().sigmoid(), heads.decode_boxes(codes, anchors)[:, None], size)
            for logits, codes, size in zip(class_logits, box_codes, own_regions(images, sizes))
        ]

    def every_layer(self, x):
        """The outputs for normalized images (B, 3, H, W), before losses or detections."""
        return self.head(self.backbone(x))


class MaskRCNN(nn.Module):
    """The two-stage detector with masks (He et al. 2017; paper section 4.1): SpineNet, RPN, box head, mask head.

    Called as `RetinaNet`; the detections also have masks (N, 28, 28), probabilities inside their boxes. In training
    each image has `rois` regions of interest, of which the first `mask_rois` may be foreground and get masks.
    """

    class_layers = ("box_head.class_predict.", "box_head.box_predict.", "mask_head.mask_predict.")
    options = ("activation", "drop_path", "drop_rate", "rois", "mask_rois")
    masks = True

    def __init__(self, arch, num_classes, rois=loss.ROIS, mask_rois=loss.MASK_ROIS, activation="relu", **drop):
        super().__init__()
        self.arch, self.anchor_size, self.rois, self.mask_rois = arch, arch.rcnn_anchor_size, rois, mask_rois
        self.normalize = Normalize()
        self.backbone = SpineNet(arch, activation, **drop)
        sizes = arch.endpoint_channels, arch.rcnn_channels
        self.rpn = heads.RPNHead(*sizes, arch.rpn_convs, activation)
        self.box_head = heads.BoxHead(*sizes, arch.rcnn_convs, arch.rcnn_fc_channels, num_classes, activation)
        self.mask_head = heads.MaskHead(*sizes, arch.rcnn_convs, num_classes, activation)

    def forward(self, images, targets=None, sizes=None):
        features = self.backbone(self.normalize(images))  # P3..P7
        objectness, codes = self.rpn(features)  # by level: (B, A_L), (B, A_L, 4)
        anchors = heads.make_anchors(tuple(images.shape[-2:]), self.anchor_size, images.device, heads.RPN_SCALES)
        anchors = anchors.split([level.shape[1] for level in objectness])  # by level: (A_L, 4)
        sizes = own_regions(images, sizes)
        candidates = heads.TEST_CANDIDATES if targets is None else heads.TRAIN_CANDIDATES
        proposals = heads.propose(objectness, codes, anchors, sizes, candidates)  # B x (N, 4)
        pyramid = heads.pack_pyramid(features)
        if targets is None:
            return self.detect(pyramid, proposals, sizes)

        targets = {"noise": torch.arange(len(images), device=images.device)} | targets
        rois = loss.sample_rois(proposals, targets, self.rois, self.mask_rois)  # (B, R), the foreground first
        mask_rois = rois.first(self.mask_rois)  # (B, M)
        class_logits, box_codes = self.box_head(heads.roi_features(pyramid, rois.boxes, heads.BOX_POOL))
        mask_logits = self.mask_head(heads.roi_features(pyramid, mask_rois.boxes, heads.MASK_POOL))
        with torch.autocast(images.device.type, enabled=False):
            return (
                loss.rpn_loss(objectness, codes, anchors, targets)
                | loss.box_head_loss(class_logits, box_codes, rois, targets)
                | loss.mask_loss(mask_logits, mask_rois, targets)
            )

    def detect(self, pyramid, proposals, sizes):
        """Detections with masks from B proposals (N, 4) and image sizes: the mask head sees only what is detected."""
        class_logits, box_codes = self.box_head(heads.roi_features(pyramid, proposals, heads.BOX_POOL))
        scores = class_logits.float().softmax(dim=1)[:, 1:]  # without the background
        boxes = torch.cat(proposals)[:, None]  # (B N, 1, 4)
        boxes = heads.decode_boxes(box_codes[:, 1:], boxes, heads.BOX_CODE_WEIGHTS)  # (B N, K, 4)
        counts = [len(p) for p in proposals]
        found = [heads.detect(*parts) for parts in zip(scores.split(counts), boxes.split(counts), sizes)]

        logits = self.mask_head(heads.roi_features(pyramid, [one["boxes"] for one in found], heads.MASK_POOL))
        labels = torch.cat([one["labels"] for one in found])[:, None, None, None]
        masks = logits.take_along_dim(labels + 1, dim=1).squeeze(1).float().sigmoid()  # (all detections, 28, 28)
        masks = masks.split([len(one["boxes"]) for one in found])
        return [one | {"masks": own} for one, own in zip(found, masks)]

    def every_layer(self, x):
        """The outputs of all heads for normalized images (B, 3, H, W), with as many RoIs in each as a test can have."""
        features = self.backbone(x)
        pyramid = heads.pack_pyramid(features)
        proposals, detections = (x.new_zeros(len(x), n, 4) for n in (heads.MAX_PROPOSALS, heads.MAX_DETECTIONS))
        box_outputs = self.box_head(heads.roi_features(pyramid, proposals, heads.BOX_POOL))
        mask_logits = self.mask_head(heads.roi_features(pyramid, detections, heads.MASK_POOL))
        return self.rpn(features), box_outputs, mask_logits


HEADS = {"retinanet": RetinaNet, "mask_rcnn": MaskRCNN}


def build_model(arch, head="retinanet", num_classes=80, **options):
    """A detector with random weights. `arch` is a name in ARCHS or an Arch; `head` a name in HEADS.

    num_classes is the dataset's K: RetinaNet has K outputs per anchor, Mask R-CNN K + 1 per RoI. The options are
    those of the head's `options`.
    """
    arch = ARCHS[arch] if isinstance(arch, str) else arch
    return HEADS[head](arch, num_classes, **options)


def check_size(height, width):
    """Raise ValueError unless both sides are positive multiples of 128, P7's stride; it names "640x600" and 128."""
    if height % MULTIPLE or width % MULTIPLE or min(height, width) <= 0:
        raise ValueError(
            f"image size {height}x{width} does not fit SpineNet: height and width must be multiples of {MULTIPLE} "
            f"(the stride of P{max(LEVELS)}), such as {max(height // MULTIPLE, 1) * MULTIPLE}"
        )


PUBLISHED = (  # in the paper and MODEL_ZOO: head, arch, size, parameters in millions, multiply-adds in billions
    ("retinanet", "49S", 640, "12.0", "33.8"),
    ("retinanet", "49", 640, "28.5", "85.4"),
    ("retinanet", "49", 896, "28.5", "167.4"),
    ("retinanet", "96", 1024, "43.0", "265.4"),
    ("retinanet", "143", 1280, "66.9", "524.4"),
    ("retinanet", "190", 1280, "163.6", "1885"),
    ("mask_rcnn", "49S", 640, "13.9", "60.2"),
    ("mask_rcnn", "49", 640, "40.8", "216.1"),
    ("mask_rcnn", "96", 1024, "55.2", "315.0"),
    ("mask_rcnn", "143", 1280, "79.2", "498.8"),
    ("mask_rcnn", "190", 1536, "168.2", "1685.7"),
)
# COCO's largest category id is 90; the authors keep an output for each and for 0, which is Mask R-CNN's background.
PUBLISHED_CLASSES = {"retinanet": 91, "mask_rcnn": 90}


def count(arch, size, head="retinanet"):
    """(trainable parameters, multiply-adds of one size x size image), counted on the meta device in no time.

    The model has PUBLISHED_CLASSES and is in evaluation mode; its `every_layer` runs all there is to count.
    Multiply-adds are those of the convolutions, transposed convolutions and fully connected layers, as in the paper's
    "FLOPs"; for Mask R-CNN with 1000 RoIs in the box head and 100 in the mask head.
    """
    with torch.device("meta"):
        model = build_model(arch, head, PUBLISHED_CLASSES[head]).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.every_layer(torch.empty(1, 3, size, size))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parameters, counter.get_total_flops() // 2


def print_table():
    """Every arch's parameters and multiply-adds beside the published figures."""
    for head, classes in PUBLISHED_CLASSES.items():
        rows = [row for name, *row in PUBLISHED if name == head]
        rows += [(name, 128, "-", "-") for name in ARCHS if name not in {row[0] for row in rows}]
        print(f"{HEADS[head].__name__} with {classes} classes, one image, beside the published figures")
        print(f"{'arch':>5} {'size':>5} {'parameters':>12} {'paper, M':>9} {'multiply-adds':>18} {'paper, B':>9}")
        for arch, size, paper_parameters, paper_macs in rows:
            parameters, macs = count(arch, size, head)
            print(f"{arch:>5} {size:>5} {parameters:>12,} {paper_parameters:>9} {macs:>18,} {paper_macs:>9}")
    print("RetinaNet 49S was published with endpoints 256 wide (11,944,598 and 33.75 B), not as in its yaml with 128;")
    print("Mask R-CNN 190 was published with 1 RPN convolution, as here: its yaml's 7 make 176,198,465 and 2074 B.")


# A model from a file.


class UserError(Exception):
    """A mistake in the arguments or a fault in the data: one sentence that says what, where and what to do."""


def refuse(fault):
    """What becomes of a fault in the data, unless someone collects them."""
    raise UserError(fault)


CHECKPOINT = {"model", "optimizer", "scaler", "step", "evaluated", "best", "skipped", "recipe", "categories"}


def load_checkpoint(path):
    """A checkpoint of train.py as a dict; no code in it is run. Raises UserError where it is none. Its recipe's
    "network" is the whole Arch as plain values: a file says its own network."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; train.py writes last.pt and best.pt into its --out") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a checkpoint of tensors and plain values, so it was not loaded") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} can't be read as a checkpoint ({reason}); it may be truncated") from None
    lacking = CHECKPOINT - set(checkpoint) if isinstance(checkpoint, dict) else CHECKPOINT
    if lacking:
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(sorted(lacking))}")
    try:
        Arch.of(checkpoint["recipe"]["network"])
        known = checkpoint["recipe"]["head"] in HEADS and checkpoint["recipe"]["activation"] in blocks.ACTIVATIONS
    except (KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path} doesn't say its network: another version of train.py wrote it; load it with that one")
    return checkpoint


def load_model(checkpoint, place):
    """The detector that a checkpoint describes, in evaluation mode, on the device of an evaluate.Place."""
    recipe, classes = checkpoint["recipe"], len(checkpoint["categories"])
    detector = build_model(Arch.of(recipe["network"]), recipe["head"], classes, activation=recipe["activation"])
    detector.load_state_dict(checkpoint["model"])
    return place.move(detector).eval()


def load_weights(detector, checkpoint, categories, path):
    """Take from a checkpoint what fits by name and shape, class layers only if the classes agree; says what is new."""
    own, given = detector.state_dict(), checkpoint["model"]
    if checkpoint["categories"] != categories:
        given = {name: value for name, value in given.items() if not name.startswith(detector.class_layers)}
    fits = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    new = [name for name in own if name not in fits]
    other = differences(checkpoint["recipe"]["network"], detector.arch.plain())
    if not any(value.ndim > 1 for value in fits.values()):
        raise UserError(f"--weights {path}: no layer of it fits this model; its network is another: {other}")
    detector.load_state_dict(fits, strict=False)
    more = f" and {len(new) - 8} more" if len(new) > 8 else ""
    network = f"; its network is another: {other}" if other else ""
    return f"weights: {len(fits)} of {len(own)} tensors from {path}{network}; new: {new[:8]}{more}"


def differences(old, new):
    """What differs between two dicts of plain values, in words: "alpha 0.5 -> 1.0"."""
    changed = [name for name in new if old.get(name) != new[name]]
    return ", ".join(f"{name} {str(old.get(name)):.60} -> {str(new[name]):.60}" for name in changed)


if __name__ == "__main__":
    print_table()
