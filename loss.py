"""What is each prediction compared with? Matching, sampling and losses, as pure functions (paper section 4).

Dimensions: B images, A anchors, K classes, G ground-truth boxes (100, padded), R RoIs per image, M of them for masks.
Boxes are xyxy pixels. targets: {"boxes": (B, G, 4), "labels": (B, G) int64, -1 for padding; for Mask R-CNN also
"masks": (B, G, 112, 112) uint8, 0 or 1, each object's mask inside its box, and "noise": (B,) int64 in 0..2^32-1, from
which an image's random choices follow}.

No function here has a data-dependent shape or reads a value back to the host: padding and background
are selected away with `torch.where`, never branched on and never multiplied by 0 (inf * 0 is NaN).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_iou

from heads import BOX_CODE_WEIGHTS, MAX_PROPOSALS, encode_boxes

BACKGROUND = -1  # label of anchors and RoIs that match nothing, and of padding among the targets
IGNORED = -2  # label of anchors between two thresholds, and of padding among the RoIs

# RetinaNet's numbers (authors' retinanet yaml): IoU of a match, focal alpha and gamma, Huber delta, box weight.
MATCH_IOU = 0.5
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 1.5
HUBER_DELTA = 0.1
BOX_WEIGHT = 50.0

# Mask R-CNN's (authors' mask_rcnn yaml): RPN's IoU of a match and of background, anchors sampled per image, of which
# positive at most, Huber delta; RoIs per image, of which foreground at most, the IoU that parts them from background,
# Huber delta; side of mask targets.
RPN_MATCH_IOU, RPN_BACKGROUND_IOU = 0.7, 0.3
RPN_SAMPLES, RPN_POSITIVES = 256, 128
RPN_HUBER_DELTA = 1 / 9
ROIS, MASK_ROIS = 512, 128
ROI_IOU = 0.5
ROI_HUBER_DELTA = 1.0
MASK_TARGET_SIDE = 28


def match_anchors(anchors, boxes, labels, iou_threshold=MATCH_IOU, background_iou=None):
    """Each anchor's label and box: (A,) int64, -1 for background, and (A, 4) xyxy, its own anchor if it has no object.

    anchors (A, 4), boxes (G, 4), labels (G,) with -1 for padding; G may be 0. An anchor takes the object it overlaps
    most, if their IoU is at least the threshold. Each object also claims its best anchor, whatever the IoU, 0
    included: a claim overrides any match, the first object in the list wins a contested anchor, padding never claims.
    Ties go to the lowest index, of the objects and of the anchors. With `background_iou`, of the anchors without an
    object only those below it are background; the others have label -2.
    Source: RetinaNet section 4.1; Faster R-CNN section 3.1.2; authors' argmax_matcher.py.
    """
    nobody = len(boxes)  # the index of an extra, padded row: anchors nobody claims point there
    boxes = F.pad(boxes, (0, 0, 0, 1))  # (G + 1, 4)
    labels = F.pad(labels, (0, 1), value=BACKGROUND)  # (G + 1,)
    real = labels >= 0
    iou = box_iou(torch.where(real[:, None], boxes, 0.0), anchors)  # (G + 1, A)
    best_iou, best_object = iou.max(dim=0)  # (A,)

    claimant = torch.where(real, torch.arange(nobody + 1, device=boxes.device), nobody)
    claims = torch.full_like(best_object, nobody).scatter_reduce(0, iou.argmax(dim=1), claimant, "amin")  # (A,)
    claimed = claims < nobody
    matched = torch.where(claimed, claims, best_object)
    positive = claimed | (best_iou >= iou_threshold)
    others = BACKGROUND
    if background_iou is not None:
        others = torch.where(best_iou < background_iou, BACKGROUND, IGNORED)
    return (
        torch.where(positive, labels[matched], others),
        torch.where(positive[:, None], boxes[matched], anchors),
    )


def match_all(anchors, targets, *thresholds):
    """`match_anchors` for every image: labels (B, A), boxes (B, A, 4)."""
    matches = [match_anchors(anchors, *target, *thresholds) for target in zip(targets["boxes"], targets["labels"])]
    return tuple(torch.stack(part) for part in zip(*matches))


def focal_loss(logits, labels, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA):
    """Sum over all entries of -alpha_t (1 - p_t)^gamma log p_t, a float32 scalar; finite, however large the logits.

    logits (..., K), if of half precision then made float32; labels (...) int64 in 0..K-1, or -1 where every class is
    absent. Of a class that is present p_t is sigmoid(logit), alpha_t alpha; of one that is absent 1 minus those.

    Backward holds the logits (in their own dtype) and the labels: the elementwise terms are recomputed.
    Measured on 76,725 x 80 float32 logits, autograd saves 1.0 copies of them; written without the
    checkpoint it would save 5.25, and torchvision's sigmoid_focal_loss saves 8.0.
    Source: focal loss paper, equation 5; the authors' yaml has gamma 1.5, not the 2 of that paper.
    """

    def total(logits):
        present = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)  # (..., K)
        z = torch.where(present, logits.float(), -logits.float())  # p_t = sigmoid(z)
        alpha_t = torch.where(present, alpha, 1 - alpha)
        return (alpha_t * torch.sigmoid(-z) ** gamma * F.softplus(-z)).sum()

    return checkpoint(total, logits, use_reentrant=False, preserve_rng_state=False)


def over_ranks(count):
    """(sum of a tensor of counts over the ranks, number of ranks), without waiting for the device.

    DDP averages gradients: a rank's summed loss, divided by total / ranks, averages to the sum over all
    ranks divided by the total.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return count, 1
    total = count.clone()
    dist.all_reduce(total)
    return total, dist.get_world_size()


