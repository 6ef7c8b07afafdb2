"""The fused engine: one GPU, and a gradient that never exists as a whole.

What this is: hooks that take each gradient as the backward pass makes it. In the retain window they put it aside, by
default in 8 bits; in the unlearning window they project it per tensor, clip it, step AdamW and free it. The largest
gradient that is ever held is that of one layer, the optimizer's state may be in 8 bits, and bf16 weights are rounded
stochastically, without fp32 masters: that is how a whole SDXL U-Net fits a small card.
What this is not: sharding (``zero.py``), or another algorithm. Two things differ from surgery under ZeRO, because a
tensor is stepped before the next one's gradient is known:
  * clipping goes by the norm of the update before; in the first one, by that of each layer;
  * a gradient that is not finite keeps its own layer from being stepped. All layers stay as they are where already the
    loss is not finite. Either way the update counts as skipped.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from fastunlearn.config import Config, SurgeryConfig, student_updates
from fastunlearn.engines.optimizers import HostMoments, fused_optimizer, layer_of
from fastunlearn.engines.zero import Kept
from fastunlearn.errors import UserError
from fastunlearn.gradients.buffer import GradientBuffer
from fastunlearn.gradients.projection import ADDITION, Figures, Surgery, coefficients
from fastunlearn.utils.distributed import World
from fastunlearn_kernels import Plan, Quantized, surgery_apply, surgery_dots
from fastunlearn_kernels.segments import per_tensor

STATE_FILE = "fused.pt"
CLIP_EPSILON = 1e-6


class Layer:
    """Parameters that are stepped together, with their optimizer and their kept retain gradient."""

    def __init__(self, cfg: Config, number: int, rows: list[int], parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.rows = torch.tensor(rows, device=parameters[0].device)
        """Where its tensors stand in the run's table."""
        self.optimizer = fused_optimizer(parameters, cfg.optimizer, cfg.train.learning_rate, cfg.seed + (number << 32))
        self.moments = HostMoments(self.optimizer) if cfg.fused.offload_optimizer == "cpu" else None
        dtype = "int8" if cfg.surgery.retain_dtype == "auto" else cfg.surgery.retain_dtype
        self.kept = GradientBuffer(cfg.surgery.model_copy(update={"retain_dtype": dtype}), stream=number)
        self.meta = GradientBuffer(SurgeryConfig(retain_dtype=cfg.meta.gradient_dtype), stream=number)
        """The meta term's gradient, which is added after the projection."""
        self.missing = len(parameters)

    def gradients(self) -> list[Tensor]:
        """Of all parameters; zeros where the backward pass had none to give."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def free(self) -> None:
        """Drop the gradients and await the next ones."""
        for parameter in self.parameters:
            parameter.grad = None
        self.missing = len(self.parameters)

    def second_moments(self) -> tuple[list[Tensor], list[Tensor]] | list[Tensor] | None:
        """AdamW's, as ``surgery_dots`` takes them; None before the first update."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        if not all(states):
            return None
        second = [state["state2"] for state in states]
        return (second, [state["absmax2"] for state in states]) if "absmax2" in states[0] else second


