"""Small, randomly initialised models of transformers, and what must hold of a cut of any of them."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.heads import attach_second_head, split_model
from dualhead.heads.splitting.base import is_shape_only
from dualhead.system.outputs import logits_of

CLASSES = 5


@dataclass(frozen=True)
class Architecture:
    """A model and its blocks.

    Args:
        name: for people.
        config: name of the configuration class; the model class is named alike.
        options: of the configuration, that make it small.
        blocks: pattern of the names of the modules that are its blocks, in the order of the forward pass.
        size: of the images.
        model: name of the model class, where it is not CONFIG's ForImageClassification.
        refused: words of the reason, if its blocks cannot be cut.
    """

    name: str
    config: str
    options: dict[str, Any]
    blocks: str
    size: int = 32
    model: str | None = None
    refused: str | None = None

    def create(self) -> nn.Module:
        import transformers

        config = getattr(transformers, self.config)(num_labels=CLASSES, **self.options)
        model = self.model or self.config.replace("Config", "ForImageClassification")
        torch.manual_seed(0)
        return getattr(transformers, model)(config).train()

    def images(self, count: int = 3) -> torch.Tensor:
        return torch.rand(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))

    def block_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_modules() if re.fullmatch(self.blocks, name)]

    def places(self, model: nn.Module) -> dict[str, str]:
        """First, middle and last block."""
        names = self.block_names(model)
        return {"first": names[0], "middle": names[(len(names) - 1) // 2], "last": names[-1]}


VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.1,
}
STAGES = r"\w+\.encoder\.stages\.\d+\.layers\.\d+"

ARCHITECTURES = [
    Architecture(
        "ResNet",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"},
        STAGES,
    ),
    Architecture(
        "RegNet",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "groups_width": 4},
        STAGES,
    ),
    Architecture(
        "BiT", "BitConfig", {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [2, 1], "num_groups": 4}, STAGES
    ),
    Architecture(
        "ConvNeXt",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2, "drop_path_rate": 0.2},
        STAGES,
    ),
    Architecture(
        "ConvNeXt V2",
        "ConvNextV2Config",
        {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2, "drop_path_rate": 0.2},
        STAGES,
    ),
    Architecture("ViT", "ViTConfig", VIT, r"vit\.(encoder\.layer|layers)\.\d+"),
    Architecture("DeiT", "DeiTConfig", VIT, r"deit\.(encoder\.layer|layers)\.\d+"),
    Architecture("BEiT", "BeitConfig", VIT, r"beit\.(encoder\.layer|layers)\.\d+"),
    Architecture(
        "BEiT, shared positions",
        "BeitConfig",
        {**VIT, "use_shared_relative_position_bias": True},
        r"beit\.(encoder\.layer|layers)\.\d+",
    ),
    Architecture("Data2Vec Vision", "Data2VecVisionConfig", VIT, r"data2vec_vision\.(encoder\.layer|layers)\.\d+"),
    Architecture("DINOv2", "Dinov2Config", {**VIT, "mlp_ratio": 2}, r"dinov2\.(encoder\.layer|layers)\.\d+"),
    Architecture(
        "DINOv2 with registers",
        "Dinov2WithRegistersConfig",
        {**VIT, "mlp_ratio": 2},
        r"\w+\.(encoder\.layer|layers)\.\d+",
    ),
    Architecture("ViT MSN", "ViTMSNConfig", VIT, r"vit\.(encoder\.layer|layers)\.\d+"),
    Architecture("I-JEPA", "IJepaConfig", VIT, r"ijepa\.(encoder\.layer|layers)\.\d+"),
    Architecture(
        "Swin",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        r"swin\.encoder\.layers\.\d+\.blocks\.\d+",
    ),
    Architecture(
        "Swin V2",
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        r"swinv2\.encoder\.layers\.\d+\.blocks\.\d+",
    ),
    Architecture(
        "MobileNet V1",
        "MobileNetV1Config",
        {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32},
        r"mobilenet_v1\.layer\.\d+",
        64,
    ),
    Architecture(
        "MobileNet V2",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32},
        r"mobilenet_v2\.layer\.\d+",
        64,
    ),
    Architecture(
        "EfficientNet",
        "EfficientNetConfig",
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
        r"efficientnet\.encoder\.blocks\.\d+",
        64,
    ),
    Architecture(
        "PoolFormer",
        "PoolFormerConfig",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]},
        r"poolformer\.encoder\.block\.\d+\.\d+",
        64,
    ),
    Architecture(
        "PVT",
        "PvtConfig",
        {
            "image_size": 64,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 16, 16],
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
        },
        r"pvt\.encoder\.block\.\d+\.\d+",
        64,
    ),
    Architecture(
        "PVT V2",
        "PvtV2Config",
        {
            "image_size": 64,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 16, 16],
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
        },
        r"pvt_v2\.encoder\.layers\.\d+\.blocks\.\d+",
        64,
    ),
    Architecture(
        "SegFormer (MiT)",
        "SegformerConfig",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 16, 16],
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
        },
        r"segformer\.stages\.\d+\.blocks\.\d+",
        64,
    ),
    Architecture(
        "LeViT",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [1, 1, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "attention_ratio": [1, 1, 1],
            "mlp_ratio": [2, 2, 2],
        },
        r"levit\.encoder\.stages\.\d+\.layers\.\d+",
        64,
    ),
    Architecture(
        "CvT",
        "CvtConfig",
        {"embed_dim": [8, 8, 16], "depth": [1, 2, 3], "num_heads": [1, 1, 2]},
        r"cvt\.encoder\.stages\.\d+\.layers\.\d+",
        64,
    ),
    Architecture(
        "FocalNet",
        "FocalNetConfig",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 2], "focal_levels": [2, 2], "focal_windows": [3, 3]},
        r"focalnet\.encoder\.stages\.\d+\.layers\.\d+",
    ),
    Architecture(
        "MobileViT",
        "MobileViTConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
            "num_attention_heads": 2,
        },
        r"mobilevit\.encoder\.layer\.\d+",
        64,
    ),
    Architecture(
        "MobileViT V2",
        "MobileViTV2Config",
        {"image_size": 64, "width_multiplier": 0.25},
        r"mobilevitv2\.encoder\.layer\.\d+",
        64,
    ),
    Architecture(
        "SwiftFormer",
        "SwiftFormerConfig",
        {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]},
        r"swiftformer\.encoder\.network\.\d+",
        64,
    ),
    Architecture(
        "Hiera",
        "HieraConfig",
        {
            "image_size": [32, 32],
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "num_query_pool": 1,
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
        },
        r"hiera\.encoder\.stages\.\d+\.layers\.\d+",
    ),
    Architecture(
        "HGNet V2",
        "HGNetV2Config",
        {
            "stem_channels": [3, 8, 8],
            "embedding_size": 8,
            "hidden_sizes": [16, 16, 16, 16],
            "stage_in_channels": [8, 16, 16, 16],
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [16, 16, 16, 16],
            "stage_numb_of_layers": [2, 2, 2, 2],
        },
        r"encoder\.stages\.\d+\.blocks\.\d+",
        64,
    ),
    Architecture("PP-LCNet", "PPLCNetConfig", {"scale": 0.25}, r"encoder\.blocks\.\d+\.layers\.\d+", 64),
    Architecture(
        "TextNet",
        "TextNetConfig",
        {"stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 8, 8]},
        r"textnet\.encoder\.stages\.\d+\.stage\.\d+",
        64,
    ),
    Architecture(
        "SigLIP",
        "SiglipConfig",
        {"vision_config": {**VIT, "num_hidden_layers": 3}},
        r"vision_model\.(encoder\.)?layers\.\d+",
    ),
    Architecture(
        "CLIP",
        "CLIPConfig",
        {"vision_config": {**VIT, "num_hidden_layers": 3}},
        r"vision_model\.(encoder\.)?layers\.\d+",
    ),
    Architecture(
        "Perceiver",
        "PerceiverConfig",
        {
            "image_size": 32,
            "num_latents": 4,
            "d_latents": 16,
            "num_blocks": 2,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
        },
        r"perceiver\.encoder\.self_attends\.\d+",
        model="PerceiverForImageClassificationLearned",
        refused="called 2 times",
    ),
]


def gradients(forward, thing, images, mode):
    """Logits and gradients by name, of the images too, under the same random numbers."""
    torch.manual_seed(0)
    parts = [thing] if isinstance(thing, nn.Module) else [thing.trunk, thing.tail]
    for part in parts:
        part.train(mode)
    images = images.clone().requires_grad_()
    logits = forward(images, thing)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(images)) % CLASSES).backward()
    named = {name: p.grad for part in parts for name, p in part.named_parameters(remove_duplicate=False)}
    named["images"] = images.grad
    return logits.detach(), {name: gradient for name, gradient in named.items() if gradient is not None}


def assert_same_function(model, split, images):
    """The cut model gives the model's logits and gradients in both modes."""
    for mode in (False, True):
        # Deep copies, since a forward pass in training mode moves statistics.
        logits, expected = gradients(lambda x, m: logits_of(m(x)), copy.deepcopy(model), images, mode)
        cut_logits, found = gradients(lambda x, s: s.tail(s.trunk(x)), copy.deepcopy(split), images, mode)
        torch.testing.assert_close(cut_logits, logits, rtol=1e-4, atol=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * max(scale, 1e-3), msg=name)


