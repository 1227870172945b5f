"""Parameter tables of published networks, from the architectures' rules alone, and weights for them."""

from __future__ import annotations

import torch


def norm_keys(name, channels):
    names = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{n}": (channels,) for n in names}, f"{name}.num_batches_tracked": ()}


def wideresnet_block(name, blocks, source, target):
    table = {}
    for i in range(blocks):
        at, width = f"{name}.layer.{i}", source if i == 0 else target
        table |= norm_keys(f"{at}.bn1", width) | {f"{at}.conv1.weight": (target, width, 3, 3)}
        table |= norm_keys(f"{at}.bn2", target) | {f"{at}.conv2.weight": (target, target, 3, 3)}
        if width != target:
            table[f"{at}.convShortcut.weight"] = (target, width, 1, 1)
    return table


def wideresnet_table(depth, width, classes, channels=3, sub_block=False):
    n, w = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
    table = {"conv1.weight": (16, channels, 3, 3), **wideresnet_block("block1", n, w[0], w[1])}
    if sub_block:
        table |= wideresnet_block("sub_block1", n, w[0], w[1])
    table |= wideresnet_block("block2", n, w[1], w[2]) | wideresnet_block("block3", n, w[2], w[3])
    return table | norm_keys("bn1", w[3]) | {"fc.weight": (classes, w[3]), "fc.bias": (classes,)}


def resnet_table(blocks, bottleneck, classes, channels=3):
    table = {"conv1.weight": (64, channels, 3, 3), **norm_keys("bn1", 64)}
    source = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
        target = 4 * width if bottleneck else width
        for i in range(count):
            at = f"layer{stage}.{i}"
            shapes = (
                [(width, source, 1, 1), (width, width, 3, 3), (target, width, 1, 1)]
                if bottleneck
                else [(width, source, 3, 3), (width, width, 3, 3)]
            )
            for j, shape in enumerate(shapes, 1):
                table |= {f"{at}.conv{j}.weight": shape} | norm_keys(f"{at}.bn{j}", shape[0])
            if source != target or (stage > 1 and i == 0):
                table |= {f"{at}.shortcut.0.weight": (target, source, 1, 1)} | norm_keys(f"{at}.shortcut.1", target)
            source = target
    return table | {"linear.weight": (classes, source), "linear.bias": (classes,)}


def preactresnet_table(blocks, final_norm, classes):
    table, source = {"conv1.weight": (64, 3, 3, 3)}, 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
        for i in range(count):
            at = f"layer{stage}.{i}"
            table |= norm_keys(f"{at}.bn1", source) | {f"{at}.conv1.weight": (width, source, 3, 3)}
            table |= norm_keys(f"{at}.bn2", width) | {f"{at}.conv2.weight": (width, width, 3, 3)}
            if stage > 1 and i == 0:
                table[f"{at}.shortcut.0.weight"] = (width, source, 1, 1)
            source = width
    table |= norm_keys("bn", 512) if final_norm else {}
    return table | {"linear.weight": (classes, 512), "linear.bias": (classes,)}


def state_for(table, seed=0):
    """Values that neither explode nor vanish, and batch-norm statistics that no fresh network has."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in table.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) > 1:
            fan_in = torch.Size(shape[1:]).numel()
            state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith(("weight", "running_var")):
            state[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            state[name] = 0.3 * torch.randn(shape, generator=generator)
    return state


CASES = {
    "wideresnet-10-2": wideresnet_table(10, 2, 10),
    "wideresnet-16-1": wideresnet_table(16, 1, 7),
    "wideresnet-34-10": wideresnet_table(34, 10, 10),
    "resnet-18": resnet_table((2, 2, 2, 2), False, 10),
    "resnet-34": resnet_table((3, 4, 6, 3), False, 10),
    "resnet-50": resnet_table((3, 4, 6, 3), True, 10),
    "preactresnet-18": preactresnet_table((2, 2, 2, 2), True, 10),
}