class FusedEngine:
    """The student U-Net under the fused engine, with the interface of ``zero.Engine``. Call it like the U-Net."""

    steps_in_backward: Literal[True] = True

    def __init__(self, unet: nn.Module, cfg: Config, world: World) -> None:
        """Hook the parameters of ``unet`` that require a gradient."""
        self.cfg = cfg
        self.sampler = unet
        self.named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        self._device = world.device
        self._layers = self._make_layers()
        self._keeping: Kept | None = None
        self._table: Tensor | None = None
        self._sums: Tensor | None = None
        """As ``_table``, of the gradient that is stepped; apart from it only with a meta term."""
        self._loss_is_bad = torch.zeros((), device=world.device)
        self._norm: Tensor | None = None
        """Of the last update that was applied, for clipping."""
        self._skipped = False
        anchor = torch.optim.SGD([torch.zeros(1)], lr=cfg.train.learning_rate)  # whose rate the schedule moves
        self._schedule = get_scheduler(
            cfg.train.lr_scheduler, optimizer=anchor, num_warmup_steps=cfg.train.lr_warmup_steps,
            num_training_steps=student_updates(cfg),
        )  # fmt: skip

    def __call__(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        """A recorded forward pass."""
        return self.sampler(*args, **kwargs)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self._schedule.get_last_lr()[0])

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm of the last update's gradient, before clipping; None where it was skipped."""
        return None if self._skipped else self._norm

    def backward(self, loss: Tensor, last: bool) -> None:
        """Make the gradients; the hooks use them up. ``last``: there is one micro-batch, but for a meta term's."""
        if not last and self._keeping != "meta":
            raise RuntimeError("the fused engine steps in the backward pass, so that a window can have only one")
        self._loss_is_bad = 1.0 - loss.detach().isfinite().float()
        loss.backward()
        for layer in self._layers:
            if layer.missing != len(layer.parameters):  # some parameter had no part in the loss
                self._complete(layer)

    @contextlib.contextmanager
    def capture_gradient(self, _: Surgery, what: Kept) -> Iterator[None]:
        """Inside, gradients are put aside instead of used; those of a meta term are added up."""
        self._keeping = what
        try:
            yield
        finally:
            self._keeping = None

    def figures(self) -> Figures:
        """The evidence of the update whose backward pass has just ended."""
        assert self._table is not None, "figures() before backward()"
        plan = coefficients(self.cfg.surgery, self._table, self._layers[0].kept.bias_correction, None)
        plan = plan._replace(found_inf=torch.maximum(plan.found_inf, self._loss_is_bad))
        if self._sums is not None:
            added = coefficients(ADDITION, self._sums, 1.0, None)
            plan = plan._replace(norm=added.norm, found_inf=torch.maximum(plan.found_inf, added.found_inf))
        return Figures(self._table, plan)

    def step(self, grad_norm: Tensor | None = None) -> None:
        """The weights have moved; the learning rate follows."""
        self._norm = self.figures().plan.norm if grad_norm is None else grad_norm
        self._table, self._sums, self._skipped = None, None, False
        self._schedule.optimizer.step()  # a scheduler warns where it is ahead of its optimizer
        self._schedule.step()

    def skip_step(self) -> None:
        """Something was not finite: the learning rate stays, and no running mean is continued with it."""
        self._table, self._sums, self._skipped = None, None, True
        for layer in self._layers:
            layer.kept.forget()
            layer.meta.forget()

    def full_weights(self) -> dict[str, Tensor]:
        """The trained parameters in fp32 on the host."""
        return {name: p.detach().float().cpu().clone().contiguous() for name, p in self.named.items()}

    def save(self, folder: Path) -> None:
        """Write weights, optimizer state and what else the next update needs."""
        state = {
            "weights": {name: p.detach().cpu() for name, p in self.named.items()},
            "optimizers": [layer.optimizer.state_dict() for layer in self._layers],
            "kept": [layer.kept.state_dict() for layer in self._layers],
            "updates": self._schedule.last_epoch,
            "norm": None if self._norm is None else self._norm.cpu(),
        }
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        try:
            state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            reason = str(error)[:120]
            raise UserError(f"resume_from_checkpoint: {folder} cannot be read ({reason}); use another one") from error
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state["weights"][name])
        for layer, optimizer, kept in zip(self._layers, state["optimizers"], state["kept"], strict=True):
            layer.optimizer.load_state_dict(optimizer)
            if layer.moments is not None:
                layer.moments.put_back()
            layer.kept.load_state_dict(kept, self._device)
        self._norm = None if state["norm"] is None else state["norm"].to(self._device)
        for _ in range(state["updates"]):
            self._schedule.optimizer.step()
            self._schedule.step()

    def _make_layers(self) -> list[Layer]:
        members: dict[str, list[int]] = {}
        parameters = list(self.named.values())
        for row, (name, parameter) in enumerate(self.named.items()):
            members.setdefault(layer_of(name, parameter.numel()), []).append(row)
        layers = []
        engine = weakref.ref(self)  # the garbage collector cannot see into a hook: it would keep all of this alive
        for number, rows in enumerate(members.values()):
            layers.append(Layer(self.cfg, number, rows, [parameters[row] for row in rows]))
            for row in rows:
                parameters[row].register_post_accumulate_grad_hook(partial(_arrived, engine, number))
        return layers

    def arrived(self, number: int) -> None:
        """A gradient of this layer is there."""
        layer = self._layers[number]
        layer.missing -= 1
        if layer.missing == 0:
            self._complete(layer)

    @torch.no_grad()
    def _complete(self, layer: Layer) -> None:
        """All gradients of a layer are there."""
        gradients = layer.gradients()
        if self._keeping == "retain":
            layer.kept.keep(gradients)
        elif self._keeping == "meta":
            layer.meta.add(gradients)
        else:
            self._update(layer, gradients)
        layer.free()

    def _update(self, layer: Layer, gradients: list[Tensor]) -> None:
        """Project, clip and step one layer."""
        cfg = self.cfg
        if layer.moments is not None:
            layer.moments.fetch(self._device)
        retain = layer.kept.at(self._device) if layer.kept.there else None
        segments = per_tensor(gradients)
        second = layer.second_moments() if cfg.retains and cfg.surgery.metric == "optimizer" else None
        table = surgery_dots(gradients, retain, segments, second_moment=second, eps=cfg.optimizer.adam_epsilon)
        self._table = self._noted(self._table, layer, table)
        plan = self._plan(layer, table)
        if layer.meta.there:
            retain, plan = self._added(layer, gradients, retain, plan)
        layer.optimizer.param_groups[0]["lr"] = self.learning_rate
        layer.optimizer.step(retain=retain, plan=plan, segments=segments)
        layer.kept.release()
        layer.meta.release()
        if layer.moments is not None:
            layer.moments.put_back()

    def _added(
        self, layer: Layer, gradients: list[Tensor], retain: list[Tensor] | Quantized | None, plan: Plan
    ) -> tuple[list[Tensor] | Quantized, Plan]:
        """Project now, so that the step can add the meta term's gradient in the place of the retain gradient."""
        segments, meta = per_tensor(gradients), layer.meta.at(self._device)
        surgery_apply(gradients, retain, segments, plan)
        table = surgery_dots(gradients, meta, segments)
        self._sums = self._noted(self._sums, layer, table)
        added = coefficients(ADDITION, table, 1.0, None)
        return meta, added._replace(found_inf=torch.maximum(added.found_inf, plan.found_inf))

    def _plan(self, layer: Layer, table: Tensor) -> Plan:
        """Coefficients of the layer's tensors; the scale of the clipping; and no step where the loss is not finite."""
        limit = self.cfg.train.max_grad_norm
        first = self._norm is None
        plan = coefficients(self.cfg.surgery, table, layer.kept.bias_correction, limit if limit and first else None)
        if limit and self._norm is not None:
            scale = (limit / (self._norm + CLIP_EPSILON)).clamp(max=1.0)
            plan = plan._replace(scale=plan.scale * scale.to(plan.scale.dtype))
        return plan._replace(found_inf=torch.maximum(plan.found_inf, self._loss_is_bad))

    def _noted(self, whole: Tensor | None, layer: Layer, table: Tensor) -> Tensor:
        """A layer's rows of inner products, entered in the table of all."""
        if whole is None:
            whole = table.new_zeros(len(self.named), table.shape[1])
        whole[layer.rows] = table
        return whole


def _arrived(engine: weakref.ref[FusedEngine], number: int, _: Tensor) -> None:
    alive = engine()
    if alive is not None:
        alive.arrived(number)


def unrounded(originals: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What bf16 training changed, added to the originals, which have more digits than bf16.

    A tensor that training left alone comes out exactly as it was. Shapes and names as in ``weights``; fp32.
    """
    found = {}
    for name, weight in weights.items():
        original = originals[name].detach().float().cpu()
        found[name] = original + (weight - original.bfloat16().float())
    return found
