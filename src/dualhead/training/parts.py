"""The parts of a network that learn in a stage: the output that they train, and the objectives that fit them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dualhead.errors import UserError
from dualhead.heads import depends_on
from dualhead.names import AGGREGATE, AGGREGATOR, MODEL, TRUNK, head_id, is_head, is_merging, number_of
from dualhead.objectives import Features, Images, Labels, Logits, Need, Objective


def trained_output(parts: Collection[str]) -> str:
    """Return the output that a stage trains, given its parts: the aggregate, the last router or head, or head 1."""
    if MODEL in parts:
        return MODEL
    if AGGREGATOR in parts:
        return AGGREGATE
    routers = list(filter(is_merging, parts))
    return max(routers or filter(is_head, parts), default=head_id(1), key=number_of)


def feeds(part: str, need: Need) -> bool:
    """Tell whether a part has a share in what a need gives; an objective's own heads and teachers are no parts."""
    if isinstance(need, Labels | Images):
        return False
    if isinstance(need, Features):
        inside = part == AGGREGATOR and is_merging(need.part)  # a router lies in it
        return need.part == part or inside or (need.part != TRUNK and part == TRUNK)
    return need.output == part == MODEL or (need.output != MODEL and depends_on(need.output, part))


def refuse_unmet(objective: Objective, parts: Sequence[str], *, tied: bool = True) -> None:
    """Refuse an objective that the parts which learn do not fit.

    Args:
        objective: what they learn.
        parts: those that learn.
        tied: heads are tied to head 1, or may be, so that head 1 has a share in the outputs of all.

    Raises:
        UserError: if a loss is on what does not learn, what must not learn would, or a part would learn nothing.
    """

    def shares(part: str, need: Need) -> bool:
        by_tie = tied and part == head_id(1) and isinstance(need, Logits) and need.output != MODEL
        return by_tie or feeds(part, need)

    own = trained_output(parts)
    needs = [need.of(own) for need in objective.needs().values()]
    needs = [need for need in needs if not (isinstance(need, Logits) and need.output in objective.teachers())]
    frozen = objective.frozen()
    for part in parts:
        taught = next((output for output in frozen if feeds(part, Logits(output))), None)
        if taught is not None:
            raise UserError(f"{part} must not be trained: it would change {taught}, which is the teacher")
    for need in needs:
        output = need.output if isinstance(need, Logits) else None
        if output is not None and output not in frozen and not any(shares(part, need) for part in parts):
            raise UserError(f"a loss on {output} changes nothing, since no part of it is trained")
    idle = [part for part in parts if not any(shares(part, need) for need in needs)]
    if idle:
        on = ", ".join(dict.fromkeys(n.output for n in needs if isinstance(n, Logits) and n.output not in frozen))
        raise UserError(
            f"{idle[0]} would learn nothing, since the loss is on {on} alone; leave it out of train, or use objective "
            "joint"
        )
