from __future__ import annotations

import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.heads.aggregators import aggregators, default_aggregator

OF_LOGITS = [name for name in aggregators.names() if name != "after_dder"]
"""Those that see head logits alone; see `test_routers.py` for the other."""


def head_logits(batch=6, classes=10, scale=3.0, seed=0):
    return scale * torch.randn(batch, 2, classes, generator=torch.Generator().manual_seed(seed))


def randomised(name, classes, **fields):
    """A module whose every parameter and statistic is random, so that no term can hide behind a zero or a one."""
    torch.manual_seed(1)
    module = aggregators.build({"name": name, **fields}).create(classes)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
        for parameter in module.parameters():
            parameter.sub_(0.6)
    return module


def test_pairwise_cnn_has_the_papers_size_and_form():
    module = aggregators.build("pairwise_cnn").create(10)
    assert sum(p.numel() for p in module.parameters()) == 28_930  # 0.029 M
    assert (module.fc.in_features, module.fc.out_features) == (2880, 10)


def pairs_by_loops(module, z):
    """The paper's aggregator, written from its description with plain loops; evaluation mode, one image at a time."""

    def normalise(value, bn, channel):
        spread = (bn.running_var[channel] + bn.eps).sqrt()
        return (value - bn.running_mean[channel]) / spread * bn.weight[channel] + bn.bias[channel]

    rows = []
    for image in z:
        classes = image.shape[1]
        features = torch.zeros(8, classes)
        for channel in range(8):
            for c in range(classes):
                value = module.class_conv.bias[channel]
                for head in range(2):
                    value = value + module.class_conv.weight[channel, head, 0] * image[head, c]
                features[channel, c] = normalise(value, module.class_bn, channel).clamp(min=0)
        upper, lower = [], []
        for i in range(classes):
            for j in range(i + 1, classes):
                upper += [features[channel, i] for channel in range(8)]
                lower += [features[channel, j] for channel in range(8)]
        flat = []
        for above, below in zip(upper, lower, strict=True):
            weight, bias = module.pair_conv.weight[:, :, 0], module.pair_conv.bias
            scores = [
                normalise(weight[k, 0] * above + weight[k, 1] * below + bias[k], module.pair_bn, k) for k in range(16)
            ]
            flat += [(scores[2 * k] + scores[2 * k + 1]) / 2 for k in range(8)]
        rows.append(module.fc.weight @ torch.stack(flat) + module.fc.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_pairwise_cnn_equals_plain_loops(classes):
    module = randomised("pairwise_cnn", classes).eval()
    z = head_logits(2, classes)
    with torch.no_grad():
        torch.testing.assert_close(module(z), pairs_by_loops(module, z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_pairwise_cnn_in_training_goes_the_long_way_to_the_same_logits(classes):
    """In training the pairs are laid out, since batch norm needs their statistics; with fixed ones nothing differs."""
    module = randomised("pairwise_cnn", classes).double()
    z = head_logits(4, classes).double()
    expected = module.eval()(z)
    gradients = torch.autograd.grad(expected.sin().sum(), list(module.parameters()))
    module.train()
    module.class_bn.eval()
    module.pair_bn.eval()
    logits = module(z)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(torch.autograd.grad(logits.sin().sum(), list(module.parameters())), gradients)


def test_pairwise_cnn_is_affine_in_its_class_features():
    module = randomised("pairwise_cnn", 5).eval()
    module.class_conv, module.class_bn = nn.Identity(), nn.Identity()
    features = torch.rand(3, 8, 5).double()  # beyond the ReLU, which leaves them
    module.double()
    both = module(features) + module(2 * features)
    torch.testing.assert_close(both, 2 * module(1.5 * features))


@pytest.mark.parametrize("classes", [21, 1000])
def test_pairwise_cnn_refuses_many_classes_and_names_the_one_that_scales(classes):
    with pytest.raises(UserError, match="pairwise_shared"):
        aggregators.build("pairwise_cnn").create(classes)


@pytest.mark.parametrize(("classes", "name"), [(2, "pairwise_cnn"), (20, "pairwise_cnn"), (21, "pairwise_shared")])
def test_default_is_the_papers_while_its_size_permits(classes, name):
    assert default_aggregator(classes) == name
    aggregators.build(name).create(classes)


@pytest.mark.parametrize("name", ["pairwise_cnn", "pairwise_shared"])
def test_one_class_is_refused(name):
    with pytest.raises(UserError, match="at least 2 classes"):
        aggregators.build(name).create(1)


@pytest.mark.parametrize("name", ["mean", "linear", "pairwise_shared"])
@pytest.mark.parametrize("classes", [2, 10, 200])
def test_a_fresh_aggregator_is_the_mean_of_the_heads(name, classes):
    z = head_logits(4, classes)
    torch.testing.assert_close(aggregators.build(name).create(classes)(z), z.mean(1))


@pytest.mark.parametrize("name", OF_LOGITS)
@pytest.mark.parametrize("classes", [2, 3, 10, 20])
def test_every_aggregator_gives_logits_and_gradients_to_all_inputs(name, classes):
    if (name, classes) == ("mixed_nuts", 2):
        return  # refused there, since it could give no gradient
    torch.manual_seed(0)
    module = aggregators.build(name).create(classes)
    z = head_logits(16, classes).requires_grad_()
    logits = module(z)
    assert logits.shape == (16, classes)
    nn.functional.cross_entropy(logits, torch.arange(16) % classes).backward()
    assert (z.grad.abs().sum(0) > 0).all()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("name", OF_LOGITS)
def test_images_do_not_meet_in_evaluation_mode(name):
    module = randomised(name, 7).eval()
    z = head_logits(5, 7)
    with torch.no_grad():
        torch.testing.assert_close(module(z), torch.cat([module(row[None]) for row in z]))


def shared_by_loops(module, z):
    """`pairwise_shared` from its docstring's formulas, with plain loops."""
    out = []
    for image in z:
        mean = (image[0] + image[1]) / 2
        p = mean.exp() / mean.exp().sum()
        order = sorted(range(len(p)), key=lambda c: -p[c].item())
        leading, rest = order[: module.rivals], order[module.rivals :]
        threshold = p[rest[0]] if rest else 0.0
        f = torch.relu(module.class_bn(module.class_conv(image[None])))[0]
        row = []
        for i in range(len(p)):
            value = mean[i]
            for j in leading:
                g = torch.relu(module.own.weight @ f[:, i] + module.own.bias + module.rival.weight @ f[:, j])
                value = value + (p[j] - threshold) * (module.readout[i] @ g)
            row.append(value)
        out.append(torch.stack(row))
    return torch.stack(out)


@pytest.mark.parametrize(("classes", "rivals"), [(2, 10), (10, 10), (13, 4)])
def test_pairwise_shared_equals_plain_loops(classes, rivals):
    module = randomised("pairwise_shared", classes, rivals=rivals).eval()
    z = head_logits(3, classes, scale=1.0)
    with torch.no_grad():
        torch.testing.assert_close(module(z), shared_by_loops(module, z), rtol=1e-4, atol=1e-5)


def test_pairwise_shared_does_not_jump_where_the_leading_classes_change():
    module = randomised("pairwise_shared", 6, rivals=2).eval().double()
    z = head_logits(1, 6, scale=0.1).double()
    z[0, :, 0] += 2.0
    values = []
    for less in (1e-9, -1e-9):  # class 1 and class 2 exchange the last place among the leading two
        z[0, :, 1], z[0, :, 2] = 1.0, 1.0 - less
        values.append(module(z).detach())
    torch.testing.assert_close(*values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [100, 1000])
def test_pairwise_shared_grows_linearly(classes):
    parameters = sum(p.numel() for p in aggregators.build("pairwise_shared").create(classes).parameters())
    assert parameters == 16 * classes + 312
    assert parameters < 0.05 * 25.6e6  # ResNet-50


@pytest.mark.parametrize("name", ["pairwise_cnn", "pairwise_shared"])
def test_it_learns_whom_to_trust_pair_by_pair(name):
    """Head 1 is right between classes 0 and 1, head 2 between 2 and 3, and each guesses in the other's pair."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (512,), generator=generator)
    z = torch.full((512, 2, 4), -4.0)
    rows = torch.arange(512)
    pair = y // 2
    guess = 2 * pair + torch.randint(2, (512,), generator=generator)
    for head in range(2):
        z[rows, head, 2 * pair] = z[rows, head, 2 * pair + 1] = 0.0
        z[rows, head, torch.where(pair == head, y, guess)] = 3.0
    z += 0.1 * torch.randn(z.shape, generator=generator)
    torch.manual_seed(0)
    module = aggregators.build(name).create(4)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(z), y).backward()
        optimiser.step()
    mean = (z.mean(1).argmax(1) == y).float().mean()
    assert (module.eval()(z).argmax(1) == y).float().mean() > max(0.98, mean + 0.1)
