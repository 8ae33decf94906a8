"""What is each prediction compared with? Matching and losses, as pure functions (paper section 4.1).

Dimensions: B images, A anchors, K classes, G ground-truth boxes (100, padded). Boxes are xyxy pixels.
No function here has a data-dependent shape or reads a value back to the host: padding and background
are selected away with `torch.where`, never branched on and never multiplied by 0 (inf * 0 is NaN).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_iou

from heads import encode_boxes

BACKGROUND = -1  # label of anchors that match nothing, and of padding among the targets

# RetinaNet's numbers (authors' retinanet yaml): IoU of a match, focal alpha and gamma, Huber delta, box weight.
MATCH_IOU = 0.5
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 1.5
HUBER_DELTA = 0.1
BOX_WEIGHT = 50.0


def match_anchors(anchors, boxes, labels, iou_threshold=MATCH_IOU):
    """Each anchor's label and box: (A,) int64, -1 for background, and (A, 4) xyxy, for background its own anchor.

    anchors (A, 4), boxes (G, 4), labels (G,) with -1 for padding. An anchor takes the object it overlaps
    most, if their IoU is at least the threshold. Each object also claims its best anchor, whatever the IoU:
    a claim overrides any match, the first object in the list wins a contested anchor, ties go to the lowest
    index, padding never claims. Source: RetinaNet section 4.1; authors' argmax_matcher.py.
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
    return (
        torch.where(positive, labels[matched], BACKGROUND),
        torch.where(positive[:, None], boxes[matched], anchors),
    )


def focal_loss(logits, labels, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA):
    """Sum over all entries of -alpha_t (1 - p_t)^gamma log p_t, a float32 scalar.

    logits (..., K); labels (...) int64 in 0..K-1, or -1 where every class is absent.

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
    """(sum of a 0-dim count over the ranks, number of ranks), without waiting for the device.

    DDP averages gradients: a rank's summed loss, divided by total / ranks, averages to the sum over all
    ranks divided by the total.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return count, 1
    total = count.clone()
    dist.all_reduce(total)
    return total, dist.get_world_size()


def retinanet_loss(class_logits, box_codes, anchors, targets):
    """{"class": focal loss, "box": 50 x Huber loss}, float32 scalars whose sum is the training loss.

    class_logits (B, A, K), box_codes (B, A, 4), anchors (A, 4); targets: {"boxes": (B, G, 4) xyxy,
    "labels": (B, G) int64, -1 for padding}. Both are divided by 1 + the number of positive anchors in the
    micro-step's batch, over all ranks. Departure: the authors count per TPU core.
    Huber: summed over the four coordinates and divided by 4. Source: authors' losses.py.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        matches = [match_anchors(anchors, *target) for target in zip(targets["boxes"], targets["labels"])]
        labels = torch.stack([labels for labels, _ in matches])  # (B, A)
        boxes = torch.stack([boxes for _, boxes in matches])  # (B, A, 4)
        positive = labels >= 0
        positives, ranks = over_ranks(positive.sum().float())
        normalizer = (positives + 1) / ranks
        codes = torch.where(positive[..., None], box_codes.float(), 0.0)  # background's target is code 0
        box = F.huber_loss(codes, encode_boxes(boxes, anchors), reduction="sum", delta=HUBER_DELTA) / 4
        return {
            "class": focal_loss(class_logits, labels) / normalizer,
            "box": BOX_WEIGHT * box / normalizer,
        }