def assert_second_head_trains(classifier, images):
    """Steps on head 2 alone lower its loss and leave everything else as it was, to the bit."""
    labels = torch.arange(len(images)) % classifier.num_classes
    classifier.set_trainable({"head2"})
    view = classifier.view("head2")
    optimiser = torch.optim.Adam([p for p in classifier.parameters() if p.requires_grad], lr=1e-2)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    losses = []
    for _ in range(6):
        classifier.train()
        view.train()
        loss = torch.nn.functional.cross_entropy(view(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    after = classifier.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(name.startswith("head2.") for name in moved)
    assert all(p.grad is None for name, p in classifier.named_parameters() if not name.startswith("head2."))
    assert min(losses[1:]) < losses[0]


def examine(architecture, place):
    """Cut a model at its first, middle or last block, check all that must hold, and give its line of the table.

    The line says how it was cut and what crosses, or why it cannot be cut.
    """
    model = architecture.create()
    at, images = architecture.places(model)[place], architecture.images()
    start = f"| {architecture.name} | {place} | `{at}` |"
    if architecture.refused:
        with pytest.raises(UserError, match=architecture.refused) as caught:
            split_model(model, at, images)
        return f"{start} cannot be cut | {str(caught.value).split(': ', 1)[1]} |"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*running the whole forward pass")  # the line says so: functional
        split = split_model(model, at, images)
        assert_same_function(model, split, images)
        torch.manual_seed(0)
        assert_second_head_trains(attach_second_head(model, at, example=images), images)
    features = split.trunk.eval()(images)
    features = (features,) if isinstance(features, torch.Tensor) else features
    shapes = [" x ".join(map(str, f.shape[1:])) + " (its shape alone)" * is_shape_only(f) for f in features]
    return f"{start} {split.how} | {', '.join(shapes)} |"
