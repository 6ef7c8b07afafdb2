"""What a run will need of memory, before any weights are loaded.

The table of the rank that needs most, for one configuration: the sum of the rows that engine, teacher, method and meta
term report, and of activations as ``activations.py`` measures them, without weights. On a GPU the CUDA context,
convolution workspaces and the allocator's fragments come on top (``ALLOWANCE``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from fastunlearn.config import Config, resolved_scope
from fastunlearn.config.base import named_concepts
from fastunlearn.config.run_prompts import folder_captions, meta_texts, preserve_prompts, retain_prompts, set_captions
from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.engines.optimizers.groups import parameter_groups
from fastunlearn.meta.memory import attack_rows, pool_sizes
from fastunlearn.methods.tables import build_method
from fastunlearn.models.description import ModelDescription
from fastunlearn.models.parameter_names import is_small, layer_of, text_projections, trainable_names
from fastunlearn.models.text.neighbours import with_expected_neighbours
from fastunlearn.planning.activations import Activations, Shape, build_unet, measure
from fastunlearn.planning.edits import edit_rows, mean_rows
from fastunlearn.planning.unet_calls import count_evaluations, pools
from fastunlearn.progress.prompts import picture_count, probe_texts
from fastunlearn.prompts.variants import build_prompt_table
from fastunlearn.schema.attention_rules import UNFUSED
from fastunlearn.schema.meta import meta_weights, set_weights
from fastunlearn.utils.dtypes import DTYPES
from fastunlearn.utils.memory_rows import FP32, Row, Sizes, peak, totals
from fastunlearn.utils.text import GIB

# What a GPU's driver and libraries take for themselves; a rule of thumb, not measured here.
ALLOWANCE = GIB


@dataclass(frozen=True)
class Plan:
    """The result for one configuration."""

    cfg: Config
    world: int
    sizes: Sizes
    rows: list[Row]
    loading: int
    evaluations: Evaluations
    changes: tuple[str, ...] = ()
    """What was changed to get here, as command-line options."""

    @property
    def phases(self) -> dict[str, tuple[int, int]]:
        """(device, host) bytes in each phase."""
        return totals(self.rows)

    @property
    def device(self) -> int:
        """Bytes on each device at the peak."""
        return peak(self.rows)[0]

    @property
    def host(self) -> int:
        """Bytes of each rank on the host at the peak."""
        return max(peak(self.rows)[1], self.loading)

    def fits(self, limit: int) -> bool:
        """Whether it stays below ``limit`` bytes with the allowance."""
        return self.device + ALLOWANCE <= limit


def make_plan(cfg: Config, world: int, model: ModelDescription, changes: tuple[str, ...] = ()) -> Plan:
    """The plan of one configuration on this many ranks."""
    given, cfg = cfg, with_expected_neighbours(cfg)
    scope = resolved_scope(cfg)
    sizes = unet_sizes(model, scope)
    if not cfg.trains:
        prompts = build_prompt_table(named_concepts(cfg), cfg.prompts, cfg.seed, preserve_prompts(cfg)).texts
        rows = edit_rows(cfg, sizes, len(prompts), model.tokens, model.text_width)
        return Plan(given, world, sizes, rows, model.loading, count_evaluations(cfg, world), changes)
    gradients = cfg.engine_spec.gradients_of_one_pass(cfg, sizes, world)
    rows = [
        *cfg.engine_spec.memory_rows(cfg, sizes, world), *mean_rows(cfg, sizes), *attack_rows(cfg, sizes),
        *_latents_and_text(cfg, model), *activation_rows(cfg, model, scope, gradients),
    ]  # fmt: skip
    rows = [row for row in rows if row.device or row.host]
    return Plan(given, world, sizes, rows, model.loading, count_evaluations(cfg, world), changes)


@lru_cache(maxsize=16)
def unet_sizes(model: ModelDescription, scope: str) -> Sizes:
    """The U-Net's tensors in the groups of its optimizer."""
    unet = build_unet(model.config)
    names = set(trainable_names(unet, scope))
    groups = parameter_groups((name, p) for name, p in unet.named_parameters() if name in names)
    layers: dict[str, list[int]] = {}
    for name, parameter in unet.named_parameters():
        if name in names and not is_small(parameter.numel()):
            layers.setdefault(layer_of(name, parameter.numel()), []).append(parameter.numel())
    return Sizes(
        tuple((group["bits"], tuple(p.numel() for p in group["params"])) for group in groups),
        tuple(p.numel() for name, p in unet.named_parameters() if name not in names),
        tuple(tuple(numels) for numels in layers.values()),
    )


def latent_side(cfg: Config, model: ModelDescription) -> int:
    """Side of the latents."""
    return model.latent_shape(cfg.train.resolution)[-1]


