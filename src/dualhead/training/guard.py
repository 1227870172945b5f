"""Steps whose numbers are not finite do not happen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualhead.training.buffers import Slot, settle, slots


class StepGuard:
    """Takes a step of the optimiser, unless loss, gradients or buffers are not finite: then all stays as it was.

    The decision is made on the device: whoever drives the steps does not wait for it. Parameters and optimiser are
    held by torch's own fused optimisers, which skip a step by a flag on the device, as for gradient scaling. Buffers
    (statistics of batch norm, which the forward pass has moved already) are put back.

    Args:
        model: whose buffers the forward pass may move.
        optimiser: of its parameters.
        clip_norm: longest gradient, over all parameters together; a longer one is shortened to it. None: any.

    Attributes:
        streak: how many steps in a row were dropped, up to now; int64 scalar on the device.
    """

    streak: Tensor

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer, clip_norm: float | None = None) -> None:
        self._optimiser = optimiser
        self._clip_norm = clip_norm
        self._on_device = bool(getattr(optimiser, "_step_supports_amp_scaling", False))
        self._model = model
        self._held: list[Slot] = []
        self._before: list[Tensor] = []
        self._boundless: set[int] | None = None
        device = optimiser.param_groups[0]["params"][0].device
        self.streak = torch.zeros((), dtype=torch.int64, device=device)

    def remember(self) -> None:
        """To be called before the forward pass of the loss, in the mode in which it runs."""
        self._held = slots(module for module in self._model.modules() if module.training)
        self._before = [slot.tensor.clone() for slot in self._held]
        if self._boundless is None:  # such as the mask of an attention, -inf where nothing is to be seen
            self._boundless = {
                id(tensor) for *_, tensor in self._held
                if tensor.is_floating_point() and not bool(tensor.isfinite().all())
            }  # fmt: skip

    def settle(self) -> None:
        """To be called after the passes of a step: buffers that they assigned anew are the tensors of before again."""
        settle(self._held)

    @property
    def moved(self) -> list[Tensor]:
        """The statistics that the forward pass may have moved, each once: layers of tied heads may share them."""
        tensors = {id(tensor): tensor for *_, tensor in self._held if tensor.is_floating_point()}
        return [tensor for key, tensor in tensors.items() if key not in (self._boundless or ())]

    def step(self, loss: Tensor) -> Tensor:
        """Take the step or drop it, given the loss (scalar) whose gradients lie in `.grad`.

        Returns:
            Whether it was taken, bool scalar on the device.
        """
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        taken = torch.isfinite(loss.detach()) & torch.isfinite(nn.utils.get_total_norm(gradients))
        if moved := self.moved:  # their largest value: squares of large ones would not be finite
            taken = taken & torch.isfinite(nn.utils.get_total_norm(moved, torch.inf))
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters(), self._clip_norm, nn.utils.get_total_norm(gradients))
        if self._on_device:
            self._optimiser.found_inf = (~taken).float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
            self._optimiser.step()
        elif bool(taken):  # an optimiser without that flag is asked on the host
            self._optimiser.step()
        for (*_, buffer), before in zip(self._held, self._before, strict=True):
            torch.where(taken, buffer, before, out=buffer)
        self.streak = torch.where(taken, 0, self.streak + 1)
        return taken

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._optimiser.param_groups for p in group["params"]]

    def set_streak(self, streak: int) -> None:
        """Count on from a number of dropped steps."""
        self.streak = torch.full_like(self.streak, streak)
