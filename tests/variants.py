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
                "block",
            ),
        ),
        "right": (
            Variant(
                "blocks.ResidualBase.forward",
                "adds the other way round",
                (("shortcut + branch", "branch + shortcut"),),
            ),
        ),
    },
    "a2": {
        "wrong": (),
        "right": (),
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
        "wrong": (
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
                "crowds kept",
                (("rows = self.rows(i)", "rows = np.arange(*self.spans[i])"),),
                "boxes of image 1 are .* which leaves out crowds",
            ),
            Variant(
                "data.Annotations.objects",
                "boxes not clipped to the image",
                (("boxes.clip(0, [self.widths[i], self.heights[i]] * 2)", "boxes"),),
                "boxes of image 1",
            ),
            Variant(
                "data.Annotations.objects",
                "height and width exchanged",
                (("[self.widths[i], self.heights[i]]", "[self.heights[i], self.widths[i]]"),),
                "boxes of image 1, 64 x 48",
            ),
            Variant(
                "data.View.boxes",
                "boxes not flipped",
                (("if self.flip:", "if False:"),),
                "flip=True.*a box over its left and upper edge",
            ),
            Variant(
                "data.View.boxes",
                "a flip that leaves the right edge on the left",
                (("boxes[:, [2, 0]]", "boxes[:, [0, 2]]"),),
                "flip=True.*a box inside the window",
            ),
            Variant(
                "data.View.boxes",
                "clipped to a square",
                (
                    (
                        "* scale).clip(0, [self.width, self.height] * 2)",
                        "* scale).clip(0, max(self.width, self.height))",
                    ),
                ),
                "a box over its right and lower edge",
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
                "data.View.image",
                "channels first in memory",
                (("return canvas.permute(2, 0, 1)", "return canvas.permute(2, 0, 1).contiguous()"),),
                "not channels last in memory",
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
                "the last offset is never drawn",
                (("max(scaled - size, 0), endpoint=True)", "max(scaled - size, 1))"),),
                "windows by left",
            ),
            Variant(
                "data.draw_view",
                "no scale jitter",
                (("rng.uniform(*jitter)", "sum(jitter) / 2"),),
                "scales from U",
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
                "data.TrainSet.image_of",
                "drawn with replacement",
                """
                count = len(self.annotations.ids)
                return n // count, int(np.random.default_rng((self.seed, n)).integers(count))
                """,
                "wanted each once",
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
                "masks counted with the crowds",
                (("enumerate(zip(a.rows(i)[kept], visible))", "enumerate(zip(a.spans[i, 0] + kept, visible))"),),
                "of mask 0 is not what the window shows of object 1",
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
                "data.TrainSet.__getitem__",
                "always the first 100",
                (("np.sort(rng.choice(kept, MAX_OBJECTS, replace=False))", "kept[:MAX_OBJECTS]"),),
                "the same 100 of 130 objects",
            ),
            Variant(
                "data.TrainSet.__getitem__",
                "slivers kept",
                ((">= MIN_SIDE", "> 0"),),
                "which objects are left out",
            ),
        ),
        "right": (
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
                "a warm-up that starts as high at any batch",
                (("(0, WARMUP_LR * scale)", "(0, WARMUP_LR)"),),
                "rate 0.0067 at step 0, wanted 0.001675",
            ),
            Variant(
                "train.schedule",
                "a peak that is the same at any batch",
                (("peak = lr * scale", "peak = lr"),),
                "a batch of 64.*wanted 0.0358375",
            ),
            Variant(
                "train.schedule",
                "a warm-up as long at any batch",
                (("WARMUP_STEPS / scale", "WARMUP_STEPS"),),
                "a batch of 64.*wanted 0.0358375",
            ),
            Variant(
                "train.schedule",
                "a warm-up longer than the run",
                (("min(WARMUP_STEPS / scale, total * LONGEST_WARMUP)", "WARMUP_STEPS / scale"),),
                "36 epochs.*at step 18, wanted 0.40335",
            ),
            Variant(
                "train.schedule",
                "drops counted in epochs",
                (("(epochs - before) * steps_per_epoch", "epochs - before"),),
                "at step 500, wanted|at step 1000, wanted|at step 2000, wanted",
            ),
            Variant(
                "train.schedule",
                "no drops of its own for a short run",
                (("if epochs < SHORT_RUN:", "if False:"),),
                "36 epochs.*wanted 0.8",
            ),
            Variant(
                "train.schedule",
                "short drops rounded down",
                (("math.ceil(total * share)", "int(total * share)"),),
                "59 epochs.* at step 378, wanted 0.28",
            ),
            Variant(
                "train.schedule",
                "lr ignored",
                (("peak = lr * scale", 'peak = SHARED["lr"] * scale'),),
                "an lr of 0.8.*wanted 0.40335",
            ),
            Variant(
                "train.lr_at",
                "a warm-up straight from 0",
                (("lowest + (step / warmup) * (peak - lowest)", "(step / warmup) * peak"),),
                "rate 0 at step 0, wanted 0.0067",
            ),
            Variant(
                "train.make_optimizer",
                "Nesterov's momentum",
                (("momentum=MOMENTUM", "momentum=MOMENTUM, nesterov=True"),),
                "after step 1 0.weight is .* from SGD",
            ),
            Variant(
                "train.make_optimizer",
                "momentum with dampening",
                (("momentum=MOMENTUM", "momentum=MOMENTUM, dampening=MOMENTUM"),),
                "after step 2 0.weight is .* from SGD",
            ),
            Variant(
                "train.make_optimizer",
                "no momentum",
                ((", momentum=MOMENTUM", ""),),
                "after step 2 0.weight is .* from SGD",
            ),
            Variant(
                "train.train_step",
                "the learning rate of the first group alone",
                (("for group in optimizer.param_groups:", "for group in optimizer.param_groups[:1]:"),),
                r"learning rates of the groups \[0.5, 77.0\]",
            ),
            Variant(
                "train.train_step",
                "gradients summed over micro-batches",
                (("sum(losses.values()) / len(batches)", "sum(losses.values())"),),
                "three|3 micro-batches.*norm",
            ),
            Variant(
                "train.train_step",
                "losses summed over micro-batches",
                (("value.detach() / len(batches)", "value.detach()"),),
                "3 micro-batches.* loss 39.0, wanted 13.0|3 micro-batches.* loss",
            ),
            Variant(
                "train.train_step",
                "gradients of the step before kept",
                (("optimizer.zero_grad(set_to_none=True)\n", ""),),
                "1 micro-batches.*norm",
            ),
            Variant(
                "train.train_step",
                "gradients emptied in every micro-step",
                (
                    ("optimizer.zero_grad(set_to_none=True)\n", ""),
                    ("    torch.manual_seed(", "    optimizer.zero_grad()\n    torch.manual_seed("),
                ),
                "3 micro-batches.*norm",
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
                "the norm after clipping",
                (
                    ("norm = nn.utils", "nn.utils"),
                    (
                        "scaler.step(optimizer)",
                        "norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])\nscaler.step(optimizer)",
                    ),
                ),
                "clip 2.0, float32: norm .*, of before clipping",
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
                "no autocast",
                (("with place.autocast():", "with contextlib.nullcontext():"),),
                "bfloat16: under autocast",
            ),
            Variant(
                "train.train_step",
                "the scaler not updated",
                (("scaler.update()\n", ""),),
                "the scaler counts 0 sound steps",
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
                "a seed without the micro-step",
                (('(recipe["seed"], step, t, place.rank)', '(recipe["seed"], step, place.rank)'),),
                "draws the same as",
            ),
            Variant(
                "train.train_step",
                "a seed that is a sum",
                (
                    (
                        'int(np.random.SeedSequence((recipe["seed"], step, t, place.rank)).generate_state(1)[0])',
                        'recipe["seed"] + step + t + place.rank',
                    ),
                ),
                "draws the same as",
            ),
            Variant(
                "train.train_step",
                "gradients averaged over ranks in every micro-step",
                (("if last or place.world == 1 else model.no_sync()", ""),),
                "3 micro-steps: forward inside no_sync",
            ),
            Variant(
                "train.train_step",
                "gradients never averaged over ranks",
                (("if last or place.world == 1 else", "if place.world == 1 else"),),
                "1 micro-steps: forward inside no_sync",
            ),
            Variant(
                "train.read_step",
                "losses not averaged over the ranks",
                (("values / place.world", "values"),),
                "wanted the ranks' means",
            ),
            Variant(
                "train.read_step",
                "every rank reads its own",
                (("if place.world > 1:", "if False:"),),
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
                "a share of the batch for each rank",
                """
                share = batch // world
                for step in range(first, last):
                    for start in range(step * batch + rank * share, step * batch + (rank + 1) * share, micro):
                        yield list(range(start, start + micro))
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
                "data.micro_batches",
                "the ranks the other way round",
                (("rank * micro, (step", "(world - 1 - rank) * micro, (step"),),
                "rank by rank the samples are",
            ),
        ),
        "right": (
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
        "wrong": (),
        "right": (),
    },
    "a8": {
        "wrong": (),
        "right": (),
    },
}
