"""The fused engine: one GPU, and a gradient that never exists as a whole.

Hooks take each gradient as the backward pass makes it. In the retain window they store it, by default in 8 bits; in the
unlearning window they project it per tensor, clip it, step AdamW and free it. The largest gradient that is ever held is
that of one layer, the optimizer's state may be in 8 bits, and bf16 weights are rounded stochastically, without fp32
masters: that is how a whole SDXL U-Net fits a small card.
Two things differ from the same transforms under ZeRO, because a tensor is stepped before the next one's gradient is
known:
  * clipping goes by the norm of the update before; in the first one, by that of each layer;
  * an update whose loss, retain gradient or meta gradient is not finite changes nothing, as under ZeRO. Where only the
    unlearning gradient is not, no layer is stepped from the one on in which that shows; those whose gradients came
    before have moved. Either way the update counts as skipped.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from fastunlearn.config import Config, student_updates
from fastunlearn.engines.base import Applied, Engine, ExportedWeights
from fastunlearn.engines.fused.memory import retain_dtype
from fastunlearn.engines.fused.moments import HostMoments, fused_optimizer
from fastunlearn.gradients.buffer import GradientBuffer
from fastunlearn.gradients.guard import FiniteGuard
from fastunlearn.gradients.shard import GradientKind
from fastunlearn.gradients.stats import SurgeryStats
from fastunlearn.gradients.transforms import Add, Clip, Project, clip_scale
from fastunlearn.models.parameter_names import layer_of
from fastunlearn.utils.distributed import World
from fastunlearn.utils.files import save_tensors
from fastunlearn_kernels import Quantized, SurgeryPlan, surgery_apply, surgery_dots
from fastunlearn_kernels.gradients.segments import per_tensor

STATE_FILE = "fused.pt"


class Layer:
    """Parameters that are stepped together, with their optimizer and their stored gradients."""

    def __init__(self, cfg: Config, number: int, rows: list[int], parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.rows = torch.tensor(rows, device=parameters[0].device)
        """Where its tensors stand in the run's table."""
        bits, seed = cfg.optimizer_spec.fused_bits, cfg.seed + (number << 32)
        self.optimizer = fused_optimizer(parameters, cfg.optimizer, bits, cfg.learning_rate, seed)
        self.moments = HostMoments(self.optimizer) if cfg.fused.offload_optimizer == "cpu" else None
        surgery = cfg.surgery_settings
        self.kept = GradientBuffer(retain_dtype(cfg), surgery.retain_device, surgery.retain_ema, number, watched=True)
        self.meta = GradientBuffer(cfg.meta.gradient_dtype, stream=number, watched=True)
        """The meta term's gradient, which is added after the projection."""
        self.missing = len(parameters)
        self.held: Tensor | None = None
        """Whether its last step was held back, since something was not finite; still on the device."""

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

    def uncount_held_step(self) -> None:
        """The optimizer counts a step before the device finds that it must not be taken; bias correction goes by it."""
        if self.held is not None and bool(self.held):
            for parameter in self.parameters:
                self.optimizer.state[parameter]["step"] -= 1

    def second_moments(self) -> tuple[list[Tensor], list[Tensor]] | list[Tensor] | None:
        """AdamW's, as ``surgery_dots`` takes them; None before the first update."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        if not all(states):
            return None
        second = [state["state2"] for state in states]
        return (second, [state["absmax2"] for state in states]) if "absmax2" in states[0] else second


class FusedEngine(Engine):
    """The student U-Net whose layers are stepped as their gradients come."""

    def __init__(self, unet: nn.Module, cfg: Config, world: World) -> None:
        """Hook the parameters of ``unet`` that require a gradient."""
        self.cfg = cfg
        self._unet = unet
        self.named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        self._device = world.device
        self.project, self.add, self.clip = Project(cfg.surgery_settings), Add(), Clip(cfg.train.max_grad_norm)
        self.guard = FiniteGuard(cfg.surgery.max_skipped_updates)
        self._layers = self._make_layers()
        self._capturing: GradientKind | None = None
        self._table: Tensor | None = None
        self._sums: Tensor | None = None
        """As ``_table``, of the gradient that is stepped; apart from it only with a meta term."""
        self._broken = torch.zeros((), device=world.device)
        """1 from the moment on at which something of the update at hand was not finite; read on the device only."""
        self._norm: Tensor | None = None
        """Of the last update that was applied, for clipping."""
        self._skipped = False
        anchor = torch.optim.SGD([torch.zeros(1)], lr=cfg.learning_rate)  # whose rate the schedule moves
        self._schedule = get_scheduler(
            cfg.train.lr_scheduler, optimizer=anchor, num_warmup_steps=cfg.train.lr_warmup_steps,
            num_training_steps=student_updates(cfg),
        )  # fmt: skip

    def __call__(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        """A recorded forward pass."""
        return self._unet(*args, **kwargs)

    @property
    def sampler(self) -> nn.Module:
        """The module itself."""
        return self._unet

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self._schedule.get_last_lr()[0])

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm of the last update's gradient, before clipping; None where it was skipped."""
        return None if self._skipped else self._norm

    @property
    def projected_segments(self) -> Sequence[str] | None:
        """Every tensor is projected by itself."""
        return list(self.named) if self.cfg.retains else None

    def backward(self, loss: Tensor, last: bool) -> None:
        """Make the gradients; the hooks use them up. ``last``: there is one micro-batch, but for a meta term's."""
        if not last and self._capturing != "meta":
            raise RuntimeError("the fused engine steps in the backward pass, so that a window can have only one")
        self._note_broken(1.0 - loss.detach().isfinite().float())
        loss.backward()
        for layer in self._layers:
            if layer.missing != len(layer.parameters):  # some parameter had no part in the loss
                self._complete(layer)

    @contextlib.contextmanager
    def capture_gradient(self, kind: GradientKind) -> Iterator[None]:
        """Inside, gradients are stored instead of used; those of a meta term are added up."""
        self._capturing = kind
        try:
            yield
        finally:
            self._capturing = None

    def apply(self) -> Applied:
        """The weights have moved in the backward pass; the learning rate follows, unless something was not finite."""
        seen = self._seen()
        projection = seen[0] if self.cfg.retains else None
        self._table, self._sums, self._broken = None, None, torch.zeros_like(self._broken)
        self._skipped = not self.guard.allows(*(stats.plan.found_inf for stats in seen))
        if self._skipped:
            for layer in self._layers:  # no average is continued with what is not finite
                layer.kept.reset()
                layer.meta.reset()
                layer.uncount_held_step()
            return Applied(False, projection)
        self._norm = seen[-1].plan.norm
        self._schedule.optimizer.step()  # a scheduler warns where it is ahead of its optimizer
        self._schedule.step()
        return Applied(True, projection)

    def export_weights(self) -> ExportedWeights:
        """As they are; where they are bf16, they were rounded before the first update."""
        weights = {name: p.detach().float().cpu().clone().contiguous() for name, p in self.named.items()}
        return ExportedWeights(weights, rounded=self.cfg.bf16_weights)

    def save(self, folder: Path) -> None:
        """Write weights, optimizer state and what else the next update needs.

        Raises:
            UserError: the file cannot be written.
        """
        state = {
            "weights": {name: p.detach().cpu() for name, p in self.named.items()},
            "optimizers": [layer.optimizer.state_dict() for layer in self._layers],
            "kept": [layer.kept.state_dict() for layer in self._layers],
            "updates": self._schedule.last_epoch,
            "norm": None if self._norm is None else self._norm.cpu(),
        }
        save_tensors(state, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote."""
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.named.items():
                weight = state["weights"][name]
                if weight.shape != parameter.shape:
                    raise ValueError(f"{name} has another shape")
                parameter.copy_(weight)
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
        """A gradient of this layer has come."""
        layer = self._layers[number]
        layer.missing -= 1
        if layer.missing == 0:
            self._complete(layer)

    @torch.no_grad()
    def _complete(self, layer: Layer) -> None:
        """All gradients of a layer have come."""
        gradients = layer.gradients()
        if self._capturing is None:
            self._update(layer, gradients)
        else:
            if self._capturing == "retain":
                buffer = layer.kept
                buffer.store(gradients)
            else:
                buffer = layer.meta
                buffer.add(gradients)
            assert buffer.finite is not None
            self._note_broken(1.0 - buffer.finite.float())
        layer.free()

    def _update(self, layer: Layer, gradients: list[Tensor]) -> None:
        """Project, clip and step one layer."""
        cfg = self.cfg
        if layer.moments is not None:
            layer.moments.fetch(self._device)
        retain = layer.kept.on(self._device) if layer.kept.is_filled else None
        segments = per_tensor(gradients)
        second = layer.second_moments() if cfg.retains and cfg.surgery.metric == "optimizer" else None
        table = surgery_dots(gradients, retain, segments, second_moment=second, eps=cfg.optimizer.adam_epsilon)
        self._table = self._noted(self._table, layer, table)
        plan = self._plan(layer, table)
        if layer.meta.is_filled:
            retain, plan = self._added(layer, gradients, retain, plan)
        layer.optimizer.param_groups[0]["lr"] = self.learning_rate
        layer.optimizer.step(retain=retain, plan=plan, segments=segments)
        layer.held = plan.found_inf
        self._note_broken(plan.found_inf.reshape(()))
        layer.kept.free()
        layer.meta.free()
        if layer.moments is not None:
            layer.moments.put_back()

    def _added(
        self, layer: Layer, gradients: list[Tensor], retain: list[Tensor] | Quantized | None, plan: SurgeryPlan
    ) -> tuple[list[Tensor] | Quantized, SurgeryPlan]:
        """Project now, so that the step can add the meta term's gradient where the retain gradient goes."""
        segments, meta = per_tensor(gradients), layer.meta.on(self._device)
        surgery_apply(gradients, retain, segments, plan)
        table = surgery_dots(gradients, meta, segments)
        self._sums = self._noted(self._sums, layer, table)
        added = self.add.plan(table, 1.0, None)
        return meta, added._replace(found_inf=torch.maximum(added.found_inf, plan.found_inf))

    def _plan(self, layer: Layer, table: Tensor) -> SurgeryPlan:
        """Coefficients of the layer's tensors; the scale of the clipping; and no step where something before it was not
        finite."""
        first = self._norm is None
        plan = self.project.plan(table, layer.kept.bias_correction, self.clip.limit if first else None)
        if self.clip.limit and self._norm is not None:
            plan = plan._replace(scale=plan.scale * clip_scale(self._norm, self.clip).to(plan.scale.dtype))
        return plan._replace(found_inf=torch.maximum(plan.found_inf, self._broken))

    def _seen(self) -> list[SurgeryStats]:
        """What the passes of the backward pass that has just ended saw, all layers together."""
        assert self._table is not None, "apply() before backward()"
        plan = self.project.plan(self._table, self._layers[0].kept.bias_correction, None)
        plan = plan._replace(found_inf=torch.maximum(plan.found_inf, self._broken))
        seen = [SurgeryStats(self._table, plan)]
        if self._sums is not None:
            seen.append(SurgeryStats(self._sums, self.add.plan(self._sums, 1.0, None)))
        return seen

    def _note_broken(self, flag: Tensor) -> None:
        self._broken = torch.maximum(self._broken, flag)

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