def _latents_and_text(cfg: Config, model: ModelDescription) -> list[Row]:
    """Prompt embeddings, pictures as latents, and what the method itself holds."""
    channels, side, _ = latent = model.latent_shape(cfg.train.resolution)
    pictures = 0
    retained: list[str] = []
    if cfg.retains and cfg.retain_source == "folder":
        retained = [caption for _, caption in folder_captions(cfg)]
        pictures = len(retained)
    elif cfg.retains:
        retained = retain_prompts(cfg)
    captions = [caption for pairs in set_captions(cfg).values() for _, caption in pairs]
    pictures += pools(cfg) * cfg.retain.num_images + pool_sizes(cfg)[0] + len(captions)
    others = [*meta_texts(cfg), *captions, *probe_texts(cfg)]
    texts = len(build_prompt_table(named_concepts(cfg), cfg.prompts, cfg.seed, retained, others).texts)
    width = DTYPES[cfg.weight_dtype].itemsize
    embeddings = texts * model.tokens * model.text_width * width
    pictures += 2 * picture_count(cfg)
    latents = pictures * math.prod(latent) * 4
    rows = [Row("prompt embeddings and latents", embeddings + latents)]
    if cfg.model.cache_prompt_keys:
        widths = sum(layer.weight.shape[0] for layer in text_projections(build_unet(model.config)))
        computed = DTYPES[cfg.compute_dtype].itemsize
        rows.append(Row("keys and values of the prompts", texts * model.tokens * widths * computed))
    if cfg.teacher.storage == "cached":
        indices = len({(step.concept, step.index) for step in build_method(cfg).table()})
        stored = 4 * indices * cfg.teacher.trajectories * math.prod(latent) * 4
        rows.append(Row("targets of the original model", host=stored))
    if cfg.stops_when_erased:
        trained = sum(unet_sizes(model, resolved_scope(cfg)).trained)
        rows.append(Row("weights of the best probe (fp32)", host=trained * FP32))
    own = cfg.method_spec.memory_rows(cfg, channels, side)
    rows += [Row(name, size) for name, size in own]
    return rows


def activation_rows(cfg: Config, model: ModelDescription, scope: str, gradients: int) -> list[Row]:
    """One row for each call of the U-Net. ``gradients``: bytes of other rows that come as activations go; a row has
    only what activations and they take beyond these at any one time."""
    peaks = _windows(cfg, model, scope, gradients).items()
    rows = [
        Row(f"activations at their peak ({name})", max(size - gradients, 0), phases=("backward",), windows=(name,))
        for name, size in peaks
    ]
    if cfg.has_meta:
        attacked = "full" if cfg.meta.inner_scope == "full" else scope
        attack = _activations(cfg, model, attacked, cfg.meta.inner_batch_size).backward
        rows.append(Row("activations at their peak (simulated attack)", attack, phases=("attack",)))
    return rows


def _windows(cfg: Config, model: ModelDescription, scope: str, gradients: int) -> dict[str, int]:
    """The peak of everything that calls the U-Net, by name, with the gradients where there are ``gradients``."""
    batch, retained, calls = cfg.train.train_batch_size, cfg.retain_batch_size, cfg.method_spec.calls(cfg)

    def run(rows: int) -> Activations:
        return _activations(cfg, model, scope, rows)

    def recorded(rows: int, beside: int) -> int:
        """``beside``: what is evaluated without a gradient while the student's graph waits."""
        student = run(rows)
        waiting = student.saved + (run(beside).forward if beside else 0)
        return max(student.together if gradients else student.backward, waiting)

    windows = {}
    if not cfg.closed_form:
        unlearning = recorded(calls.trained * batch, calls.beside * batch)
        windows = {"unlearning": unlearning, "trajectories": run(max(2, calls.teacher) * batch).forward}
    if cfg.retains:
        windows["retain"] = recorded(retained, retained if cfg.retain.target == "teacher" else 0)
    if cfg.has_meta:
        queries = sum(1 for weight in set_weights(cfg.meta).values() if weight) * cfg.meta.batch_size
        weights = meta_weights(cfg.meta)
        again = bool(weights.before_related or weights.before_unrelated)  # on top of the gradients after the attack
        windows["meta"] = run(queries).backward + gradients if again else recorded(queries, 0)
    if cfg.progress.enabled:
        windows["probes"] = run(2 * cfg.probe_batch_size).forward
    if cfg.method_spec.samples == "anchors" or (cfg.retains and cfg.retain_source != "folder"):
        windows["pictures"] = run(2 * retained).forward
    return windows


def _activations(cfg: Config, model: ModelDescription, scope: str, rows: int) -> Activations:
    shape = Shape(
        latent_side(cfg, model), model.tokens, DTYPES[cfg.weight_dtype], cfg.autocast,
        cfg.model.gradient_checkpointing, cfg.model.attention in UNFUSED,
    )  # fmt: skip
    return measure(model.unet, scope, rows, shape)