def mean_over_ranks(total, count):
    """A summed loss divided by its count, over all ranks (departure) and at least 1; elementwise."""
    counted, ranks = over_ranks(count.float())
    return total * ranks / counted.clamp(min=1)


def retinanet_loss(class_logits, box_codes, anchors, targets):
    """{"class": focal loss, "box": 50 x Huber loss}, float32 scalars whose sum is the training loss.

    class_logits (B, A, K), box_codes (B, A, 4), anchors (A, 4). Both are divided by 1 + the number of positive
    anchors in the micro-step's batch, over all ranks. Departures: theirs count per core, and leave out targets of 0.
    Huber's loss (0.5 d^2 up to delta, then linear) of the positive anchors' codes is summed over the four coordinates
    and divided by 4. Source: authors' losses.py.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        labels, boxes = match_all(anchors, targets)  # (B, A), (B, A, 4)
        positive = labels >= 0
        positives, ranks = over_ranks(positive.sum().float())
        normalizer = (positives + 1) / ranks
        codes = torch.where(positive[..., None], box_codes.float(), 0.0)  # background's target is code 0
        box = F.huber_loss(codes, encode_boxes(boxes, anchors), reduction="sum", delta=HUBER_DELTA) / 4
        return {
            "class": focal_loss(class_logits, labels) / normalizer,
            "box": BOX_WEIGHT * box / normalizer,
        }


def random_keys(noise, stream, count):
    """(B, count) int64 in 0..2^32-1, different within a row: a pure function of noise (B,) and the stream's number.

    The RPN draws from stream 0, the RoIs from stream 1.
    Departure: a hash in place of a generator: it draws per image, whatever the batch, the rank and the device.
    """

    def mix(x):  # a permutation of 32 bits
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    return mix(mix(mix(noise) ^ stream)[:, None] ^ torch.arange(count, device=noise.device))


def pick(candidates, keys, limit):
    """At most `limit` candidates per image, those of the highest keys: their indices (B, limit), and which are real.

    candidates (B, N) bool, keys (B, N) int64, limit <= N. The real ones come first, by falling key; what is not real
    fills up and means nothing.
    """
    best, index = torch.where(candidates, keys, -1).topk(limit, dim=1)
    return index, best >= 0


def rpn_loss(objectness, box_codes, anchors, targets):
    """{"rpn_class": binary cross-entropy, "rpn_box": Huber loss} of the proposals, float32 scalars.

    objectness [(B, A_L)], box_codes [(B, A_L, 4)], anchors [(A_L, 4)], lists by level. The first is over 256
    anchors of each image, which `pick` takes by the `random_keys` of stream 0 over all levels: at most half of them
    positive, the rest background. It is divided by 256 B, also where fewer are there, and not summed over ranks. The
    second is over all positive anchors, sampled or not: the mean over their coordinates within a level, over all ranks,
    or 0 without any, summed over the levels.
    Source: Faster R-CNN sections 3.1.2 and 3.1.3; authors' losses.py:147-196.
    """
    counts = [len(level) for level in anchors]
    logits, codes, anchors = torch.cat(objectness, 1).float(), torch.cat(box_codes, 1).float(), torch.cat(anchors)
    labels, boxes = match_all(anchors, targets, RPN_MATCH_IOU, RPN_BACKGROUND_IOU)  # (B, A), (B, A, 4)
    positive = labels >= 0

    keys = random_keys(targets["noise"], 0, len(anchors))
    index, chosen = pick(positive, keys, RPN_POSITIVES)
    class_loss = torch.where(chosen, F.softplus(-logits.gather(1, index)), 0.0).sum()
    left = RPN_SAMPLES - chosen.sum(dim=1, keepdim=True)  # (B, 1)
    index, chosen = pick(labels == BACKGROUND, keys, RPN_SAMPLES)  # real ones first: the first `left` are taken
    chosen = chosen & (torch.arange(RPN_SAMPLES, device=left.device) < left)
    class_loss = class_loss + torch.where(chosen, F.softplus(logits.gather(1, index)), 0.0).sum()

    codes = torch.where(positive[..., None], codes, 0.0)  # the others' target is code 0
    huber = F.huber_loss(codes, encode_boxes(boxes, anchors), reduction="none", delta=RPN_HUBER_DELTA).sum(dim=(0, 2))
    by_level = torch.stack([level.sum() for level in huber.split(counts)])  # (5,)
    positives = torch.stack([level.sum() for level in positive.split(counts, dim=1)])
    return {
        "rpn_class": class_loss / (RPN_SAMPLES * len(logits)),
        "rpn_box": mean_over_ranks(by_level, 4 * positives).sum(),
    }


class RoIs(NamedTuple):
    """What the second stage trains on, the foreground first."""

    boxes: torch.Tensor  # (B, R, 4)
    labels: torch.Tensor  # (B, R) int64: the object's, -1 for background, -2 for padding
    objects: torch.Tensor  # (B, R) int64: index of the object that overlaps it most

    def first(self, count):
        """The first RoIs of each image."""
        return RoIs(*(part[:, :count] for part in self))

    def of_objects(self, values):
        """(B, G, ...) of the targets -> (B, R, ...) of each RoI's object."""
        return values[torch.arange(len(values), device=values.device)[:, None], self.objects]

    def with_objects(self, targets):
        """(foreground (B, R), RoI boxes, their objects' boxes), where it is background both 1 x 1 at the origin."""
        foreground = self.labels >= 0
        unit = F.pad(torch.ones_like(self.boxes[..., :2]), (2, 0))
        boxes = (self.boxes, self.of_objects(targets["boxes"]))
        return foreground, *(torch.where(foreground[..., None], b, unit) for b in boxes)


