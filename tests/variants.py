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
                "stochastic depth per channel",
                (
                    ('stochastic_depth(self.branch(x), self.drop_path, "row", self.training)', "self.branch(x)"),
                    ("return", "branch = F.dropout2d(branch, self.drop_path, self.training)\nreturn"),
                ),
                "all of an image's branch, or none",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "the rate taken for that of survival",
                (("self.drop_path,", "1 - self.drop_path if self.drop_path else 0.0,"),),
                "share of dropped branches: 0.25, not 0.7",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "stochastic depth in evaluation, too",
                (('"row", self.training', '"row", True'),),
                "nothing is random in evaluation",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "scaling by the survival rate in evaluation instead of training",
                """
                shortcut = x if self.project is None else self.project(x)
                shortcut = drop_block(shortcut, self.drop_rate, self.training)
                survives = torch.rand(len(x), 1, 1, 1) >= self.drop_path if self.training else 1 - self.drop_path
                return ACTIVATIONS[self.activation](shortcut + self.branch(x) * survives)
                """,
                "nothing is random in evaluation",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "stochastic depth of the sum",
                (
                    ('stochastic_depth(self.branch(x), self.drop_path, "row", self.training)', "self.branch(x)"),
                    (
                        "(shortcut + branch)",
                        '(stochastic_depth(shortcut + branch, self.drop_path, "row", self.training))',
                    ),
                ),
                "never the shortcut",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "DropBlock in evaluation, too",
                (("self.drop_rate, self.training)", "self.drop_rate, True)"),),
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
                "blocks.ResidualBase.forward",
                "DropBlock on the identity, but not on a projection",
                (("shortcut = drop_block(", "shortcut = shortcut if self.project is not None else drop_block("),),
                "DropBlock is applied to the shortcut, which is a projection",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "DropBlock on the sum",
                (
                    ("shortcut = drop_block(shortcut, self.drop_rate, self.training)", "pass"),
                    ("(shortcut + branch)", "(drop_block(shortcut + branch, self.drop_rate, self.training))"),
                ),
                "applied to the shortcut, not to the branch or the sum",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "dropout on the shortcut",
                (("drop_block(shortcut,", "F.dropout(shortcut,"),),
                "of the shortcut squares vanish",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "no activation of the sum",
                (("ACTIVATIONS[self.activation](shortcut + branch)", "shortcut + branch"),),
                "the sum is not activated",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "always a relu",
                (("ACTIVATIONS[self.activation]", "F.relu"),),
                "a block is act",
            ),
            Variant(
                "blocks.ResidualBase.forward",
                "no shortcut",
                (("shortcut + branch", "branch"),),
                "the shortcut is not in the sum",
            ),
            Variant(
                "blocks.drop_block",
                "isolated pixels, that is dropout",
                "return F.dropout(x, rate, training) if training and rate else x",
                "whole 7 x 7 squares vanish",
            ),
            Variant(
                "blocks.drop_block",
                "isolated pixels at the rate at which squares would begin",
                (("side - (side + 1) % 2)", "1)"),),
                "whole 7 x 7 squares vanish",
            ),
            Variant(
                "blocks.drop_block",
                "the same squares in every channel",
                (("torch.ones_like(x,", "torch.ones_like(x[:, :1],"),),
                "each channel has its own squares",
            ),
            Variant(
                "blocks.drop_block",
                "the same squares in every image",
                (("torch.ones_like(x,", "torch.ones_like(x[:1],"),),
                "each image has its own squares",
            ),
            Variant(
                "blocks.drop_block",
                "smaller squares",
                (("min(DROP_BLOCK_SIZE,", "min(DROP_BLOCK_SIZE - 2,"),),
                "whole 7 x 7 squares vanish",
            ),
            Variant(
                "blocks.drop_block",
                "larger squares",
                (("min(DROP_BLOCK_SIZE,", "min(DROP_BLOCK_SIZE + 2,"),),
                "whole 7 x 7 squares vanish",
            ),
            Variant(
                "blocks.drop_block",
                "squares that don't shrink with the map",
                (("min(DROP_BLOCK_SIZE, *x.shape[-2:])", "DROP_BLOCK_SIZE"),),
                "block size should be odd|Kernel size can't be greater|whole 5 x 5 squares vanish",
            ),
            Variant(
                "blocks.drop_block",
                "off where a square doesn't fit",
                (("if not training or rate == 0.0:", "if not training or rate == 0 or min(x.shape[-2:]) < 7:"),),
                "in training something vanishes",
            ),
            Variant(
                "blocks.drop_block",
                "squares cut off by the edge",
                """
                if not training or rate == 0.0:
                    return x
                side = min(DROP_BLOCK_SIZE, *x.shape[-2:])
                side -= (side + 1) % 2
                centres = (torch.rand(x.shape, device=x.device) < rate / side**2).float()
                mask = 1 - F.max_pool2d(centres, side, 1, side // 2)
                return x * (mask * mask.numel() / mask.sum()).to(x.dtype)
                """,
                "whole 7 x 7 squares vanish",
            ),
            Variant(
                "blocks.drop_block",
                "squares begin with probability rate / side^2",
                """
                if not training or rate == 0.0:
                    return x
                side = min(DROP_BLOCK_SIZE, *x.shape[-2:])
                side -= (side + 1) % 2
                places = [*x.shape[:2], x.shape[2] - side + 1, x.shape[3] - side + 1]
                begins = (torch.rand(places, device=x.device) < rate / side**2).float()
                mask = 1 - F.max_pool2d(F.pad(begins, [side - 1] * 4), side, 1)
                return x * (mask * mask.numel() / mask.sum()).to(x.dtype)
                """,
                "at rate 0.1 0.0.. of it vanishes",
            ),
            Variant(
                "blocks.drop_block",
                "the rate taken for that of what is kept",
                (("dtype=torch.float32), rate,", "dtype=torch.float32), 1 - rate,"),),
                "whole 7 x 7 squares vanish|of it vanishes",
            ),
            Variant(
                "blocks.drop_block",
                "no rescaling",
                (("x * mask.to(x.dtype)", "x * (mask > 0).to(x.dtype)"),),
                "what is left is scaled by elements / elements left",
            ),
            Variant(
                "blocks.drop_block",
                "rescaling by 1 / (1 - rate)",
                (("x * mask.to(x.dtype)", "x * (mask > 0).to(x.dtype) / (1 - rate)"),),
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
                "a copy where it is off",
                (("return x\n", "return x.clone()\n"),),
                "in evaluation DropBlock gives x itself",
            ),
            Variant(
                "blocks.drop_block",
                "the mask counted in the dtype of x",
                (("x, dtype=torch.float32", "x"),),
                "in half precision the scale is to be counted in float32",
            ),
            Variant(
                "blocks.drop_block",
                "float32 out of half precision",
                (("mask.to(x.dtype)", "mask"),),
                "the result has the dtype of x",
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
                "blocks.ConvBN.forward",
                "DropBlock before batch norm",
                (
                    (
                        "drop_block(self.bn(self.conv(x)), self.drop_rate, self.training)",
                        "self.bn(drop_block(self.conv(x), self.drop_rate, self.training))",
                    ),
                ),
                "squares vanish after the batch norm",
            ),
            Variant(
                "blocks.ConvBN.forward",
                "no DropBlock",
                (("drop_block(self.bn(self.conv(x)), self.drop_rate, self.training)", "self.bn(self.conv(x))"),),
                "squares vanish after the batch norm",
            ),
            Variant(
                "blocks.ConvBN.forward",
                "DropBlock in evaluation, too",
                (("self.drop_rate, self.training", "self.drop_rate, True"),),
                "DropBlock is off in evaluation",
            ),
            Variant(
                "blocks.ConvBN.forward",
                "a relu where `activation` is None",
                (
                    (
                        "x if self.activation is None else ACTIVATIONS[self.activation](x)",
                        "ACTIVATIONS[self.activation or 'relu'](x)",
                    ),
                ),
                "activation None",
            ),
            Variant(
                "blocks.ConvBN.forward",
                "always a relu",
                (("ACTIVATIONS[self.activation]", "F.relu"),),
                "activation swish",
            ),
            Variant(
                "blocks.ConvBN.forward",
                "no batch norm",
                (("self.bn(self.conv(x))", "self.conv(x)"),),
                "one after the other: convolution, batch norm",
            ),
            Variant(
                "blocks.Resample.forward",
                "pooling instead of the strided convolution",
                (("x = self.down(x)", "x = F.max_pool2d(x, 2)"),),
                "squeeze, a convolution of stride 2",
            ),
            Variant(
                "blocks.Resample.forward",
                "the strided convolution again and again instead of pooling",
                """
                x, factor = self.squeeze(x), self.factor
                while factor > 1:
                    x, factor = self.down(x), factor / 2
                if factor < 1:
                    x = F.interpolate(x, scale_factor=1 / factor, mode="nearest")
                return self.expand(x)
                """,
                "a max-pool of kernel 3 and stride 2",
            ),
            Variant(
                "blocks.Resample.forward",
                "average pooling",
                (("max_pool_same(x, stride + 1, stride)", "F.avg_pool2d(x, stride, stride)"),),
                "a max-pool of kernel 3 and stride 2",
            ),
            Variant(
                "blocks.Resample.forward",
                "a pool of kernel = stride",
                (("max_pool_same(x, stride + 1, stride)", "max_pool_same(x, stride, stride)"),),
                "a max-pool of kernel 3 and stride 2",
            ),
            Variant(
                "blocks.Resample.forward",
                "a pool of kernel 3 at every stride",
                (("max_pool_same(x, stride + 1, stride)", "max_pool_same(x, 3, stride)"),),
                "a max-pool of kernel 5 and stride 4",
            ),
            Variant(
                "blocks.Resample.forward",
                "the pool before the strided convolution",
                """
                x = self.squeeze(x)
                if self.factor > 1:
                    if self.factor > 2:
                        stride = int(self.factor) // 2
                        x = max_pool_same(x, stride + 1, stride)
                    x = self.down(x)
                elif self.factor < 1:
                    x = F.interpolate(x, scale_factor=1 / self.factor, mode="nearest")
                return self.expand(x)
                """,
                "in this order: squeeze, a convolution of stride 2, a max-pool",
            ),
            Variant(
                "blocks.Resample.forward",
                "bilinear instead of nearest",
                (('mode="nearest"', 'mode="bilinear"'),),
                "each pixel 2 x 2 times",
            ),
            Variant(
                "blocks.Resample.forward",
                "upwards by 2 whatever the levels",
                (("scale_factor=1 / self.factor", "scale_factor=2.0"),),
                "each pixel 8 x 8 times",
            ),
            Variant(
                "blocks.Resample.forward",
                "an activation after expand",
                (("return self.expand(x)", "return F.relu(self.expand(x))"),),
                "with no activation after it",
            ),
            Variant(
                "blocks.max_pool_same",
                "padding on both sides",
                "return F.max_pool2d(x, kernel, stride, padding=kernel // 2)",
                "padded right and bottom",
            ),
            Variant(
                "blocks.max_pool_same",
                "padding at the left and the top",
                "return F.max_pool2d(F.pad(x, (1, 0, 1, 0), value=-math.inf), kernel, stride)",
                "padded right and bottom",
            ),
            Variant(
                "blocks.max_pool_same",
                "padding with zeros",
                "return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), kernel, stride)",
                "the padding is never the maximum",
            ),
            Variant(
                "blocks.max_pool_same",
                "a kernel of the stride",
                "return F.max_pool2d(x, stride, stride)",
                "has 3 rows and columns",
            ),
            Variant(
                "blocks.max_pool_same",
                "no padding",
                "return F.max_pool2d(x, kernel, stride)",
                "a pooled side is side / 2",
            ),
            Variant(
                "blocks.max_pool_same",
                "the mean",
                "return F.avg_pool2d(x, kernel, stride, ceil_mode=True)",
                "have another maximum",
            ),
            Variant(
                "blocks.init_conv_",
                "a standard deviation not corrected for the truncation",
                ((" / 0.87962566", ""),),
                "the standard deviation is 0.8[78]",
            ),
            Variant(
                "blocks.init_conv_",
                "the correction the wrong way",
                ((" / 0.87962566", " * 0.87962566"),),
                "the standard deviation is 0.77",
            ),
            Variant(
                "blocks.init_conv_",
                "fan_out",
                (("conv.weight[0].numel()", "conv.weight[:, 0].numel()"),),
                "the standard deviation is (0.499|0.50)",
            ),
            Variant(
                "blocks.init_conv_",
                "fan_in without the kernel's area",
                (("conv.weight[0].numel()", "conv.in_channels"),),
                "the standard deviation is (2.99|3.00)",
            ),
            Variant(
                "blocks.init_conv_",
                "the gain of a relu, sqrt 2",
                (("1 / fan_in", "2 / fan_in"),),
                "the standard deviation is 1.41",
            ),
            Variant(
                "blocks.init_conv_",
                "a variance of 1 / fan_in squared",
                (("math.sqrt(1 / fan_in)", "1 / fan_in"),),
                "the standard deviation is 0.04",
            ),
            Variant(
                "blocks.init_conv_",
                "no truncation",
                "nn.init.normal_(conv.weight, std=math.sqrt(1 / conv.weight[0].numel()))",
                "cut at 2 sigma",
            ),
            Variant(
                "blocks.init_conv_",
                "truncated at 2, not at 2 sigma",
                ((", a=-2 * sigma, b=2 * sigma", ""),),
                "the standard deviation is 1.1[34]",
            ),
            Variant(
                "blocks.init_conv_",
                "clipped at 2 sigma, not drawn anew",
                "std = math.sqrt(1 / conv.weight[0].numel())\n"
                "sigma = std / 0.87962566\n"
                "nn.init.normal_(conv.weight, std=std * 1.0243)\n"
                "conv.weight.data.clamp_(-2 * sigma, 2 * sigma)",
                "not a normal distribution, cut",
            ),
            Variant(
                "blocks.init_conv_",
                "a uniform distribution",
                "bound = math.sqrt(3 / conv.weight[0].numel())\nnn.init.uniform_(conv.weight, -bound, bound)",
                "cut at 2 sigma",
            ),
        ),
        "right": (
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
                "blocks.max_pool_same",
                "the maximum of unfolded windows",
                """
                x = F.pad(x, (0, kernel - stride, 0, kernel - stride), value=-math.inf)
                return x.unfold(2, kernel, stride).unfold(3, kernel, stride).amax((-1, -2))
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
                "model.check_size",
                "0 is a multiple of 128",
                ((" or not height or not width", ""),),
                "check_size takes 0x128",
            ),
            Variant(
                "model.check_size",
                "only the width is checked",
                (
                    (
                        "height % MULTIPLE or width % MULTIPLE or not height or not width",
                        "width % MULTIPLE or not width",
                    ),
                ),
                "check_size takes 600x640",
            ),
            Variant(
                "model.check_size",
                "only the height is checked",
                (
                    (
                        "height % MULTIPLE or width % MULTIPLE or not height or not width",
                        "height % MULTIPLE or not height",
                    ),
                ),
                "check_size takes 640x600",
            ),
            Variant(
                "model.check_size",
                "multiples of 64",
                (("height % MULTIPLE or width % MULTIPLE or", "height % 64 or width % 64 or"),),
                "check_size takes 192x128",
            ),
            Variant(
                "model.check_size",
                "multiples of 256",
                (("height % MULTIPLE or width % MULTIPLE or", "height % 256 or width % 256 or"),),
                "multiples of 128, and taken",
            ),
            Variant(
                "model.check_size",
                "at least 128, but no multiple",
                "if min(height, width) < MULTIPLE:\n    raise ValueError(f'{height}x{width} is not a multiple of 128')",
                "check_size takes 640x600",
            ),
            Variant(
                "model.check_size",
                "both sides must be wrong",
                "if height % 128 and width % 128 or not height or not width:\n"
                "    raise ValueError(f'{height}x{width} is not a multiple of 128')",
                "check_size takes 640x600",
            ),
            Variant(
                "model.check_size",
                "only squares",
                "if height % 128 or not height or height != width:\n"
                "    raise ValueError(f'{height}x{width} is not a multiple of 128')",
                "640x896 are multiples of 128, and taken",
            ),
            Variant(
                "model.check_size",
                "an assertion",
                "assert height and width and not height % 128 and not width % 128, f'{height}x{width}, not of 128'",
                "with a ValueError, not with AssertionError",
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
                "model.check_size",
                "width before height in the message",
                (("{height}x{width}", "{width}x{height}"),),
                "check_size says 640x600 and 128, not",
            ),
            Variant(
                "model.check_size",
                "printed, not raised",
                "if height % 128 or width % 128 or not height or not width:\n    print(f'not {height}x{width}')",
                "check_size takes 640x600",
            ),
            Variant(
                "model.Arch.width",
                "rounded to the nearest",
                (("int(", "round("),),
                "is 41, not 42",
            ),
            Variant(
                "model.Arch.width",
                "a float",
                "return BASE_WIDTH[level] * self.filter_scale",
                "a width is an integer",
            ),
            Variant(
                "model.Arch.width",
                "a multiple of 8",
                "return int(BASE_WIDTH[level] * self.filter_scale / 8) * 8",
                "is 41, not 40",
            ),
            Variant(
                "model.Arch.width",
                "the width of the level below",
                (("BASE_WIDTH[level]", "BASE_WIDTH[max(level - 1, 2)]"),),
                "at level 3 is 83, not 41",
            ),
            Variant(
                "model.Arch.width",
                "the width of the level above",
                (("BASE_WIDTH[level]", "BASE_WIDTH[min(level + 1, 7)]"),),
                "at level 2 is 41, not 83",
            ),
            Variant(
                "model.Arch.width",
                "doubled at every level",
                (("BASE_WIDTH[level]", "(64 << (level - 2))"),),
                "at level 5 is 166, not 332",
            ),
            Variant(
                "model.Arch.width",
                "the same whatever the filter scale",
                (("BASE_WIDTH[level] * self.filter_scale", "BASE_WIDTH[level]"),),
                "is 41, not 64",
            ),
            Variant(
                "model.Arch.width",
                "a bottleneck's output",
                (("self.filter_scale", "self.filter_scale * 4"),),
                "is 41, not 166",
            ),
            Variant(
                "model.SpineNet.forward",
                "the unresampled parent left out of the sum",
                (("parts += [features[p] for p in block.as_is]", "pass"),),
                "the blocks in its `as_is` are not in the sum",
            ),
            Variant(
                "model.SpineNet.forward",
                "one unresampled parent at most",
                (("for p in block.as_is]", "for p in block.as_is[:1]]"),),
                "only the first in its `as_is` is in the sum",
            ),
            Variant(
                "model.SpineNet.forward",
                "the unresampled parent written into the loop",
                (("for p in block.as_is]", "for p in ((11,) if block.number == 14 else ())]"),),
                "the blocks in its `as_is` are not in the sum|this is another value",
            ),
            Variant(
                "model.SpineNet.forward",
                "the unresampled parents added after the activation",
                (
                    ("parts += [features[p] for p in block.as_is]", "extra = sum(features[p] for p in block.as_is)"),
                    ("start=parts[0]))", "start=parts[0])) + extra"),
                ),
                "are added after the activation",
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
                "activating parents and sum",
                (("parts = [resample(features[p])", "parts = [self.activation(resample(features[p]))"),),
                "this is another value",
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
                "always a relu",
                (("self.activation(sum(parts[1:], start=parts[0]))", "sum(parts).relu()"),),
                "this is another value",
            ),
            Variant(
                "model.SpineNet.forward",
                "always a swish",
                (("self.activation(sum(parts[1:], start=parts[0]))", "torch.nn.functional.silu(sum(parts))"),),
                "away from the authors' code",
            ),
            Variant(
                "model.SpineNet.forward",
                "the mean of the parents",
                (("sum(parts[1:], start=parts[0])", "sum(parts) / len(parts)"),),
                "this is another value",
            ),
            Variant(
                "model.SpineNet.forward",
                "the last parent only",
                (("sum(parts[1:], start=parts[0])", "parts[len(block.parents) - 1]"),),
                "this is another value",
            ),
            Variant(
                "model.SpineNet.forward",
                "outputs in the order of block numbers",
                (("for L in LEVELS]", "for L in self.outputs]"),),
                "in the order of the levels",
            ),
            Variant(
                "model.SpineNet.forward",
                "outputs from P7 to P3",
                (("for L in LEVELS]", "for L in LEVELS[::-1]]"),),
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
                "block 0 as block 1, too",
                (("for block in self.spine:", "features[1] = features[0]\nfor block in self.spine:"),),
                "is given what block 1 gave",
            ),
            Variant(
                "model.SpineNet.forward",
                "the parents the other way round",
                (("zip(block.parents,", "zip(block.parents[::-1],"),),
                "is given what block|The size of tensor a",
            ),
            Variant(
                "model.SpineNet.forward",
                "no endpoints",
                (("self.endpoints[str(L)](features[self.outputs[L]])", "features[self.outputs[L]]"),),
                "every part of the network runs once",
            ),
            Variant(
                "model.SpineNet.forward",
                "an endpoint of what goes into the block",
                (
                    ("fused = self", "fused = before[block.number] = self"),
                    ("features = {}", "features, before = {}, {}"),
                    ("(features[self.outputs[L]])", "(before[self.outputs[L]])"),
                ),
                "endpoint 3 is given block 13",
            ),
            Variant(
                "model.SpineNet.forward",
                "no check of the size",
                (("check_size(*x.shape[-2:])", "pass"),),
                "the network refuses 640x600 with a ValueError, not with RuntimeError",
            ),
            Variant(
                "model.SpineNet.forward",
                "the size checked as width, height",
                (("check_size(*x.shape[-2:])", "check_size(*x.shape[:-3:-1])"),),
                "the network says 640x600 and 128",
            ),
            Variant(
                "model.Normalize.forward",
                "dividing first",
                (("(images - self.mean) / self.std", "images / self.std - self.mean"),),
                "it divides before it subtracts",
            ),
            Variant(
                "model.Normalize.forward",
                "BGR",
                (("(images - self.mean) / self.std", "(images - self.mean.flip(0)) / self.std.flip(0)"),),
                "the channels are taken as BGR",
            ),
            Variant(
                "model.Normalize.forward",
                "channels turned round",
                (("(images - self.mean)", "(images.flip(1) - self.mean)"),),
                "the channels are turned round",
            ),
            Variant(
                "model.Normalize.forward",
                "pixels in 0..1",
                (("(images - self.mean)", "(images / 255 - self.mean)"),),
                "pixels are in 0..255",
            ),
            Variant(
                "model.Normalize.forward",
                "pixels in -1..1",
                "return images / 127.5 - 1",
                "PIXEL_MEAN is to be 0: another value",
            ),
            Variant(
                "model.Normalize.forward",
                "each image by its own mean and deviation",
                "x = images.float()\nreturn (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)",
                "PIXEL_MEAN is to be 0: another value",
            ),
            Variant(
                "model.Normalize.forward",
                "arithmetic in uint8",
                (("images - self.mean)", "images - self.mean.to(torch.uint8))"),),
                "one of uint8, which has no negative numbers",
            ),
            Variant(
                "model.Normalize.forward",
                "no division",
                ((" / self.std", ""),),
                "it does not divide by PIXEL_STD",
            ),
            Variant(
                "model.Normalize.forward",
                "divided by the variance",
                (("/ self.std", "/ self.std**2"),),
                "PIXEL_MEAN is to be 0: another value",
            ),
            Variant(
                "model.Normalize.forward",
                "float64",
                (("(images -", "(images.double() -"),),
                "float32 of the same shape",
            ),
            Variant(
                "model.Normalize.forward",
                "clamped at 0",
                (("(images - self.mean)", "(images - self.mean).clamp(min=0)"),),
                "PIXEL_MEAN is to be 0: another value",
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
                "model.count",
                "parameters as tensors",
                (("p.numel() for p", "1 for p"),),
                "is not the number of trainable parameters",
            ),
            Variant(
                "model.count",
                "counted at 640 whatever the size",
                (("(1, 3, size, size)", "(1, 3, 640, 640)"),),
                "one image of size 256 is asked for",
            ),
            Variant(
                "model.count",
                "counted at half of the size",
                (("(1, 3, size, size)", "(1, 3, size // 2, size // 2)"),),
                "one image of size 256 is asked for",
            ),
            Variant(
                "model.count",
                "a batch of two",
                (("(1, 3, size, size)", "(2, 3, size, size)"),),
                "one image of size 256 is asked for",
            ),
            Variant(
                "model.count",
                "in training mode",
                ((".eval()", ""),),
                "counted in evaluation mode",
            ),
            Variant(
                "model.count",
                "with 80 classes",
                ((", PUBLISHED_CLASSES[head])", ")"),),
                "of a model of PUBLISHED_CLASSES",
            ),
            Variant(
                "model.count",
                "on the CPU",
                (('torch.device("meta")', 'torch.device("cpu")'),),
                "on the meta device",
            ),
            Variant(
                "model.count",
                "only convolutions",
                (
                    (
                        "counter.get_total_flops()",
                        'sum(n for f, n in counter.get_flop_counts()["Global"].items() if "conv" in str(f))',
                    ),
                ),
                "transposed ones and the fully connected layer",
            ),
            Variant(
                "model.count",
                "each weight used once",
                (("counter.get_total_flops() // 2", "parameters"),),
                "is not the number of multiply-adds",
            ),
            Variant(
                "model.count",
                "multiply-adds before parameters",
                (
                    (
                        "return parameters, counter.get_total_flops() // 2",
                        "return counter.get_total_flops() // 2, parameters",
                    ),
                ),
                "is not the number of trainable parameters",
            ),
            Variant(
                "model.count",
                "the other head's detector",
                (("build_model(arch, head,", 'build_model(arch, "retinanet",'),),
                "the detector of `head` is built",
            ),
        ),
        "right": (
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
                "in 0..1, with the constants in 0..1",
                "return images.float().div(255).sub(self.mean / 255).div(self.std / 255)",
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
        "wrong": (),
        "right": (),
    },
    "a4": {
        "wrong": (),
        "right": (),
    },
    "a5": {
        "wrong": (),
        "right": (),
    },
    "a6": {
        "wrong": (),
        "right": (),
    },
    "a7": {
        "wrong": (),
        "right": (),
    },
    "a8": {
        "wrong": (),
        "right": (),
    },
}
