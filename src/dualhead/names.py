"""Parts and outputs of a model: their ids, as recipes and files have them, and what people read of outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

MODEL: Final = "model"
"""The one part and the one output of a classifier without a second head."""
TRUNK: Final = "trunk"
"""The part that all heads share."""
AGGREGATOR: Final = "aggregator"
"""The part that merges the heads; its routers, if it has any, are parts too."""
MEAN: Final = "mean"
"""The mean of the heads' logits."""
AGGREGATE: Final = "aggregate"
"""Output of the aggregator, from the heads' logits."""
BASE: Final = "base"
"""The base model: trunk and head 1 as they were before any other part was trained."""

_CALLED = {BASE: "base model", MEAN: "mean of heads", AGGREGATE: "aggregate of heads"}
_CALLED_EARLIER = {"DH-AT": AGGREGATE}
_DESCRIBED = {
    MODEL: "A single-head classifier",
    MEAN: "The mean of {heads} heads",
    AGGREGATE: "A classifier of {heads} heads and an aggregator",
}


def head_id(number: int) -> str:
    """Return the id of a head, counted from 1."""
    return f"head{number}"


def router_id(number: int) -> str:
    """Return the id of a router of the aggregator, counted from 1."""
    return f"router{number}"


def router_number(output: str) -> int | None:
    """Return which router of the aggregator an output is, counted from 1; None if it is none."""
    found = re.fullmatch(r"router([1-9]\d*)", output)
    return int(found[1]) if found else None


def head_number(output: str) -> int | None:
    """Return which head an output is, counted from 1; None if it is no head."""
    found = re.fullmatch(r"head([1-9]\d*)", output)
    return int(found[1]) if found else None


def is_head(name: str) -> bool:
    """Whether a part or an output is a head: `head1`, `head2`, ..."""
    return head_number(name) is not None


def is_router(name: str) -> bool:
    """Whether a part or an output is a router of the aggregator: `router1`, `router2`, ..."""
    return router_number(name) is not None


def is_merging(part: str) -> bool:
    """Whether a part merges heads: the aggregator or one of its routers."""
    return part == AGGREGATOR or is_router(part)


def number_of(name: str) -> int:
    """Return the number of a head or router, counted from 1.

    Raises:
        ValueError: if it is neither.
    """
    return int(name.removeprefix("head").removeprefix("router"))


def parts_of(heads: Sequence[str], routers: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the parts of a classifier of two heads or more, in the order of a pass.

    Args:
        heads: their ids.
        routers: those of the aggregator's routers, if it has any.
    """
    return (TRUNK, *heads, *routers, AGGREGATOR)


def outputs_of(heads: Sequence[str], routers: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the outputs of a classifier of two heads or more; arguments as those of `parts_of`."""
    return (*heads, MEAN, *routers, AGGREGATE)


def name_of(output: str, model: str = MODEL) -> str:
    """Return what tables and figures call an output.

    Args:
        output: its id.
        model: what they call the one output of a classifier without a second head, such as its recipe's name.
    """
    number = head_number(output)
    if number is not None:
        return f"head {number}"
    if (router := router_number(output)) is not None:
        return f"router {router}"
    return model if output == MODEL else _CALLED.get(output, output)


def id_of(name: str) -> str:
    """Return the id of the output that tables call by a name; `model` for any other name."""
    by_name = {called: output for output, called in _CALLED.items()} | _CALLED_EARLIER
    found = re.fullmatch(r"(head|router) ([1-9]\d*)", name)
    return f"{found[1]}{found[2]}" if found else by_name.get(name, MODEL)


def read_id(text: str) -> str:
    """Return the id of an output as a file tells it: the id, or in files of earlier versions the name."""
    known = text in (*_CALLED, MODEL) or head_number(text) is not None or router_number(text) is not None
    return text if known else id_of(text)


def id_of_row(row: Mapping[str, Any]) -> str:
    """Return the id of the output that a row of `comparison.json` is of; earlier versions wrote names alone."""
    return read_id(str(row["output"])) if "output" in row else id_of(str(row.get("name")))


def row_folder(name: str) -> str:
    """Return the folder of a row's results in `evaluation/rows`, given the row's name."""
    return name.replace(" ", "_")


def described(output: str, heads: int, aggregator: str = "", paper: str = "") -> str:
    """Return how the card of a model describes its output.

    Args:
        output: its id.
        heads: how many the model has.
        aggregator: the name of what merges them; "" if it is not known.
        paper: cited in place of that name; "" if there is none.
    """
    number = head_number(output)
    if number is not None:
        return f"Head {number} of a classifier of {heads} heads"
    if (router := router_number(output)) is not None:
        return f"Router {router} of a classifier of {heads} heads"
    if output == AGGREGATE and aggregator and not paper:
        return f"A classifier of {heads} heads and the aggregator {aggregator}"
    told = _DESCRIBED.get(output, "A classifier").format(heads=heads)
    return f"{told} ({paper})" if output == AGGREGATE and paper else told
