"""Warnings that are told once."""

from __future__ import annotations

import logging

from dualhead.system.processes import joined
from dualhead.system.told import silent_unless, told_once

LOG = logging.getLogger("dualhead.data.source")


def test_only_the_first_process_warns(caplog):
    level = logging.getLogger("dualhead").level
    with silent_unless(first=False):
        LOG.warning("kept back")
        LOG.error("an error is told")
    with silent_unless(first=True):
        LOG.warning("told")
    with joined() as group:
        assert group.first
        LOG.warning("alone")
    assert [record.message for record in caplog.records] == ["an error is told", "told", "alone"]
    assert logging.getLogger("dualhead").level == level


def test_the_same_text_is_printed_once(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dualhead"), "propagate", False)
    with told_once():
        for _ in range(3):
            LOG.warning("no image has label %d", 0)
        LOG.warning("something else")
    LOG.warning("no image has label 0")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["no image has label 0", "something else", "no image has label 0"]
