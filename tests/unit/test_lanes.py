"""Asking a model in several threads: the same numbers, the same gradients, the same errors."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from dualhead.lanes import LEAST_ROWS, Lanes, twins


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)
    ).eval()


def images(count):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [8, 24, 32, 40, 72, 128])
def test_values_and_gradients_are_those_of_the_function(rows):
    model, x, weight = network(), images(rows), torch.randn(rows, 5)
    lanes = Lanes(twins(model, 2), 8)
    with torch.no_grad():
        torch.testing.assert_close(lanes(x), model(x), rtol=1e-5, atol=1e-6)
    gradients = []
    for function in (lanes, model):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad((function(leaf) * weight).sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_several_backward_passes_over_one_forward():
    model, x = network(), images(64).requires_grad_()
    logits = Lanes(twins(model, 2), 8)(x)
    found = [torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in (0, 3, 0)]
    expected = torch.autograd.grad(model(x)[:, 3].sum(), x)[0]
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], found[2])


def test_each_lane_has_rows_of_its_own_in_multiples_of_the_unit():
    seen, lock = [], threading.Lock()

    def function(x):
        with lock:
            seen.append((x.shape[0], threading.current_thread().name, torch.get_num_threads()))
        return x.flatten(1)

    before = torch.get_num_threads()
    share = max(1, before // 3)
    lanes, x = Lanes([function] * 3, 8), images(104)
    assert torch.equal(lanes(x), x.flatten(1))
    assert sorted(rows for rows, _, _ in seen) == [32, 32, 40]
    assert all(name.startswith("lane") and threads == share for _, name, threads in seen)
    assert torch.get_num_threads() == before
    seen.clear()
    lanes(x[: 3 * LEAST_ROWS - 1])
    assert [name for _, name, _ in seen] == [threading.current_thread().name]


def test_copies_share_tensors_but_not_what_a_forward_keeps():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = network(), None

        def forward(self, x):
            self.last = x.shape[0]
            return self.inner(x)

    first, second = twins(Keeps(), 2)
    assert all(a is b for a, b in zip(first.state_dict(keep_vars=True).values(),
                                      second.state_dict(keep_vars=True).values(), strict=True))  # fmt: skip
    second(images(3))
    assert first.last is None


def test_a_model_without_gradient_and_a_model_that_fails():
    x = images(64).requires_grad_()
    assert not Lanes([lambda z: z.detach().flatten(1)] * 2, 8)(x).requires_grad

    def fails(z):
        raise ValueError("no images today")

    with pytest.raises(ValueError, match="no images today"):
        Lanes([fails] * 2, 8)(x)
