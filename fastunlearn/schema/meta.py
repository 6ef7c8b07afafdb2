"""The ``[meta]`` section, its weights, and the released ones. Its rules are in ``config/meta_rules.py``."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from fastunlearn.schema.fields import ConfigModel, GradientDtype, NonNegativeFloat, PathStr, PositiveFloat, PositiveInt

STEPS_PER_ATTACK = 20
SETS = ("forbidden", "related", "unrelated")


class MetaConfig(ConfigModel):
    """Meta-Unlearning (arXiv 2410.12777): the erased concept resists being fine-tuned back in."""

    enabled: bool = False
    """Add the meta term to the method's updates."""
    every: PositiveInt = 1
    """Updates from one meta term to the next."""
    order: Literal["first", "second"] = "first"
    """first: the gradient at the attacked weights, as it is; second: through the attack, for small models and SGD."""
    inner_steps: PositiveInt = 4
    """Steps of the simulated fine-tuning."""
    inner_optimizer: Literal["adamw", "sgd"] = "adamw"
    """Its optimizer, with a fresh state whenever it starts."""
    inner_learning_rate: PositiveFloat | None = None
    """Its learning rate; none: train.learning_rate, as published."""
    inner_scope: Literal["full", "trained", "lora"] = "full"
    """What it changes: all weights, as an attacker would; only what the run trains; or low-rank adapters."""
    restart_every: PositiveInt | None = None
    """Meta terms until the simulated attacker starts again from the weights as they are. 1: each time, as published.
    Above, it continues from where it was: restart_every x inner_steps steps, at two to three copies more. None given:
    20; 1 for inner_scope "lora" and in second order, which always start again."""
    inner_batch_size: PositiveInt = 4
    """Pictures in each of its steps, on each rank."""
    lora_rank: PositiveInt = 4
    """Rank of the adapters of inner_scope "lora"."""
    batch_size: PositiveInt = 4
    """Pictures of each set in the losses before and after the attack, on each rank."""
    forbidden_loss: Literal["erased", "ascent"] = "erased"
    """What the attacked model shall do on forbidden pictures. erased: predict what the original predicts once the
    concept is removed from the prompt, and beyond. ascent: have a large loss, as published; it has no bound, so give it
    a small forbidden_weight, such as 0.1."""
    negative_guidance: NonNegativeFloat = 1.0
    """erased: how far beyond the prompt without the concept the goal lies, a + g (a - c) instead of a."""
    coefficients: Literal["tied", "released"] = "tied"
    """tied: the loss on what must be kept enters as the difference of before and after, so that nothing is pushed away
    from it unless somebody attacks. released: the five coefficients of the published script, as it reads them, and its
    ascent."""
    forbidden_weight: NonNegativeFloat = 1.0
    """Weight of the forbidden loss after the attack."""
    related_weight: NonNegativeFloat = 0.1
    """Weight of the difference on what is related to the concept."""
    unrelated_weight: NonNegativeFloat = 0.01
    """Weight of the difference on what is not."""
    gradient_dtype: Literal["auto", GradientDtype] = "auto"
    """How the term's gradient waits for the method's; auto: as it came. Under engine "fused" int8 is the smallest, but
    the difference of before and after is then one of rounded numbers."""
    timesteps: Literal["uniform", "key"] = "uniform"
    """Timesteps of the losses: all, or that of the update's key step. The attack's are always uniform."""
    num_images: Annotated[int, Field(ge=2)] = 32
    """Pictures in each set. The attack trains on the first half of the forbidden ones, the losses take the others."""
    forbidden_prompts: list[str] = Field(default_factory=list)
    """Prompts of the forbidden pictures; none given: those of the concepts (prompts.templates)."""
    related_prompts: list[str] = Field(default_factory=list)
    """Prompts of related pictures; none given: the kept concepts of the same kind."""
    unrelated_prompts: list[str] = Field(default_factory=list)
    """Prompts of unrelated pictures; none given: the kept concepts of the other kind."""
    forbidden_folder: PathStr | None = None
    """Images with captions instead of forbidden_prompts."""
    related_folder: PathStr | None = None
    """Images with captions instead of related_prompts."""
    unrelated_folder: PathStr | None = None
    """Images with captions instead of unrelated_prompts."""

    @property
    def ascends(self) -> bool:
        """Whether the forbidden loss is pushed up, not pulled down."""
        return self.forbidden_loss == "ascent" or self.coefficients == "released"

    @property
    def steps_per_attack(self) -> int:
        """``restart_every``, with its default."""
        starts_again = self.inner_scope == "lora" or self.order == "second"
        return self.restart_every or (1 if starts_again else STEPS_PER_ATTACK)


class MetaWeights(NamedTuple):
    """What each loss counts for; each is a mean over the samples of its set. Negative: pushed up."""

    before_related: float
    before_unrelated: float
    after_forbidden: float
    after_related: float
    after_unrelated: float


# As the argument parser of the published ESD script reads its own command line, where one flag stands three times and
# the last one wins; and a loss is the sum over three batches. What was meant is the default of the three weights.
RELEASED = MetaWeights(3 * 0.01, 3 * 0.1, 3 * -0.01, 3 * -1.0, 3 * -1.0)


def meta_weights(meta: MetaConfig) -> MetaWeights:
    """Of the five losses; ``forbidden_loss`` "erased" is pulled down, where "ascent" is pushed up."""
    if meta.coefficients == "released":
        return RELEASED
    forbidden, related, unrelated = meta.forbidden_weight, meta.related_weight, meta.unrelated_weight
    sign = -1.0 if meta.ascends else 1.0
    return MetaWeights(related, unrelated, sign * forbidden, -related, -unrelated)


def set_weights(meta: MetaConfig) -> dict[str, float]:
    """By set, whether its pictures are needed at all: the largest of its weights."""
    w = meta_weights(meta)
    sizes = (abs(w.after_forbidden), max(abs(w.before_related), abs(w.after_related)))
    return dict(zip(SETS, (*sizes, max(abs(w.before_unrelated), abs(w.after_unrelated))), strict=True))


def is_active(meta: MetaConfig) -> bool:
    """Whether the term has any influence; with all weights zero the run is that of the method alone, bit for bit."""
    return meta.enabled and any(meta_weights(meta))