def sample_rois(proposals, targets, count, foreground_count):
    """RoIs: `count` per image, at most `foreground_count` of them foreground, drawn from proposals and objects.

    proposals: B tensors (N, 4), N <= 1000. Foreground overlaps an object by more than IoU 0.5, background every object
    by less; exactly 0.5 is neither. `pick` takes both by the `random_keys` of stream 1 over the proposals, padded to
    1000, and then the objects. Background takes all places that foreground leaves; where there is not enough of it, the
    rest is padding of zero boxes (departure). Source: Fast R-CNN section 2.3; authors' target_ops.py.
    """
    device = targets["labels"].device
    real = torch.stack([torch.arange(MAX_PROPOSALS, device=device) < len(p) for p in proposals])
    objects = targets["labels"] >= 0  # (B, G)
    real = torch.cat((real, objects), dim=1)  # (B, 1000 + G)
    boxes = torch.stack([F.pad(p, (0, 0, 0, MAX_PROPOSALS - len(p))) for p in proposals])
    boxes = torch.cat((boxes, targets["boxes"]), dim=1)  # (B, 1000 + G, 4)
    iou = torch.stack([box_iou(*pair) for pair in zip(boxes, targets["boxes"])])  # (B, 1000 + G, G)
    iou, matched = torch.where(objects[:, None], iou, 0.0).max(dim=2)  # (B, 1000 + G)

    keys = random_keys(targets["noise"], 1, boxes.shape[1])
    foreground, is_foreground = pick(real & (iou > ROI_IOU), keys, foreground_count)
    background, is_background = pick(real & (iou < ROI_IOU), keys, count)
    left = count - is_foreground.sum(dim=1, keepdim=True)
    is_background = is_background & (torch.arange(count, device=device) < left)
    # Real ones to the front, in order: foreground, background, filling.
    chosen, order = torch.cat((is_foreground, is_background), 1).int().sort(dim=1, descending=True, stable=True)
    index = torch.cat((foreground, background), 1).gather(1, order)[:, :count]
    chosen = chosen[:, :count] > 0

    matched = matched.gather(1, index)
    labels = torch.where(iou.gather(1, index) > ROI_IOU, targets["labels"].gather(1, matched), BACKGROUND)
    boxes = torch.where(chosen[..., None], boxes.take_along_dim(index[..., None], dim=1), 0.0)
    return RoIs(boxes, torch.where(chosen, labels, IGNORED), matched)


