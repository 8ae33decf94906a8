"""Wrong and right bodies of the assignments' functions: the graders refuse the wrong, in words, and take the right.

python tools/make_assignment.py --check-variants
"""

from typing import NamedTuple


class Variant(NamedTuple):
    """One function as a student might have written it."""

    function: str  # module.function or module.Class.method
    what: str  # the mistake; of a right one, how its form differs from the solution's
    body: tuple | str  # pairs (text of the solution's body, what stands in its place), or a whole body
    says: str = ""  # of a wrong one: a regular expression that is found in the failing test's message


VARIANTS = {
    "a1": {
        "wrong": (
            Variant(
                "blocks.drop_block",
                "isolated pixels, that is dropout",
                "return F.dropout(x, rate, training) if training and rate else x",
                "whole 7 x 7 squares vanish",
            ),
            Variant(
                "blocks.max_pool_same",
                "padding with zeros",
                "return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), kernel, stride)",
                "the padding is never the maximum",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "activating before the sum",
                (("(shortcut + branch)", "(shortcut) + branch"),),
                "the shortcut is activated before the sum",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "stochastic depth without rescaling",
                """
                shortcut = x if self.project is None else self.project(x)
                shortcut = drop_block(shortcut, self.drop_rate, self.training)
                branch = self.branch(x)
                if self.training:
                    branch = branch * (torch.rand(len(x), 1, 1, 1) >= self.drop_path)
                return ACTIVATIONS[self.activation](shortcut + branch)
                """,
                "a branch that survives is divided by the survival rate: 3 / 0.75 = 4, not 3.00",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "stochastic depth per batch",
                (('"row"', '"batch"'),),
                "draws for each image",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "stochastic depth in evaluation, too",
                (('"row", self.training', '"row", True'),),
                "nothing is random in evaluation",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "no DropBlock on the shortcut",
                (("shortcut = drop_block(shortcut, self.drop_rate, self.training)", "pass"),),
                "DropBlock is applied to the shortcut",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "DropBlock on a projection, but not on the identity",
                (("shortcut = drop_block(", "shortcut = shortcut if self.project is None else drop_block("),),
                "DropBlock is applied to the shortcut, which is the identity",
            ),
            Variant(
                "blocks.drop_block",
                "the same squares in every channel",
                (("torch.ones_like(x,", "torch.ones_like(x[:, :1],"),),
                "each channel has its own squares",
            ),
            Variant(
                "blocks.drop_block",
                "no rescaling",
                (("x * mask.to(x.dtype)", "x * (mask > 0).to(x.dtype)"),),
                "what is left is scaled by elements / elements left",
            ),
            Variant(
                "blocks.drop_block",
                "in evaluation, too",
                (("not training or rate == 0.0", "rate == 0.0"),),
                "in evaluation DropBlock gives x itself",
            ),
            Variant(
                "blocks.drop_block",
                "the mask counted in the dtype of x",
                (("x, dtype=torch.float32", "x"),),
                "in half precision the scale is to be counted in float32",
            ),
            Variant(
                "blocks.ConvBN.forward",
                "the activation before batch norm",
                "x = self.conv(x)\n"
                "if self.activation is not None:\n    x = ACTIVATIONS[self.activation](x)\n"
                "return drop_block(self.bn(x), self.drop_rate, self.training)",
                "one after the other: convolution, batch norm, activation relu",
            ),
            Variant(
                "blocks.ConvBN.forward",
                "DropBlock after the activation",
                "x = self.bn(self.conv(x))\n"
                "x = x if self.activation is None else ACTIVATIONS[self.activation](x)\n"
                "return drop_block(x, self.drop_rate, self.training)",
                "DropBlock comes before the activation",
            ),
            Variant(
                "blocks.Resample.forward",
                "pooling instead of the strided convolution",
                (("x = self.down(x)", "x = F.max_pool2d(x, 2)"),),
                "squeeze, a convolution of stride 2",
            ),
            Variant(
                "blocks.Resample.forward",
                "a pool of kernel = stride",
                (("max_pool_same(x, stride + 1, stride)", "max_pool_same(x, stride, stride)"),),
                "a max-pool of kernel 3 and stride 2",
            ),
            Variant(
                "blocks.Resample.forward",
                "bilinear instead of nearest",
                (('mode="nearest"', 'mode="bilinear"'),),
                "each pixel 2 x 2 times",
            ),
            Variant(
                "blocks.max_pool_same",
                "padding on both sides",
                "return F.max_pool2d(x, kernel, stride, padding=kernel // 2)",
                "padded right and bottom",
            ),
            Variant(
                "blocks.init_conv_",
                "a standard deviation not corrected for the truncation",
                ((" / 0.87962566", ""),),
                "the standard deviation is 0.8[78]",
            ),
            Variant(
                "blocks.init_conv_",
                "no truncation",
                "nn.init.normal_(conv.weight, std=math.sqrt(1 / conv.weight[0].numel()))",
                "cut at 2 sigma",
            ),
            Variant(
                "blocks.drop_block",
                "zeros of x count as dropped",
                (
                    (
                        "return x * mask.to(x.dtype)",
                        "y = x * (mask > 0)\nreturn y * (x.numel() / y.count_nonzero().clamp(min=1)).to(x.dtype)",
                    ),
                ),
                "zeros of x, as a ReLU makes them, are among the elements left",
            ),
            Variant(
                "blocks.ConvBN.forward",
                "DropBlock only before an activation",
                (
                    ("drop_block(self.bn(self.conv(x)), self.drop_rate, self.training)", "self.bn(self.conv(x))"),
                    ("[self.activation](x)", "[self.activation](drop_block(x, self.drop_rate, self.training))"),
                ),
                "squares vanish after the batch norm; the activation is None",
            ),
            Variant(
                "blocks.init_conv_",
                "redrawn until all is within two sigma, which asks the meta device for values",
                """
                sigma = math.sqrt(1 / conv.weight[0].numel()) / 0.87962566
                with torch.no_grad():
                    conv.weight.normal_(std=sigma)
                    while (beyond := conv.weight.abs() > 2 * sigma).any():
                        conv.weight[beyond] = torch.randn(int(beyond.sum())) * sigma
                """,
                "fails on the meta device",
            ),
            Variant(
                "blocks.drop_block",
                "NaN where nothing is left",
                (
                    (
                        "return x * mask.to(x.dtype)",
                        "kept = (mask > 0).float()\nreturn x * (kept * (kept.numel() / kept.sum())).to(x.dtype)",
                    ),
                ),
                "of the one element, which vanishes, nan is left",
            ),
        ),
        "right": (
            Variant(
                "blocks.max_pool_same",
                "the maximum of unfolded windows",
                """
                x = F.pad(x, (0, kernel - stride, 0, kernel - stride), value=-math.inf)
                return x.unfold(2, kernel, stride).unfold(3, kernel, stride).amax((-1, -2))
                """,
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "adds the other way round",
                (("shortcut + branch", "branch + shortcut"),),
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "the branch first, and stochastic depth written out",
                """
                branch = self.branch(x)
                if self.training and self.drop_path > 0:
                    survives = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
                    branch = branch * survives / (1 - self.drop_path)
                if self.project is not None:
                    x = self.project(x)
                return ACTIVATIONS[self.activation](branch.add(drop_block(x, self.drop_rate, self.training)))
                """,
            ),
            Variant(
                "blocks.drop_block",
                "written out, from the paper's equation 1",
                """
                if not training or rate == 0.0:
                    return x
                height, width = x.shape[-2:]
                side = min(DROP_BLOCK_SIZE, height, width)
                side = side if side % 2 else side - 1
                rows, columns = height - side + 1, width - side + 1
                gamma = rate * height * width / (side**2 * rows * columns)
                begins = torch.zeros(*x.shape[:2], rows, columns, device=x.device).bernoulli_(gamma)
                gone = F.max_pool2d(F.pad(begins, [side - 1] * 4), side, 1)
                left = (1 - gone).sum().clamp(min=1)
                return torch.where(gone > 0, 0, x * (gone.numel() / left).to(x.dtype))
                """,
            ),
            Variant(
                "blocks.drop_block",
                "torchvision's on float32, cast back",
                """
                if rate == 0.0 or training is False:
                    return x
                side = next(s for s in (7, 5, 3, 1) if s <= min(x.shape[2], x.shape[3]))
                return drop_block2d(x.float(), rate, side).type_as(x)
                """,
            ),
            Variant(
                "blocks.ConvBN.forward",
                "step by step",
                """
                x = self.conv(x)
                x = self.bn(x)
                if self.training and self.drop_rate:
                    x = drop_block(x, self.drop_rate, True)
                if self.activation == "swish":
                    return x * torch.sigmoid(x)
                return torch.relu(x) if self.activation == "relu" else x
                """,
            ),
            Variant(
                "blocks.Resample.forward",
                "repeating pixels, after expand",
                """
                x = self.squeeze(x)
                if self.down is not None:
                    x = self.down(x)
                stride = round(self.factor / 2)
                if stride > 1:
                    x = max_pool_same(x, stride + 1, stride)
                x = self.expand(x)
                if self.factor < 1:
                    times = round(1 / self.factor)
                    x = x.repeat_interleave(times, -1).repeat_interleave(times, -2)
                return x
                """,
            ),
            Variant(
                "blocks.max_pool_same",
                "padding by hand",
                """
                total = kernel - stride
                before = total // 2
                x = F.pad(x, (before, total - before, before, total - before), value=-torch.inf)
                return F.max_pool2d(x, kernel, stride)
                """,
            ),
            Variant(
                "blocks.init_conv_",
                "by the inverse of the normal distribution",
                """
                cut = math.erf(2 / math.sqrt(2))
                std = conv.weight[0].numel() ** -0.5
                with torch.no_grad():
                    conv.weight.uniform_(-cut, cut).erfinv_().mul_(math.sqrt(2) * std / 0.87962566)
                """,
            ),
        ),
    },
    "a2": {
        "wrong": (
            Variant(
                "model.Normalize.forward",
                "BGR",
                (("(images - self.mean) / self.std", "(images - self.mean.flip(0)) / self.std.flip(0)"),),
                "the channels are taken as BGR",
            ),
            Variant(
                "model.Normalize.forward",
                "pixels in 0..1",
                (("(images - self.mean)", "(images / 255 - self.mean)"),),
                "pixels are in 0..255",
            ),
            Variant(
                "model.check_size",
                "0 is a multiple of 128",
                ((" or min(height, width) <= 0", ""),),
                "check_size takes 0x128",
            ),
            Variant(
                "model.check_size",
                "only the width is checked",
                (
                    (
                        "height % MULTIPLE or width % MULTIPLE or min(height, width) <= 0",
                        "width % MULTIPLE or not width",
                    ),
                ),
                "check_size takes 600x640",
            ),
            Variant(
                "model.check_size",
                "multiples of 64",
                (("height % MULTIPLE or width % MULTIPLE or", "height % 64 or width % 64 or"),),
                "check_size takes 192x128",
            ),
            Variant(
                "model.check_size",
                "another exception",
                (("raise ValueError", "raise RuntimeError"),),
                "with a ValueError, not with RuntimeError",
            ),
            Variant(
                "model.check_size",
                "a message without the size",
                (("image size {height}x{width} does not fit SpineNet: ", ""),),
                "check_size says 640x600 and 128, not",
            ),
            Variant(
                "model.Arch.width",
                "rounded to the nearest",
                (("int(", "round("),),
                "is 41, not 42",
            ),
            Variant(
                "model.Arch.width",
                "the width of the level below",
                (("BASE_WIDTH[level]", "BASE_WIDTH[max(level - 1, 2)]"),),
                "at level 3 is 83, not 41",
            ),
            Variant(
                "model.SpineNet.forward",
                "the unresampled parent left out of the sum",
                (("parts += [features[p] for p in block.as_is]", "pass"),),
                "the blocks in its `as_is` are not in the sum",
            ),
            Variant(
                "model.SpineNet.forward",
                "activating before all parents are summed",
                (
                    ("parts = [resample(features[p])", "parts = [self.activation(resample(features[p]))"),
                    ("self.activation(sum(parts[1:], start=parts[0]))", "sum(parts[1:], start=parts[0])"),
                ),
                "each part is activated before the sum|this is another value",
            ),
            Variant(
                "model.SpineNet.forward",
                "activating twice",
                (("fused)", "self.activation(fused))"),),
                "the sum is activated twice",
            ),
            Variant(
                "model.SpineNet.forward",
                "no activation",
                (("self.activation(sum(parts[1:], start=parts[0]))", "sum(parts)"),),
                "the sum is not activated",
            ),
            Variant(
                "model.SpineNet.forward",
                "outputs in the order of block numbers",
                (("for L in LEVELS]", "for L in self.outputs]"),),
                "in the order of the levels",
            ),
            Variant(
                "model.SpineNet.forward",
                "blocks 0 and 1 both take what the stem gave",
                (("x = features[number] =", "features[number] ="),),
                "block 1 is given what block 0 gave, not the stem",
            ),
            Variant(
                "model.SpineNet.forward",
                "no check of the size",
                (("check_size(*x.shape[-2:])", "pass"),),
                "the network refuses 640x600 with a ValueError, not with RuntimeError",
            ),
            Variant(
                "model.Normalize.forward",
                "arithmetic in uint8",
                (("images - self.mean)", "images - self.mean.to(torch.uint8))"),),
                "one of uint8, which has no negative numbers",
            ),
            Variant(
                "model.count",
                "FLOPs, two for each multiply-add",
                ((" // 2", ""),),
                "2.0000 times it",
            ),
            Variant(
                "model.count",
                "buffers among the parameters",
                (
                    (
                        "p.numel() for p in model.parameters() if p.requires_grad",
                        "v.numel() for v in model.state_dict().values()",
                    ),
                ),
                "is not the number of trainable parameters, without buffers",
            ),
            Variant(
                "model.count",
                "what isn't trained among the parameters",
                ((" if p.requires_grad", ""),),
                "is not the number of trainable parameters",
            ),
            Variant(
                "model.SpineNet.forward",
                "each level's last block leaves",
                (
                    (
                        "features[block.number] = self.groups",
                        "features[-block.level] = features[block.number] = self.groups",
                    ),
                    ("features[self.outputs[L]]", "features[-L]"),
                ),
                "P5 is made of block 11",
            ),
            Variant(
                "model.count",
                "a layer that runs twice counts once",
                """
                macs = {}

                def note(layer, given, made):
                    pixels = given[0] if isinstance(layer, nn.ConvTranspose2d) else made
                    macs[layer] = layer.weight.numel() * pixels[:, 0].numel()

                with torch.device("meta"), torch.no_grad():
                    model = build_model(arch, head, PUBLISHED_CLASSES[head]).eval()
                    for layer in model.modules():
                        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                            layer.register_forward_hook(note)
                    model.every_layer(torch.empty(1, 3, size, size))
                return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(macs.values())
                """,
                "one runs twice",
            ),
            Variant(
                "model.SpineNet.forward",
                "two parents and no more",
                (("zip(block.parents, resamples)", "zip(block.parents[:2], resamples)"),),
                "every part of the network runs once",
            ),
            Variant(
                "model.Normalize.forward",
                "constants made anew, on the CPU",
                (("self.mean", "torch.tensor(PIXEL_MEAN).view(3, 1, 1)"),),
                "images of the device that the module was moved to stay there",
            ),
            Variant(
                "model.check_size",
                "negative sides are taken",
                (("min(height, width) <= 0", "not height * width"),),
                "takes -128x128",
            ),
        ),
        "right": (
            Variant(
                "model.Normalize.forward",
                "in 0..1, with the constants in 0..1",
                "return images.float().div(255).sub(self.mean / 255).div(self.std / 255)",
            ),
            Variant(
                "model.check_size",
                "side by side",
                """
                for side in (height, width):
                    if side < 1 or side % 128 != 0:
                        raise ValueError(f"{height}x{width}: {side} is not a positive multiple of 128")
                """,
            ),
            Variant(
                "model.Arch.width",
                "floor by division",
                "return int(self.filter_scale * BASE_WIDTH[level] // 1)",
            ),
            Variant(
                "model.SpineNet.forward",
                "one loop over numbers, adding in place",
                """
                height, width = x.shape[2:]
                check_size(height, width)
                done = [self.groups["0"](self.stem(x))]
                done.append(self.groups["1"](done[0]))
                leaving = {}
                for block in self.spine:
                    total = 0
                    for k, parent in enumerate(block.parents):
                        total += self.resamples[str(block.number)][k](done[parent])
                    for parent in block.as_is:
                        total += done[parent]
                    done.append(self.groups[str(block.number)](self.activation(total)))
                    if block.output:
                        leaving[block.level] = self.endpoints[str(block.level)](done[-1])
                return [leaving[level] for level in sorted(leaving)]
                """,
            ),
            Variant(
                "model.SpineNet.forward",
                "a stack, summed",
                (("sum(parts[1:], start=parts[0])", "torch.stack(parts[::-1]).sum(0)"),),
            ),
            Variant(
                "model.Normalize.forward",
                "a scale and a shift",
                "return images * (1 / self.std) - self.mean / self.std",
            ),
            Variant(
                "model.count",
                "by hooks on the layers",
                """
                macs = []

                def add(layer, inputs, output):
                    places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
                    channels = layer.weight.shape[0]
                    macs.append(places.numel() // channels * layer.weight.numel())

                with torch.device("meta"), torch.no_grad():
                    model = build_model(arch, head, PUBLISHED_CLASSES[head])
                    model.train(False)
                    for layer in model.modules():
                        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                            layer.register_forward_hook(add)
                    model.every_layer(torch.zeros(1, 3, size, size))
                return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(macs)
                """,
            ),
        ),
    },
    "a3": {
        "wrong": (
            Variant(
                "heads.make_anchors",
                "x and y swapped off the square",
                (
                    ("x = (torch.arange(size[1]", "x = (torch.arange(size[0]"),
                    ("y = (torch.arange(size[0]", "y = (torch.arange(size[1]"),
                ),
                "row by row",
            ),
            Variant(
                "loss.match_anchors",
                "an object that claims no anchor",
                (("claimed = claims < nobody", "claimed = (claims < nobody) & (best_iou >= iou_threshold)"),),
                "claims an anchor, whatever the IoU",
            ),
            Variant(
                "loss.match_anchors",
                "the logarithm of padding: anchors without an object have the padding's box",
                (("torch.where(positive[:, None], boxes[matched], anchors)", "boxes[matched]"),),
                "logarithm of padding",
            ),
            Variant(
                "heads.make_anchors",
                "aspect upside down",
                (
                    ("scale * math.sqrt(aspect)", "scale / math.sqrt(aspect)"),
                    ("scale / math.sqrt(aspect))\n", "scale * math.sqrt(aspect))\n"),
                ),
                "aspect 2 is wide",
            ),
            Variant(
                "heads.make_anchors",
                "aspect-major",
                (
                    ("for scale in scales\n", "for aspect in aspects\n"),
                    ("    for aspect in aspects\n    ]", "    for scale in scales\n    ]"),
                ),
                "scale-major",
            ),
            Variant(
                "heads.make_anchors",
                "centres in the locations' corners",
                (
                    ("size[1] // stride) + 0.5)", "size[1] // stride))"),
                    ("size[0] // stride) + 0.5)", "size[0] // stride))"),
                ),
                "centre is half a stride",
            ),
            Variant(
                "heads.make_anchors",
                "sides in float32 from the start",
                (
                    (
                        "torch.tensor(sides, dtype=torch.float64).float() / 2",
                        "torch.tensor([[float(s * a), float(s / a)] for s in anchor_size * stride "
                        "* torch.tensor(scales) for a in torch.tensor(aspects).sqrt()]) / 2",
                    ),
                ),
                "to the last bit",
            ),
            Variant(
                "heads.encode_boxes",
                "weights swapped",
                (("shift * weights[0]", "shift * weights[1]"), ("scale * weights[1]", "scale * weights[0]")),
                "weights multiply the code",
            ),
            Variant(
                "heads.encode_boxes",
                "the ratio of the sides upside down",
                (("(side / anchor_side)", "(anchor_side / side)"),),
                "log of the box's side",
            ),
            Variant(
                "heads.decode_boxes",
                "no clamp",
                ((".clamp(max=MAX_LOG_SCALE)", ""),),
                "at most 62.5|clamped is the log",
            ),
            Variant(
                "heads.clip_boxes",
                "x clipped to the height",
                ((".flip(1)", ""),),
                "x is clipped to 0..width",
            ),
            Variant(
                "heads.clip_boxes",
                "not at 0",
                (("boxes.clamp(min=0)", "boxes"),),
                "x is clipped to 0..width",
            ),
            Variant(
                "loss.match_anchors",
                "threshold exclusive",
                (("best_iou >= iou_threshold", "best_iou > iou_threshold"),),
                "exactly the threshold",
            ),
            Variant(
                "loss.match_anchors",
                "the last object wins a contested anchor",
                (
                    (
                        "claimant = torch.where(real, torch.arange(nobody + 1, device=boxes.device), nobody)",
                        "claimant = torch.where(real, torch.arange(nobody + 1, device=boxes.device), -1)",
                    ),
                    ("torch.full_like(best_object, nobody)", "torch.full_like(best_object, -1)"),
                    ('"amin"', '"amax"'),
                    ("claims < nobody", "claims >= 0"),
                ),
                "two objects claim goes to the first",
            ),
            Variant(
                "loss.match_anchors",
                "padding claims",
                (
                    (
                        "claimant = torch.where(real, torch.arange(nobody + 1, device=boxes.device), nobody)",
                        "claimant = torch.arange(nobody + 1, device=boxes.device)",
                    ),
                ),
                "padding never claims|overlaps none has -1",
            ),
            Variant(
                "loss.match_anchors",
                "an object claims the last of its best anchors",
                (("iou.argmax(dim=1)", "(iou.shape[1] - 1 - iou.flip(1).argmax(dim=1))"),),
                "of two alike, the first",
            ),
            Variant(
                "loss.match_anchors",
                "background_iou inclusive",
                (("best_iou < background_iou", "best_iou <= background_iou"),),
                "from it on to the threshold ignored",
            ),
            Variant(
                "loss.match_anchors",
                "nothing is ignored",
                (("if background_iou is not None", "if background_iou is False"),),
                "ignored, -2",
            ),
        ),
        "right": (
            Variant(
                "heads.make_anchors",
                "in numpy",
                """import numpy as np

sides = [(scale * aspect**0.5, scale / aspect**0.5) for scale in scales for aspect in aspects]
levels = []
for L in LEVELS:
    half = (np.array(sides) * anchor_size * 2**L).astype(np.float32) / 2
    y, x = np.mgrid[: size[0] >> L, : size[1] >> L].astype(np.float32) * 2**L + 2 ** (L - 1)
    centre = np.stack((x, y), -1).reshape(-1, 1, 2)
    levels.append(np.concatenate((centre - half, centre + half), -1).reshape(-1, 4))
return torch.from_numpy(np.concatenate(levels)).to(device)""",
            ),
            Variant(
                "heads.make_anchors",
                "coordinate by coordinate, on the device",
                """levels = []
for stride in (8, 16, 32, 64, 128):
    x = torch.arange(stride / 2, size[1], stride, device=device)[None, :, None]
    y = torch.arange(stride / 2, size[0], stride, device=device)[:, None, None]
    base = anchor_size * stride
    w = torch.tensor([base * s * a**0.5 for s in scales for a in aspects], device=device)
    h = torch.tensor([base * s * a**-0.5 for s in scales for a in aspects], device=device)
    corners = torch.broadcast_tensors(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    levels.append(torch.stack(corners, -1).flatten(0, 2))
return torch.cat(levels)""",
            ),
            Variant(
                "heads.encode_boxes",
                "coordinate by coordinate",
                """x1, y1, x2, y2 = boxes.unbind(-1)
ax1, ay1, ax2, ay2 = anchors.unbind(-1)
w, h = ax2 - ax1, ay2 - ay1
dx, dy = ((x1 + x2) - (ax1 + ax2)) / (2 * w), ((y1 + y2) - (ay1 + ay2)) / (2 * h)
dw, dh = torch.log(x2 - x1) - torch.log(w), torch.log(y2 - y1) - torch.log(h)
return torch.stack((weights[0] * dx, weights[0] * dy, weights[1] * dw, weights[1] * dh), -1)""",
            ),
            Variant(
                "heads.decode_boxes",
                "coordinate by coordinate",
                """by = torch.tensor([weights[0], weights[0], weights[1], weights[1]], device=codes.device)
dx, dy, dw, dh = (codes.float() / by).unbind(-1)
ax1, ay1, ax2, ay2 = anchors.unbind(-1)
x, y = ax1 + (0.5 + dx) * (ax2 - ax1), ay1 + (0.5 + dy) * (ay2 - ay1)
w, h = (ax2 - ax1) * dw.exp().clamp(max=1000 / 16), (ay2 - ay1) * dh.exp().clamp(max=1000 / 16)
return torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1)""",
            ),
            Variant(
                "heads.clip_boxes",
                "an image at a time",
                """clipped = []
for image, (height, width) in zip(boxes, sizes.tolist()):
    x, y = image[:, 0::2].clamp(0, width), image[:, 1::2].clamp(0, height)
    clipped.append(torch.stack((x, y), 2).flatten(1))
return torch.stack(clipped)""",
            ),
            Variant(
                "loss.match_anchors",
                "an object at a time, only the real ones",
                """found = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
matched, best = anchors.clone(), torch.zeros(len(anchors), device=anchors.device)
real = [g for g in range(len(boxes)) if labels[g] >= 0]
for g in real:
    iou = box_iou(boxes[g : g + 1], anchors)[0]
    better = iou > best
    best = torch.where(better, iou, best)
    better &= iou >= iou_threshold
    found[better], matched[better] = labels[g], boxes[g]
if background_iou is not None:
    found[(found < 0) & (best >= background_iou)] = IGNORED
for g in reversed(real):
    a = box_iou(boxes[g : g + 1], anchors)[0].argmax()
    found[a], matched[a] = labels[g], boxes[g]
return found, matched""",
            ),
            Variant(
                "loss.match_anchors",
                "anchors first, padding by an IoU of -1",
                """if not len(boxes):
    return torch.full((len(anchors),), BACKGROUND, device=anchors.device), anchors.clone()
iou = box_iou(anchors, boxes).nan_to_num().masked_fill(labels < 0, -1.0)  # (A, G)
best, index = iou.max(1)
positive = best >= iou_threshold
number = torch.arange(len(anchors), device=anchors.device)
for g in range(len(boxes) - 1, -1, -1):
    mine = (number == iou[:, g].argmax()) & (labels[g] >= 0)
    index, positive = torch.where(mine, g, index), positive | mine
low = BACKGROUND if background_iou is None else torch.where(best < background_iou, BACKGROUND, IGNORED)
return torch.where(positive, labels[index], low), torch.where(positive[:, None], boxes[index], anchors)""",
            ),
        ),
    },
    "a4": {
        "wrong": (
            Variant(
                "heads.Tower.forward",
                "one batch norm for all levels",
                (("self.norms[level]", "self.norms[0]"),),
                "its batch norm of level 3",
            ),
            Variant(
                "heads.per_anchor",
                "channels before locations",
                (("x.permute(0, 2, 3, 1)", "x"),),
                "row by row, at each location anchor by anchor",
            ),
            Variant(
                "loss.focal_loss",
                "a sigmoid before the logarithm",
                (("F.softplus(-z)", "-torch.log(torch.sigmoid(z))"),),
                "no logarithm of a sigmoid",
            ),
            Variant(
                "loss.retinanet_loss",
                "dividing by zero positives",
                (("(positives + 1) / ranks", "positives / ranks"),),
                "is never 0",
            ),
            Variant(
                "heads.RetinaNetHead.forward",
                "every level as P3",
                (
                    ("self.class_tower(x, level)", "self.class_tower(x, 0)"),
                    ("self.box_tower(x, level)", "self.box_tower(x, 0)"),
                ),
                "with each level's number",
            ),
            Variant(
                "loss.focal_loss",
                "alpha on the wrong side",
                (("torch.where(present, alpha, 1 - alpha)", "torch.where(present, 1 - alpha, alpha)"),),
                "absent weighs 1 - alpha",
            ),
            Variant(
                "loss.focal_loss",
                "a mean",
                (("F.softplus(-z)).sum()", "F.softplus(-z)).mean()"),),
                "no mean",
            ),
            Variant(
                "loss.focal_loss",
                "gamma of the focal loss paper",
                (("** gamma", "** 2"),),
                "gamma is the exponent",
            ),
            Variant(
                "loss.focal_loss",
                "in half precision",
                (
                    ("torch.where(present, logits.float(), -logits.float())", "torch.where(present, logits, -logits)"),
                    (").sum()", ").float().sum()"),
                ),
                "arithmetic is float32",
            ),
            Variant(
                "loss.focal_loss",
                "everything saved for backward",
                (
                    (
                        "return checkpoint(total, logits, use_reentrant=False, preserve_rng_state=False)",
                        "return total(logits)",
                    ),
                ),
                "copies of the logits",
            ),
            Variant(
                "loss.retinanet_loss",
                "a box loss of background",
                (("torch.where(positive[..., None], box_codes.float(), 0.0)", "box_codes.float()"),),
                "background has no box loss",
            ),
            Variant(
                "loss.retinanet_loss",
                "not divided by 4",
                (("delta=HUBER_DELTA) / 4", "delta=HUBER_DELTA)"),),
                "/ 4 /",
            ),
            Variant(
                "loss.retinanet_loss",
                "delta 1",
                (("delta=HUBER_DELTA", "delta=1.0"),),
                "beyond delta, 0.1",
            ),
            Variant(
                "loss.retinanet_loss",
                "a normalizer for each image",
                (
                    ("over_ranks(positive.sum().float())", "over_ranks(positive.sum(dim=1).float())"),
                    ('reduction="sum", delta=HUBER_DELTA) / 4', 'reduction="none", delta=HUBER_DELTA).sum((1, 2)) / 4'),
                    (
                        "focal_loss(class_logits, labels) / normalizer",
                        "sum(focal_loss(*pair) / n for *pair, n in zip(class_logits, labels, normalizer))",
                    ),
                    ("BOX_WEIGHT * box / normalizer", "(BOX_WEIGHT * box / normalizer).sum()"),
                ),
                "one normalizer for the batch",
            ),
            Variant(
                "loss.retinanet_loss",
                "counted on this rank alone",
                (("over_ranks(positive.sum().float())", "positive.sum().float(), 1"),),
                "over all ranks",
            ),
            Variant(
                "heads.detect",
                "threshold inclusive",
                (("scores > SCORE_THRESHOLD", "scores >= SCORE_THRESHOLD"),),
                "of exactly the threshold",
            ),
            Variant(
                "heads.detect",
                "NMS over all classes",
                (("batched_nms(boxes, scores, labels, NMS_THRESHOLD)", "nms(boxes, scores, NMS_THRESHOLD)"),),
                "suppresses none of another class",
            ),
            Variant(
                "heads.detect",
                "clipped after NMS",
                (
                    (
                        "(boxes,) = clip_boxes(boxes.expand(-1, num_classes, 4)[index, labels][None], size[None])",
                        "boxes = boxes.expand(-1, num_classes, 4)[index, labels]",
                    ),
                    ('{"boxes": boxes[kept]', '{"boxes": clip_boxes(boxes[kept][None], size[None])[0]'),
                ),
                "clipped before NMS",
            ),
            Variant(
                "heads.detect",
                "any number of detections",
                (("[:MAX_DETECTIONS]", ""),),
                "at most 100",
            ),
            Variant(
                "heads.detect",
                "the first 5000 candidates, not the best",
                (
                    (
                        "scores[likely].sort(descending=True, stable=True)",
                        "scores[likely[:MAX_CANDIDATES]].sort(descending=True, stable=True)",
                    ),
                    ("scores[:MAX_CANDIDATES], likely[order[:MAX_CANDIDATES]]", "scores, likely[order]"),
                ),
                "only the 5000 best",
            ),
            Variant(
                "heads.RetinaNetHead.forward",
                "the last layers in half precision in evaluation",
                (
                    (
                        "predict(self.class_predict, self.class_tower(x, level))",
                        "self.class_predict(self.class_tower(x, level))",
                    ),
                ),
                "in evaluation, through `predict`",
            ),
            Variant(
                "loss.focal_loss",
                "made float32 before the checkpoint",
                (("checkpoint(total, logits,", "checkpoint(total, logits.float(),"),),
                "backward holds a float32 copy",
            ),
            Variant(
                "loss.retinanet_loss",
                "background's losses times 0",
                (
                    ("torch.where(positive[..., None], box_codes.float(), 0.0)", "box_codes.float()"),
                    ('reduction="sum", delta=HUBER_DELTA) / 4', 'reduction="none", delta=HUBER_DELTA)'),
                    ("BOX_WEIGHT * box /", "BOX_WEIGHT * (box * positive[..., None]).sum() / 4 /"),
                ),
                "selected away, not multiplied by 0",
            ),
        ),
        "right": (
            Variant(
                "heads.RetinaNetHead.forward",
                "all boxes before all classes",
                """boxes = [self.box_tower(x, n) for n, x in enumerate(features)]
codes = torch.cat([per_anchor(predict(self.box_predict, x), 4) for x in boxes], 1)
classes = [self.class_tower(x, n) for n, x in enumerate(features)]
logits = torch.cat([per_anchor(predict(self.class_predict, x), self.num_classes) for x in classes], 1)
return logits, codes""",
            ),
            Variant(
                "heads.Tower.forward",
                "by numbers",
                """for n, norm in enumerate(self.norms[level]):
    x = self.convs[n](x)
    x = norm(x)
    x = self.activation(x)
return x""",
            ),
            Variant(
                "heads.per_anchor",
                "flattened first",
                """b, c, h, w = x.shape
return x.flatten(2).transpose(1, 2).contiguous().view(b, h * w * (c // values), values)""",
            ),
            Variant(
                "loss.focal_loss",
                "a gradient of its own",
                """class Focal(torch.autograd.Function):
    @staticmethod
    def parts(logits, labels):
        here = F.one_hot(labels + 1, logits.shape[-1] + 1)[..., 1:].bool()
        sign = torch.where(here, 1.0, -1.0)
        return sign, torch.where(here, alpha, 1 - alpha), logits.float() * sign

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        _, weight, z = Focal.parts(logits, labels)
        return -(weight * torch.sigmoid(-z) ** gamma * F.logsigmoid(z)).sum()

    @staticmethod
    def backward(ctx, gradient):
        logits, labels = ctx.saved_tensors
        sign, weight, z = Focal.parts(logits, labels)
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        slope = q**gamma * (gamma * p * F.logsigmoid(z) - q)
        return (gradient * weight * sign * slope).to(logits.dtype), None


return Focal.apply(logits, labels)""",
            ),
            Variant(
                "loss.focal_loss",
                "logits with binary cross-entropy, class by class",
                """def total(logits):
    x = logits.float()
    target = torch.zeros_like(x).scatter_(-1, labels.clamp(min=0)[..., None], (labels >= 0).float()[..., None])
    entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    wrong = torch.sigmoid(x) * (1 - target) + torch.sigmoid(-x) * target
    return torch.sum(entropy * wrong.pow(gamma) * (alpha * target + (1 - alpha) * (1 - target)))


return checkpoint(total, logits, use_reentrant=False)""",
            ),
            Variant(
                "loss.retinanet_loss",
                "an image at a time, only the positive anchors",
                """focal, huber, count = 0.0, 0.0, torch.zeros((), device=anchors.device)
for logits, codes, *target in zip(class_logits, box_codes, targets["boxes"], targets["labels"]):
    labels, boxes = match_anchors(anchors, *target)
    mine = labels >= 0
    count += mine.sum()
    focal = focal + focal_loss(logits, labels)
    miss = (codes[mine].float() - encode_boxes(boxes[mine], anchors[mine])).abs()
    huber = huber + torch.where(miss < HUBER_DELTA, miss**2 / 2, HUBER_DELTA * (miss - HUBER_DELTA / 2)).sum()
count, ranks = over_ranks(count)
return {"class": focal * ranks / (1 + count), "box": BOX_WEIGHT / 4 * huber * ranks / (1 + count)}""",
            ),
            Variant(
                "heads.detect",
                "cut to 5000 before the threshold",
                """best, order = scores.flatten().topk(min(MAX_CANDIDATES, scores.numel()))
best, order = best[best > SCORE_THRESHOLD], order[best > SCORE_THRESHOLD]
index, labels = order.div(scores.shape[1], rounding_mode="floor"), order.remainder(scores.shape[1])
mine = boxes[index, 0] if boxes.shape[1] == 1 else boxes[index, labels]
mine = torch.minimum(mine.clamp(min=0), size.flip(0).repeat(2))
kept = batched_nms(mine, best, labels, NMS_THRESHOLD)[:MAX_DETECTIONS]
return dict(boxes=mine[kept], scores=best[kept], labels=labels[kept])""",
            ),
            Variant(
                "heads.detect",
                "a class at a time",
                """likely = scores[scores > SCORE_THRESHOLD]
least = likely.sort(descending=True).values[:MAX_CANDIDATES][-1] if len(likely) else 1.0
parts = []
for label in range(scores.shape[1]):
    mine = (scores[:, label] > SCORE_THRESHOLD) & (scores[:, label] >= least)
    (own,) = clip_boxes(boxes[mine][:, min(label, boxes.shape[1] - 1)][None], size[None])
    kept = nms(own, scores[mine, label], NMS_THRESHOLD)
    parts.append((own[kept], scores[mine, label][kept], torch.full_like(kept, label)))
own, best, labels = (torch.cat(part) for part in zip(*parts))
order = best.argsort(descending=True)[:MAX_DETECTIONS]
return {"boxes": own[order], "scores": best[order], "labels": labels[order]}""",
            ),
        ),
    },
    "a5": {
        "wrong": (
            Variant(
                "data.View.boxes",
                "a flip that leaves the right edge on the left",
                (("boxes[:, [2, 0]]", "boxes[:, [0, 2]]"),),
                "flip=True.*a box inside the window",
            ),
            Variant(
                "data.Annotations.objects",
                "crowds kept",
                (("rows = self.rows(i)", "rows = np.arange(*self.spans[i])"),),
                "boxes of image 1 are .* which leaves out crowds",
            ),
            Variant(
                "data.View.boxes",
                "boxes clipped before they are shifted",
                (
                    ("boxes - [self.left", "boxes.clip(0, [self.width, self.height] * 2) - [self.left"),
                    (" * scale).clip(0, [self.width, self.height] * 2)", " * scale)"),
                ),
                "a box over its right and lower edge|a box inside the window",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "a generator shared between images",
                (
                    (
                        "rng = np.random.default_rng((self.seed, epoch, i + 1))",
                        'rng = self.__dict__.setdefault("rng", np.random.default_rng(self.seed))',
                    ),
                ),
                "the same pixels for|depends on which samples were asked for before",
            ),
            Variant(
                "data.Annotations.objects",
                "boxes not clipped to the image",
                (("boxes.clip(0, [self.widths[i], self.heights[i]] * 2)", "boxes"),),
                "boxes of image 1",
            ),
            Variant(
                "data.View.boxes",
                "boxes not flipped",
                (("if self.flip:", "if False:"),),
                "flip=True.*a box over its left and upper edge",
            ),
            Variant(
                "data.View.image",
                "black padding",
                (("canvas = PAD.repeat(size, 1).repeat(size, 1, 1)", "canvas = torch.zeros(size, size, 3).byte()"),),
                r"around the region are \[\[0, 0, 0\]\], wanted \[124, 116, 104\]",
            ),
            Variant(
                "data.View.image",
                "not antialiased",
                ((", antialias=True", ""),),
                "from the antialiased bilinear resize",
            ),
            Variant(
                "data.View.image",
                "flipped with its padding",
                (
                    ("pixels.flip(1) if self.flip else pixels", "pixels"),
                    (
                        "return canvas.permute(2, 0, 1)",
                        "return (canvas.flip(1) if self.flip else canvas).permute(2, 0, 1)",
                    ),
                ),
                "around the region are|from the antialiased bilinear resize",
            ),
            Variant(
                "data.full_view",
                "the short side scaled to the size",
                (("max(height, width)", "min(height, width)"),),
                r"480 x 640 at 1.0 \* 640",
            ),
            Variant(
                "data.full_view",
                "sides cut off, not rounded",
                (("round(width * ratio)", "int(width * ratio)"), ("round(height * ratio)", "int(height * ratio)")),
                "wanted View",
            ),
            Variant(
                "data.draw_view",
                "the window always in the middle",
                (("rng.integers(0, max(scaled - size, 0), endpoint=True)", "max(scaled - size, 0) // 2"),),
                "windows by left",
            ),
            Variant(
                "data.draw_view",
                "flipped though flip is off",
                (("flip and rng.random()", "rng.random()"),),
                "100 views are flipped, though flip=False",
            ),
            Variant(
                "data.TrainSet.image_of",
                "the same order in every epoch",
                (("permutation(self.seed, epoch,", "permutation(self.seed, 0,"),),
                "different orders of 3 epochs for 2 seeds",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "the same draws for every image of an epoch",
                (("default_rng((self.seed, epoch, i + 1))", "default_rng((self.seed, epoch))"),),
                r"the same pixels for \(seed, n\)",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "the seed ignored",
                (("default_rng((self.seed, epoch, i + 1))", "default_rng((0, epoch, i + 1))"),),
                r"the same pixels for \(seed, n\)",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "constant noise",
                (("int(np.random.SeedSequence((self.seed, n)).generate_state(1)[0])", "7"),),
                "the same noise for",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "region as (width, height)",
                (("view.region()", "view.region().flip(0)"),),
                r"region .* wanted \(height, width\)",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "no masks",
                (("if a.codes is not None:", "if False:"),),
                "with masks, a sample has",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "masks not flipped",
                (("mask.flip(1) if view.flip else mask", "mask"),),
                "flip True: .* of mask 0",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "masks of the first objects, whichever are kept",
                (("a.rows(i)[kept]", "a.rows(i)"),),
                "of mask 1 is not what the window shows of object 3",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "masks of whole boxes",
                ((".clip([view.left, view.top] * 2, [view.right, view.bottom] * 2)", ""),),
                "of mask . is not what the window shows",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "100 drawn before the window is looked at",
                (
                    (
                        "kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1))\n"
                        "if len(kept) > MAX_OBJECTS:\n"
                        "    kept = np.sort(rng.choice(kept, MAX_OBJECTS, replace=False))",
                        "kept = np.sort(rng.permutation(len(boxes))[:MAX_OBJECTS])\n"
                        "kept = kept[(boxes[kept, 2:] - boxes[kept, :2] >= MIN_SIDE).all(axis=1)]",
                    ),
                ),
                "the window shows 70 of 130 objects",
            ),
            Variant(
                "data.draw_view",
                "the window's length is rounded, and added to the rounded start",
                (
                    (
                        "round((offset + min(scaled, size)) * source / scaled)",
                        "start + round(min(scaled, size) * source / scaled)",
                    ),
                ),
                "each edge rounded: found, not wanted",
            ),
        ),
        "right": (
            Variant(
                "data.View.image",
                "resized by PIL",
                """
                part = image.crop((self.left, self.top, self.right, self.bottom))
                part = part.resize((self.width, self.height), Image.Resampling.BILINEAR)
                if self.flip:
                    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                square = Image.new("RGB", (size, size), tuple(PAD.tolist()))
                square.paste(part, (0, 0))
                return torch.from_numpy(np.array(square)).permute(2, 0, 1)
                """,
            ),
            Variant(
                "data.draw_view",
                "another order of draws, the flip by >= 0.5",
                """
                mirrored = flip and rng.random() >= 0.5
                axes = {}
                ratio = rng.uniform(*jitter) * size
                ratio = round(ratio) / max(height, width)
                for axis, source in (("y", height), ("x", width)):
                    scaled = max(round(source * ratio), 1)
                    seen = min(scaled, size)
                    first = int(rng.integers(scaled - seen + 1))
                    begin = min(int(np.rint(first / scaled * source)), source - 1)
                    axes[axis] = begin, max(int(np.rint((first + seen) / scaled * source)), begin + 1), seen
                (x1, x2, w), (y1, y2, h) = axes["x"], axes["y"]
                return View(x1, y1, x2, y2, w, h, mirrored)
                """,
            ),
            Variant(
                "data.View.boxes",
                "another arithmetic, by columns",
                """
                x = (boxes[:, 0::2] - self.left) * self.width / (self.right - self.left)
                y = (boxes[:, 1::2] - self.top) * self.height / (self.bottom - self.top)
                x, y = np.clip(x, 0, self.width), np.clip(y, 0, self.height)
                if self.flip:
                    x = self.width - x[:, ::-1]
                return np.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), axis=1)
                """,
            ),
            Variant(
                "data.Annotations.objects",
                "a loop over the rows",
                """
                boxes, labels = [], []
                for m in range(*self.spans[i]):
                    if not self.crowd[m]:
                        x, y, w, h = self.boxes[m].tolist()
                        right, bottom = min(x + w, self.widths[i]), min(y + h, self.heights[i])
                        boxes.append([max(x, 0), max(y, 0), right, bottom])
                        labels.append(int(self.labels[m]))
                return np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(labels, dtype=np.int64)
                """,
            ),
            Variant(
                "data.TrainSet.image_of",
                "another shuffle",
                """
                count = len(self.annotations.ids)
                order = np.arange(count)
                np.random.default_rng([9, self.seed, n // count]).shuffle(order)
                return n // count, order[n % count]
                """,
            ),
            Variant(
                "data.full_view",
                "another arithmetic",
                """
                longest = round(scale * size)
                if height > width:
                    return View(0, 0, width, height, max(1, round(longest * width / height)), longest)
                return View(0, 0, width, height, longest, max(1, round(longest * height / width)))
                """,
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "other seeds, noise from the same generator, 100 in any order, a loop over the objects",
                """
                a = self.annotations
                epoch, i = self.image_of(n)
                rng = np.random.default_rng((1, self.seed, n))
                noise = int(rng.integers(0, 2**32))
                image = read_checked(a, i)
                view = draw_view(rng, int(a.heights[i]), int(a.widths[i]), self.size, self.jitter, flip=self.flip)
                source, labels = a.objects(i)
                seen = view.boxes(source)
                kept = [k for k in range(len(seen)) if min(seen[k, 2:] - seen[k, :2]) >= MIN_SIDE]
                if len(kept) > 100:
                    kept = rng.permutation(kept)[:100].tolist()
                boxes, classes = np.zeros((100, 4), np.float32), np.full(100, -1)
                masks = np.zeros((100, MASK_SIDE, MASK_SIDE), np.uint8)
                rows = a.rows(i)
                for place, k in enumerate(kept):
                    boxes[place], classes[place] = seen[k], labels[k]
                    if a.codes is not None:
                        low = np.maximum(source[k, :2], [view.left, view.top])
                        high = np.minimum(source[k, 2:], [view.right, view.bottom])
                        found = crop_mask(a.mask(i, rows[k]), np.concatenate((low, high)))
                        masks[place] = found[:, ::-1] if view.flip else found
                sample = {"image": view.image(image, self.size), "boxes": torch.from_numpy(boxes)}
                sample |= {"labels": torch.from_numpy(classes), "noise": noise, "region": view.region()}
                return sample | ({"masks": torch.from_numpy(masks)} if a.codes is not None else {})
                """,
            ),
        ),
    },
    "a6": {
        "wrong": (
            Variant(
                "train.schedule",
                "a peak that is the same at any batch",
                (("peak = lr * scale", "peak = lr"),),
                "a batch of 64.*wanted 0.0358375",
            ),
            Variant(
                "train.lr_at",
                "off-by-one at the drops",
                (("if step >= drop", "if step > drop"),),
                "rate 0.28 at step .*, wanted 0.028",
            ),
            Variant(
                "train.train_step",
                "waiting for the device",
                (
                    (
                        "means[name] = means.get(name, 0) + value.detach() / len(batches)",
                        "means[name] = torch.tensor(means.get(name, 0) + value.item() / len(batches))",
                    ),
                ),
                "waits for the device",
            ),
            Variant(
                "train.make_optimizer",
                "decay on batch norm",
                (("p.ndim > 1", "p.ndim > 0"), ("p.ndim <= 1", "p.ndim <= 0")),
                r"weight decay of .*, wanted \[0\]",
            ),
            Variant(
                "train.schedule",
                "a warm-up from 0",
                (("(0, WARMUP_LR * scale)", "(0, 0.0)"),),
                "rate 0 at step 0, wanted 0.0067",
            ),
            Variant(
                "train.schedule",
                "drops counted in epochs",
                (("(epochs - before) * steps_per_epoch", "epochs - before"),),
                "at step 500, wanted|at step 1000, wanted|at step 2000, wanted",
            ),
            Variant(
                "train.schedule",
                "short drops rounded down",
                (("math.ceil(total * share)", "int(total * share)"),),
                "59 epochs.* at step 378, wanted 0.28",
            ),
            Variant(
                "train.make_optimizer",
                "Nesterov's momentum",
                (("momentum=MOMENTUM", "momentum=MOMENTUM, nesterov=True"),),
                "after step 1 0.weight is .* from SGD",
            ),
            Variant(
                "train.train_step",
                "gradients summed over micro-batches",
                (("sum(losses.values()) / len(batches)", "sum(losses.values())"),),
                "three|3 micro-batches.*norm",
            ),
            Variant(
                "train.train_step",
                "gradients of the step before kept",
                (("optimizer.zero_grad(set_to_none=True)\n", ""),),
                "1 micro-batches.*norm",
            ),
            Variant(
                "train.train_step",
                "clipped before it is unscaled",
                (
                    ("scaler.unscale_(optimizer)\n", ""),
                    ("scaler.step(optimizer)", "scaler.unscale_(optimizer)\nscaler.step(optimizer)"),
                ),
                "scaled: norm",
            ),
            Variant(
                "train.train_step",
                "not clipped",
                (
                    (
                        'clip_grad_norm_(model.parameters(), recipe["clip"])',
                        "clip_grad_norm_(model.parameters(), math.inf)",
                    ),
                ),
                "clip 2.0, float32: weight moves by",
            ),
            Variant(
                "train.train_step",
                "a step of the optimizer in every micro-step",
                (
                    (
                        "    for name, value in losses.items():",
                        "    scaler.step(optimizer)\n    for name, value in losses.items():",
                    ),
                    ("scaler.unscale_(optimizer)\n", ""),
                ),
                "1 micro-batches.*moves by|3 micro-batches.*moves by",
            ),
            Variant(
                "train.train_step",
                "a seed without the step",
                (('(recipe["seed"], step, t, place.rank)', '(recipe["seed"], t, place.rank)'),),
                "draws the same as",
            ),
            Variant(
                "train.train_step",
                "a seed without the rank",
                (('(recipe["seed"], step, t, place.rank)', '(recipe["seed"], step, t)'),),
                "draws the same as",
            ),
            Variant(
                "train.train_step",
                "gradients averaged over ranks in every micro-step",
                (("if last or place.world == 1 else model.no_sync()", ""),),
                "3 micro-steps: forward inside no_sync",
            ),
            Variant(
                "train.read_step",
                "losses not averaged over the ranks",
                (("values / place.world", "values"),),
                "wanted the ranks' means",
            ),
            Variant(
                "train.read_step",
                "a wish to stop that no other rank sees",
                (
                    ("return dict(zip(means, losses)), norm, stop > 0", "return dict(zip(means, losses)), norm, asked"),
                    ("values = torch.stack", "asked = stop\nvalues = torch.stack"),
                ),
                "though rank . asks for it",
            ),
            Variant(
                "train.read_step",
                "the norm divided by the ranks",
                (
                    (
                        "torch.cat((values / place.world, norm[None]))",
                        "(torch.cat((values, norm[None])) / place.world)",
                    ),
                ),
                "norm 0.75, wanted 1.5",
            ),
            Variant(
                "data.micro_batches",
                "samples that are a stride apart",
                """
                for start in range(first * batch, last * batch, world * micro):
                    yield list(range(start + rank, start + world * micro, world))
                """,
                "rank by rank the samples are",
            ),
            Variant(
                "data.micro_batches",
                "one step too many",
                (("range(first, last)", "range(first, last + 1)"),),
                "micro-batches, wanted",
            ),
            Variant(
                "train.train_step",
                "targets without noise",
                (('if k != "image"}', 'if k not in ("image", "noise")}'),),
                "targets are all of a batch but the image; they lack",
            ),
        ),
        "right": (
            Variant(
                "train.train_step",
                "means in lists, clipping written out, other seeds",
                """
                for p in model.parameters():
                    p.grad = None
                optimizer.param_groups[0]["lr"] = lr
                for group in optimizer.param_groups[1:]:
                    group.update(lr=lr)
                found, count = [], len(batches)
                for k in range(count):
                    words = [recipe["seed"], place.rank, step, k]
                    torch.manual_seed(int.from_bytes(np.random.default_rng(words).bytes(6), "little"))
                    inputs = {name: value.to(place.device) for name, value in batches[k].items()}
                    images = place.move(inputs.pop("image"))
                    with contextlib.ExitStack() as stack:
                        if place.world > 1 and k < count - 1:
                            stack.enter_context(model.no_sync())
                        with place.autocast():
                            losses = model(images, inputs, inputs["region"])
                            total = torch.stack(list(losses.values())).sum()
                        scaler.scale(total).backward()
                    found.append({name: value.detach() for name, value in losses.items()})
                scaler.unscale_(optimizer)
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                for g in gradients:
                    g /= count
                norm = torch.stack([g.norm() for g in gradients]).norm()
                factor = (recipe["clip"] / (norm + 1e-6)).clamp(max=1.0)
                for g in gradients:
                    g *= factor
                scaler.step(optimizer)
                scaler.update()
                return {name: torch.stack([row[name] for row in found]).mean() for name in found[0]}, norm
                """,
            ),
            Variant(
                "train.lr_at",
                "by cases",
                """
                (_, low), (end, peak), (first, _), (second, _) = schedule(epochs, steps_per_epoch, batch_size, lr)
                if step >= second:
                    return peak / 100
                if step >= first:
                    return peak * 0.1
                share = min(step / end, 1)
                return (1 - share) * low + share * peak
                """,
            ),
            Variant(
                "train.schedule",
                "in another arithmetic",
                """
                steps = epochs * steps_per_epoch
                top = lr / LR_BATCH * batch_size
                end = min(WARMUP_STEPS * LR_BATCH / batch_size, steps / 10)
                if epochs >= SHORT_RUN:
                    first, second = steps - 30 * steps_per_epoch, steps - 10 * steps_per_epoch
                else:
                    first, second = -(-steps * 11 // 12), -(-steps * 35 // 36)
                return [(0, WARMUP_LR / LR_BATCH * batch_size), (end, top), (first, top * 0.1), (second, top * 0.01)]
                """,
            ),
            Variant(
                "train.make_optimizer",
                "by the kind of layer, batch norm first",
                """
                kinds = nn.Conv2d, nn.ConvTranspose2d, nn.Linear
                weights = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
                groups = {False: [], True: []}
                for p in model.parameters():
                    groups[id(p) in weights].append(p)
                rows = [{"params": groups[False]}, {"params": groups[True], "weight_decay": WEIGHT_DECAY}]
                return torch.optim.SGD(rows, lr=1.0, momentum=MOMENTUM)
                """,
            ),
            Variant(
                "train.read_step",
                "two collectives",
                """
                names = list(means)
                values, asked = torch.stack([means[name] for name in names]), torch.tensor(float(stop))
                if place.world > 1:
                    dist.all_reduce(values)
                    values = values / place.world
                    dist.all_reduce(asked, dist.ReduceOp.MAX)
                *values, asked, norm = torch.cat((values, asked[None], norm[None])).tolist()
                return {name: value for name, value in zip(names, values)}, norm, bool(asked)
                """,
            ),
            Variant(
                "data.micro_batches",
                "a list of all, by micro-steps",
                """
                found = []
                for micro_step in range(first * batch // (world * micro), last * batch // (world * micro)):
                    start = (micro_step * world + rank) * micro
                    found.append([start + k for k in range(micro)])
                return found
                """,
            ),
        ),
    },
    "a7": {
        "wrong": (
            Variant(
                "heads.RPNHead.forward",
                "predicted from the features, not the tower's output",
                (("x = self.tower(x, level)", "_ = self.tower(x, level)"),),
                "from the tower's output",
            ),
            Variant(
                "heads.propose",
                "the first candidates, not the best",
                (
                    (
                        "level_logits.float().topk(min(candidates, len(level_anchors)), dim=1)",
                        "level_logits.float()[:, :candidates].sort(dim=1, descending=True)",
                    ),
                ),
                "of each level, the best",
            ),
            Variant(
                "loss.sample_rois",
                "padded to the batch's most proposals, so that the sample depends on the batch",
                (
                    (
                        "torch.arange(MAX_PROPOSALS, device=device) <",
                        "torch.arange(max(map(len, proposals)), device=device) <",
                    ),
                    ("MAX_PROPOSALS - len(p)", "max(map(len, proposals)) - len(p)"),
                ),
                "not from the batch",
            ),
            Variant(
                "loss.rpn_loss",
                "anchors between the thresholds as background",
                (("labels == BACKGROUND", "labels < 0"),),
                "are ignored, not background",
            ),
            Variant(
                "heads.RPNHead.forward",
                "levels joined",
                (("return logits, codes", "return torch.cat(logits, 1), torch.cat(codes, 1)"),),
                "lists by level",
            ),
            Variant(
                "heads.propose",
                "NMS over all levels",
                (
                    (
                        "kept = [nms(b[image], s[image], PROPOSAL_NMS_THRESHOLD)[:MAX_PROPOSALS] for b, s in levels]",
                        "joined = [torch.cat([level[k][image] for level in levels]) for k in (0, 1)]\n"
                        "    kept = nms(*joined, PROPOSAL_NMS_THRESHOLD)",
                    ),
                    ("torch.cat([s[image, index] for (_, s), index in zip(levels, kept)])", "joined[1][kept]"),
                    ("torch.cat([b[image, index] for (b, _), index in zip(levels, kept)])", "joined[0][kept]"),
                ),
                "of two levels they don't",
            ),
            Variant(
                "heads.propose",
                "not clipped",
                (("clip_boxes(boxes, sizes)", "boxes"),),
                "clipped to their image",
            ),
            Variant(
                "heads.propose",
                "clipped after NMS",
                (
                    ("clip_boxes(boxes, sizes)", "boxes"),
                    (
                        "proposals.append(boxes[scores.topk(min(MAX_PROPOSALS, len(scores))).indices])",
                        "best = scores.topk(min(MAX_PROPOSALS, len(scores))).indices\n"
                        "    proposals.append(clip_boxes(boxes[best][None], sizes[image : image + 1])[0])",
                    ),
                ),
                "clipped before NMS",
            ),
            Variant(
                "heads.propose",
                "clipped to (width, height)",
                (("clip_boxes(boxes, sizes)", "clip_boxes(boxes, sizes.flip(1))"),),
                r"own \(height, width\)",
            ),
            Variant(
                "loss.pick",
                "by number and not by key",
                (
                    (
                        "torch.where(candidates, keys, -1).topk",
                        "torch.where(candidates, 2**40 - torch.arange(keys.shape[1]), -1).topk",
                    ),
                ),
                "of the highest keys",
            ),
            Variant(
                "loss.pick",
                "all counted as real",
                (("best >= 0", "best >= -1"),),
                "is not real",
            ),
            Variant(
                "loss.rpn_loss",
                "divided by what was sampled",
                (
                    (
                        "class_loss / (RPN_SAMPLES * len(logits))",
                        "class_loss / (((labels >= 0) | (labels == -1)).sum(1).clamp(max=RPN_SAMPLES)).sum()",
                    ),
                ),
                "divided by 256",
            ),
            Variant(
                "loss.rpn_loss",
                "one number of noise for the batch",
                (
                    (
                        'random_keys(targets["noise"], 0, len(anchors))',
                        'random_keys(targets["noise"][:1].expand(len(logits)), 0, len(anchors))',
                    ),
                ),
                "not from the batch",
            ),
            Variant(
                "loss.rpn_loss",
                "a box loss of sampled anchors alone",
                (
                    (
                        "index, chosen = pick(positive, keys, RPN_POSITIVES)",
                        "index, chosen = pick(positive, keys, RPN_POSITIVES)\n"
                        "positive = torch.zeros_like(positive).scatter(1, index, chosen)",
                    ),
                ),
                "also those not sampled",
            ),
            Variant(
                "loss.rpn_loss",
                "a mean over all levels together",
                (
                    (
                        "mean_over_ranks(by_level, 4 * positives).sum()",
                        "mean_over_ranks(by_level.sum(), 4 * positives.sum())",
                    ),
                ),
                "summed over the levels",
            ),
            Variant(
                "loss.rpn_loss",
                "RetinaNet's delta",
                (("delta=RPN_HUBER_DELTA", "delta=HUBER_DELTA"),),
                "delta 1/9",
            ),
            Variant(
                "loss.sample_rois",
                "objects not among the candidates",
                (("real = torch.cat((real, objects), dim=1)", "real = F.pad(real, (0, objects.shape[1]))"),),
                "objects themselves",
            ),
            Variant(
                "loss.sample_rois",
                "0.5 exactly is foreground",
                (
                    ("real & (iou > ROI_IOU)", "real & (iou >= ROI_IOU)"),
                    ("iou.gather(1, index) > ROI_IOU", "iou.gather(1, index) >= ROI_IOU"),
                ),
                "exactly 0.5",
            ),
            Variant(
                "loss.sample_rois",
                "background first",
                (
                    (
                        "torch.cat((is_foreground, is_background), 1).int()",
                        "torch.cat((is_background, is_foreground), 1).int()",
                    ),
                    ("torch.cat((foreground, background), 1)", "torch.cat((background, foreground), 1)"),
                ),
                "comes first",
            ),
            Variant(
                "loss.sample_rois",
                "the object of a RoI's place, not of its index",
                (("matched = matched.gather(1, index)", "matched = matched[:, :count]"),),
                "object is the one that it overlaps most|label of foreground is",
            ),
            Variant(
                "loss.sample_rois",
                "padding with background's label",
                (("torch.where(chosen, labels, IGNORED)", "torch.where(chosen, labels, BACKGROUND)"),),
                "padding, -2",
            ),
            Variant(
                "heads.RPNHead.forward",
                "a last layer in half precision in evaluation",
                (("predict(self.box_predict, x)", "self.box_predict(x)"),),
                "in evaluation, through `predict`",
            ),
            Variant(
                "loss.sample_rois",
                "the IoU with padding kept: 0 / 0 for a proposal without area",
                (("torch.where(objects[:, None], iou, 0.0).max", "iou.max"),),
                "a proposal without area is background",
            ),
            Variant(
                "heads.propose",
                "ranked by the sigmoid, which saturates",
                (("level_logits.float().topk", "level_logits.float().sigmoid().topk"),),
                "by logit: all their sigmoids are 1",
            ),
        ),
        "right": (
            Variant(
                "loss.rpn_loss",
                "an image at a time",
                """every = torch.cat(anchors)
level = torch.cat([torch.full((len(a),), n) for n, a in enumerate(anchors)]).to(every.device)
entropy, huber = 0.0, torch.zeros(len(anchors), device=every.device)
count = torch.zeros(len(anchors), device=every.device)
for b, target in enumerate(zip(targets["boxes"], targets["labels"])):
    logits, codes = (torch.cat([part[b] for part in parts]).float() for parts in (objectness, box_codes))
    labels, boxes = match_anchors(every, *target, RPN_MATCH_IOU, RPN_BACKGROUND_IOU)
    by_key = random_keys(targets["noise"][b : b + 1], 0, len(every))[0].argsort(descending=True)
    ones = by_key[labels[by_key] >= 0][:RPN_POSITIVES]
    zeros = by_key[labels[by_key] == BACKGROUND][: RPN_SAMPLES - len(ones)]
    chosen, wanted = logits[torch.cat((ones, zeros))], torch.cat((torch.ones(len(ones)), torch.zeros(len(zeros))))
    entropy += F.binary_cross_entropy_with_logits(chosen, wanted.to(chosen.device), reduction="sum")
    mine = labels >= 0
    wanted = encode_boxes(boxes[mine], every[mine])
    miss = F.huber_loss(codes[mine], wanted, reduction="none", delta=RPN_HUBER_DELTA).mean(1)
    huber = huber.index_add(0, level[mine], miss)
    count = count.index_add(0, level[mine], torch.ones_like(miss))
return {"rpn_class": entropy / RPN_SAMPLES / len(targets["boxes"]), "rpn_box": mean_over_ranks(huber, count).sum()}""",
            ),
            Variant(
                "heads.RPNHead.forward",
                "all towers first, boxes before objectness",
                """towers = [self.tower(x, n) for n, x in enumerate(features)]
codes = [predict(self.box_predict, x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in towers]
return [predict(self.class_predict, x).permute(0, 2, 3, 1).flatten(1) for x in towers], codes""",
            ),
            Variant(
                "heads.propose",
                "an image and a level at a time, decoded before the best are taken",
                """found = []
for image, size in enumerate(sizes):
    boxes, scores = [], []
    for level, base in enumerate(anchors):
        every = clip_boxes(decode_boxes(codes[level][image], base)[None], size[None])[0]
        order = objectness[level][image].float().argsort(descending=True)[:candidates]
        order = order[nms(every[order], objectness[level][image, order].float(), PROPOSAL_NMS_THRESHOLD)]
        boxes.append(every[order])
        scores.append(objectness[level][image, order].float())
    best = torch.cat(scores).sort(descending=True).indices[:MAX_PROPOSALS]
    found.append(torch.cat(boxes)[best])
return found""",
            ),
            Variant(
                "heads.propose",
                "one NMS that tells levels apart",
                """parts = []
for level, (logits, code, base) in enumerate(zip(objectness, codes, anchors)):
    best, index = logits.float().sort(dim=1, descending=True)
    best, index = best[:, :candidates], index[:, :candidates]
    boxes = clip_boxes(decode_boxes(torch.gather(code, 1, index[..., None].expand(-1, -1, 4)), base[index]), sizes)
    parts.append((boxes, best, torch.full_like(index, level)))
every = [torch.cat(part, 1) for part in zip(*parts)]
found = []
for boxes, best, level in zip(*every):
    found.append(boxes[batched_nms(boxes, best, level, PROPOSAL_NMS_THRESHOLD)[:MAX_PROPOSALS]])
return found""",
            ),
            Variant(
                "loss.pick",
                "sorted, in two steps",
                """order = keys.argsort(dim=1, descending=True)
real = candidates.gather(1, order)
front = (~real).int().argsort(dim=1, stable=True)[:, :limit]
return order.gather(1, front), real.gather(1, front)""",
            ),
            Variant(
                "loss.sample_rois",
                "an image at a time",
                """rows = []
keys = random_keys(targets["noise"], 1, MAX_PROPOSALS + targets["boxes"].shape[1])
for drawn, objects, labels, key in zip(proposals, targets["boxes"], targets["labels"], keys):
    number = torch.arange(len(objects), device=objects.device)[labels >= 0]
    boxes = torch.cat((drawn, objects[number]))
    key = torch.cat((key[: len(drawn)], key[MAX_PROPOSALS + number]))
    boxes = boxes[key.argsort(descending=True)]
    best, index = torch.zeros(len(boxes)).to(boxes), torch.zeros(len(boxes)).to(labels)
    if len(number) and len(boxes):
        best, index = box_iou(boxes, objects[number]).max(1)
        index = number[index]
    front = (best > ROI_IOU).nonzero().flatten()[:foreground_count]
    back = (best < ROI_IOU).nonzero().flatten()[: count - len(front)]
    taken, more = torch.cat((front, back)), count - len(front) - len(back)
    of = torch.cat((labels[index[front]], torch.full_like(back, BACKGROUND)))
    of, index = F.pad(of, (0, more), value=IGNORED), F.pad(index[taken], (0, more))
    rows.append((F.pad(boxes[taken], (0, 0, 0, more)), of, index))
return RoIs(*(torch.stack(part) for part in zip(*rows)))""",
            ),
            Variant(
                "loss.sample_rois",
                "ranked by one number: kind, then key",
                """real = [F.pad(torch.ones(len(p), dtype=torch.bool), (0, MAX_PROPOSALS - len(p))) for p in proposals]
real = torch.cat((torch.stack(real).to(targets["labels"].device), targets["labels"] >= 0), 1)
boxes = torch.stack([F.pad(p, (0, 0, 0, MAX_PROPOSALS - len(p))) for p in proposals])
boxes = torch.cat((boxes, targets["boxes"]), 1)
iou = torch.stack([box_iou(a, b) for a, b in zip(boxes, targets["boxes"])])
best, matched = iou.nan_to_num().masked_fill((targets["labels"] < 0)[:, None], 0.0).max(2)
key = random_keys(targets["noise"], 1, boxes.shape[1])
mine = torch.where(real & (best > ROI_IOU), key, -1)
least = mine.topk(foreground_count).values[:, -1:]
mine = (mine >= least) & (mine >= 0)
rank = torch.where(real & (best < ROI_IOU), key, -1) + torch.where(mine, key + 2**33, 0)
rank, index = rank.topk(count)
labels = torch.where(mine.gather(1, index), targets["labels"].gather(1, matched.gather(1, index)), BACKGROUND)
boxes = torch.where(rank[..., None] >= 0, boxes[torch.arange(len(boxes))[:, None], index], 0.0)
return RoIs(boxes, torch.where(rank >= 0, labels, IGNORED), matched.gather(1, index))""",
            ),
        ),
    },
    "a8": {
        "wrong": (
            Variant(
                "heads.roi_features",
                "half a pixel to the upper left",
                (("[:, None] + 0.5", "[:, None]"),),
                "without half a pixel",
            ),
            Variant(
                "heads.roi_levels",
                "rounded to the nearest",
                ((".floor()", ".round()"),),
                "rounded down",
            ),
            Variant(
                "loss.mask_targets",
                "the mask in the frame of the image",
                (
                    (
                        "places = (places - boxes[..., None, :2]) / (boxes[..., None, 2:] - boxes[..., None, :2])",
                        "places = places / masks.shape[-1]",
                    ),
                ),
                "the mask, bilinearly|frame is its object's box",
            ),
            Variant(
                "heads.roi_levels",
                "no lowest and highest level",
                (("level.clamp(LEVELS[0], LEVELS[-1])", "level.clamp(-9, 99)"),),
                "no lower than P3, no higher than P7",
            ),
            Variant(
                "heads.roi_levels",
                "the area without its root",
                ((".sqrt()", ""),),
                "one level up per doubling",
            ),
            Variant(
                "heads.roi_features",
                "several samples of a cell",
                (("sampling_ratio=1", "sampling_ratio=2"),),
                "of each cell alone",
            ),
            Variant(
                "heads.roi_features",
                "the level of the batch's largest RoI for all",
                (
                    (
                        "level = roi_levels(image_boxes)",
                        "level = roi_levels(image_boxes).max().expand(len(image_boxes))",
                    ),
                ),
                "from its own level",
            ),
            Variant(
                "heads.BoxHead.forward",
                "no batch norm",
                (("self.activation(self.bn(x))", "self.activation(x)"),),
                "its batch norm, act",
            ),
            Variant(
                "heads.MaskHead.forward",
                "probabilities",
                (
                    (
                        "predict(self.mask_predict, self.up(self.convs(x)))",
                        "predict(self.mask_predict, self.up(self.convs(x))).sigmoid()",
                    ),
                ),
                "mask logits",
            ),
            Variant(
                "heads.MaskHead.forward",
                "enlarged by interpolation",
                (("self.up(self.convs(x))", 'F.interpolate(self.convs(x), scale_factor=2.0, mode="bilinear")'),),
                "mask logits: convolutions, up",
            ),
            Variant(
                "loss.box_head_loss",
                "the background's codes for all",
                (("box_codes.take_along_dim(classes[:, None, None], dim=1).squeeze(1)", "box_codes[:, 0]"),),
                "own class, k \\+ 1",
            ),
            Variant(
                "loss.box_head_loss",
                "a mean over all RoIs, padding among them",
                (("real.sum())", "torch.ones_like(real).sum())"),),
                "not padding",
            ),
            Variant(
                "loss.box_head_loss",
                "the weights left out",
                (("encode_boxes(boxes, roi_boxes, BOX_CODE_WEIGHTS)", "encode_boxes(boxes, roi_boxes)"),),
                "in BOX_CODE_WEIGHTS",
            ),
            Variant(
                "loss.box_head_loss",
                "a mean over all RoIs' coordinates",
                (("4 * foreground.sum()", "4 * real.sum()"),),
                "coordinates of the foreground",
            ),
            Variant(
                "loss.mask_targets",
                "rounded",
                (("values[:, 0], 0.0)", "values[:, 0].round(), 0.0)"),),
                "bilinearly",
            ),
            Variant(
                "loss.mask_targets",
                "corners aligned",
                (("align_corners=False", "align_corners=True"),),
                "at each cell's centre",
            ),
            Variant(
                "loss.mask_targets",
                "the mask's edge beyond the object's box",
                (
                    (
                        "((grid >= 0) & (grid <= 1)).all(dim=-1) & foreground",
                        "torch.ones_like(grid[..., 0], dtype=torch.bool) & foreground",
                    ),
                ),
                "outside of the object's box the target is 0",
            ),
            Variant(
                "loss.mask_loss",
                "all classes",
                (
                    (
                        "mask_logits.take_along_dim(classes[:, None, None, None], dim=1).squeeze(1).float()",
                        "mask_logits.mean(1).float()",
                    ),
                ),
                "own class",
            ),
            Variant(
                "loss.mask_loss",
                "a class off by one",
                (("rois.labels + 1", "rois.labels"),),
                "own class, k \\+ 1",
            ),
            Variant(
                "loss.mask_loss",
                "a mean over background and padding, too",
                (("foreground.sum())", "torch.ones_like(foreground).sum())"),),
                "mean over the foreground's",
            ),
            Variant(
                "heads.MaskHead.forward",
                "the last layer in half precision in evaluation",
                (("predict(self.mask_predict, self.up(self.convs(x)))", "self.mask_predict(self.up(self.convs(x)))"),),
                "in evaluation, through `predict`",
            ),
            Variant(
                "heads.roi_features",
                "images without boxes not counted",
                (("for image_boxes in boxes:", "for image_boxes in (b for b in boxes if len(b)):"),),
                "its own image, also where",
            ),
            Variant(
                "heads.roi_features",
                "the caller's boxes are scaled in place",
                (
                    ("image_boxes.nan_to_num()", "image_boxes.nan_to_num_()"),
                    (
                        "corners = image_boxes / (2.0**level)[:, None] + 0.5",
                        "corners = image_boxes.div_((2.0**level)[:, None]) + 0.5",
                    ),
                ),
                "the boxes that were given are changed",
            ),
            Variant(
                "loss.mask_loss",
                "times 0 where there is no foreground",
                (("torch.where(foreground, entropy, 0.0).sum()", "(entropy * foreground).sum()"),),
                "selected away, not multiplied by 0",
            ),
        ),
        "right": (
            Variant(
                "heads.BoxHead.forward",
                "batch norm by hand of a vector",
                """x = torch.flatten(self.convs(x), 1)
x = self.bn(self.fc(x).unsqueeze(-1).unsqueeze(-1))
x = self.activation(x).squeeze(-1).squeeze(-1)
codes = predict(self.box_predict, x)
return predict(self.class_predict, x), codes.reshape(len(x), codes.shape[1] // 4, 4)""",
            ),
            Variant(
                "heads.roi_levels",
                "by the area's thresholds",
                """area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
return 3 + sum((area >= side**2).long() for side in (224, 448, 896, 1792))""",
            ),
            Variant(
                "heads.roi_features",
                "bilinear samples of the packed map, a level at a time",
                """packed, tops = pyramid
found = []
for image, own in enumerate(boxes):
    own = own.nan_to_num()
    level = roi_levels(own)
    top = torch.tensor(tops, device=own.device)[level - 3]
    steps = (torch.arange(side, device=own.device) + 0.5) / side
    stride = (2.0**level)[:, None]
    x = (own[:, :1] + steps * (own[:, 2:3] - own[:, :1])) / stride
    y = (own[:, 1:2] + steps * (own[:, 3:] - own[:, 1:2])) / stride + top[:, None]
    height, width = packed.shape[2:]
    x, y = 2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1).reshape(1, -1, side, 2)
    values = F.grid_sample(packed[image : image + 1], grid, mode="bilinear", align_corners=True)[0]
    found.append(values.unflatten(1, (-1, side)).transpose(0, 1))
return torch.cat(found)""",
            ),
            Variant(
                "heads.roi_features",
                "boxes with their image's number",
                """packed, tops = pyramid
number = torch.cat([torch.full((len(b), 1), n, device=b.device) for n, b in enumerate(boxes)])
every = torch.cat(list(boxes)).nan_to_num()
level = roi_levels(every)
shift = torch.tensor([[0.0, top, 0.0, top] for top in tops], device=every.device)[level - LEVELS[0]]
rois = torch.cat((number, every * 0.5 ** level[:, None] + shift + 0.5), 1)
return roi_align(packed, rois, (side, side), 1.0, 1, True)""",
            ),
            Variant(
                "heads.MaskHead.forward",
                "layer by layer",
                """for conv in self.convs:
    x = conv(x)
x = self.up(x)
return predict(self.mask_predict, x)""",
            ),
            Variant(
                "loss.box_head_loss",
                "only the RoIs that count",
                """labels = rois.labels.flatten()
real, mine = labels != IGNORED, labels >= 0
entropy = F.cross_entropy(class_logits[real].float(), labels[real] + 1, reduction="sum")
boxes = rois.of_objects(targets["boxes"]).reshape(-1, 4)[mine]
wanted = encode_boxes(boxes, rois.boxes.reshape(-1, 4)[mine], BOX_CODE_WEIGHTS)
found = box_codes[mine, labels[mine] + 1].float()
box = F.smooth_l1_loss(found, wanted, reduction="sum", beta=1.0) / 4
return {"class": mean_over_ranks(entropy, real.sum()), "box": mean_over_ranks(box, mine.sum())}""",
            ),
            Variant(
                "loss.mask_targets",
                "by torchvision's roi_align in the mask's pixels",
                """from torchvision.ops import roi_align

mine, boxes, objects = (part.flatten(0, 1) for part in rois.with_objects(targets))
masks = rois.of_objects(targets["masks"]).flatten(0, 1)[:, None].float()
low, scale = objects[:, :2].repeat(1, 2), masks.shape[-1] / (objects[:, 2:] - objects[:, :2]).repeat(1, 2)
inner = (boxes - low) * scale
numbered = torch.cat((torch.arange(len(masks), device=boxes.device)[:, None], inner), 1)
side = MASK_TARGET_SIDE
values = roi_align(masks, numbered, side, sampling_ratio=1, aligned=True)[:, 0]
steps = (torch.arange(side, device=boxes.device) + 0.5) / side
x = boxes[:, :1] + steps * (boxes[:, 2:3] - boxes[:, :1])
y = boxes[:, 1:2] + steps * (boxes[:, 3:] - boxes[:, 1:2])
x = (x >= objects[:, :1]) & (x <= objects[:, 2:3]) & mine[:, None]
y = (y >= objects[:, 1:2]) & (y <= objects[:, 3:])
return (values * x[:, None, :] * y[:, :, None]).unflatten(0, rois.labels.shape)""",
            ),
            Variant(
                "loss.mask_loss",
                "only the foreground",
                """labels = rois.labels.reshape(-1)
mine = labels >= 0
logits, wanted = mask_logits[mine, labels[mine] + 1].float(), mask_targets(rois, targets).flatten(0, 1)[mine]
entropy = F.softplus(logits) - wanted * logits
return {"mask": mean_over_ranks(entropy.sum() / MASK_TARGET_SIDE**2, mine.sum())}""",
            ),
        ),
    },
}
