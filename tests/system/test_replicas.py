"""Threads with a share of torch's threads each, and copies of a model that share its tensors."""

from __future__ import annotations

import threading

import torch
from torch import nn

from dualhead.system.replicas import pool, twins


def test_each_lane_has_its_share_of_threads_and_the_caller_keeps_its_own():
    before = torch.get_num_threads()
    meeting = threading.Barrier(3, timeout=60)

    def look(_):
        meeting.wait()
        return threading.current_thread().name, torch.get_num_threads()

    seen = list(pool(3).map(look, range(3)))
    assert len({name for name, _ in seen}) == 3
    assert {threads for _, threads in seen} == {max(1, before // 3)}
    assert torch.get_num_threads() == before
    assert pool(3) is pool(3)


def test_copies_share_tensors_but_not_what_a_forward_keeps():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), None

        def forward(self, x):
            self.last = x.shape[0]
            return self.inner(x)

    model = Keeps()
    copies = twins(model, 2)
    for copied in copies:
        tensors = zip(
            copied.state_dict(keep_vars=True).values(), model.state_dict(keep_vars=True).values(), strict=True
        )
        assert all(a is b for a, b in tensors)
    copies[1](torch.rand(3, 4))
    assert (model.last, copies[0].last, copies[1].last) == (None, None, 3)