def box_head_loss(class_logits, box_codes, rois, targets):
    """{"class": cross-entropy, mean over the real RoIs, "box": Huber loss, mean over the foreground's coordinates}.

    class_logits (B R, K + 1), background first, box_codes (B R, K + 1, 4) in units of BOX_CODE_WEIGHTS, of which a
    RoI's own class counts. Both means are over all ranks, and 0 over nothing.
    Source: Fast R-CNN section 2.3; authors' losses.py.
    """
    classes = (rois.labels + 1).clamp(min=0).flatten()  # (B R,)
    real = (rois.labels > IGNORED).flatten()
    entropy = torch.where(real, F.cross_entropy(class_logits.float(), classes, reduction="none"), 0.0)

    foreground, roi_boxes, boxes = (part.flatten(0, 1) for part in rois.with_objects(targets))
    codes = box_codes.take_along_dim(classes[:, None, None], dim=1).squeeze(1).float()  # (B R, 4)
    codes = torch.where(foreground[:, None], codes, 0.0)  # the others' target is code 0
    target = encode_boxes(boxes, roi_boxes, BOX_CODE_WEIGHTS)
    box = F.huber_loss(codes, target, reduction="sum", delta=ROI_HUBER_DELTA)
    return {
        "class": mean_over_ranks(entropy.sum(), real.sum()),
        "box": mean_over_ranks(box, 4 * foreground.sum()),
    }


def mask_targets(rois, targets):
    """What the mask head should say: (B, M, 28, 28) float32 in 0..1, read from the objects' 112 x 112 masks.

    A target's cell is the mask, bilinearly, at the cell's centre, and between the centres of the mask's outer cells and
    the edge of the object's box what the outer cells are. Where the centre is outside of that box it is 0, without
    fading, and so it is for RoIs that are not foreground.
    Source: Mask R-CNN section 3; authors' spatial_transform_ops.py.
    """
    foreground, roi_boxes, boxes = rois.with_objects(targets)
    masks = rois.of_objects(targets["masks"]).flatten(0, 1)[:, None].float()  # (B M, 1, 112, 112)
    centres = (torch.arange(MASK_TARGET_SIDE, device=boxes.device) + 0.5) / MASK_TARGET_SIDE  # (28,)
    low, side = roi_boxes[..., None, :2], roi_boxes[..., None, 2:] - roi_boxes[..., None, :2]
    places = low + centres[:, None] * side  # (B, M, 28, 2): x and y of the columns' and rows' centres
    places = (places - boxes[..., None, :2]) / (boxes[..., None, 2:] - boxes[..., None, :2])  # 0..1 in the object's box
    x, y = places.flatten(0, 1).unbind(dim=-1)  # (B M, 28)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (B M, 28, 28, 2)
    edge = 1 - 1 / masks.shape[-1]  # the centre of the outer cells: beyond it their value holds
    values = F.grid_sample(masks, (2 * grid - 1).clamp(-edge, edge), mode="bilinear", align_corners=False)
    inside = ((grid >= 0) & (grid <= 1)).all(dim=-1) & foreground.flatten()[:, None, None]
    return torch.where(inside, values[:, 0], 0.0).unflatten(0, rois.labels.shape)


def mask_loss(mask_logits, rois, targets):
    """{"mask": binary cross-entropy of the object's class, mean over the foreground's cells, over all ranks}.

    mask_logits (B M, K + 1, 28, 28), background first; rois: B M; 0 without foreground. Source: Mask R-CNN section 3.
    """
    classes = (rois.labels + 1).clamp(min=0).flatten()
    logits = mask_logits.take_along_dim(classes[:, None, None, None], dim=1).squeeze(1).float()  # (B M, 28, 28)
    wanted = mask_targets(rois, targets).flatten(0, 1)
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(1, 2))  # (B M,)
    foreground = (rois.labels >= 0).flatten()
    return {"mask": mean_over_ranks(torch.where(foreground, entropy, 0.0).sum(), foreground.sum())}
