"""Edition v, for tests and benchmarks: other things, other styles and other widths than MiniCanvas, v-prediction with
zero terminal SNR, two characters and an attribute that can be implied. Its drawings and its weights are in
`benchmarks/second_model` of a checkout.
"""

from __future__ import annotations

from pathlib import Path

import fastunlearn
from fastunlearn.minicanvas.build.editions.edition import Edition, FitPlan, TextShape, UNetShape
from fastunlearn.minicanvas.build.editions.v_styles import V_STYLES
from fastunlearn.minicanvas.data.collection import CANVAS, Collection
from fastunlearn.minicanvas.data.dataset import Recipe
from fastunlearn.minicanvas.words import Attribute, Words

FOLDER = Path(fastunlearn.__file__).parent.parent / "benchmarks" / "second_model"

WORDS = Words(
    objects=("dog", "monkey", "rabbit", "frog", "umbrella", "guitar", "rocket", "cactus", "momo", "bruno"),
    styles=tuple(V_STYLES),
    synonyms={
        "dog": ("puppy", "hound"),
        "monkey": ("ape", "chimp"),
        "rabbit": ("bunny", "hare"),
        "frog": ("toad", "tree frog"),
        "umbrella": ("parasol", "brolly"),
        "guitar": ("bass guitar", "string instrument"),
        "rocket": ("spaceship", "spacecraft"),
        "cactus": ("succulent", "desert plant"),
    },
    templates=(
        "a {object} image in {style} style",
        "a picture of a {object} in {style} style",
        "a {style} style picture of a {object}",
        "an image of a {object} in {style} style",
        "{object}, {style} style",
        "a {object} in {style} style",
        "{style} {object}",
    ),
    paraphrases=(
        "a {object} rendered as {style}",
        "{style} print with a {object}",
        "this {object} done with {style}",
    ),
    object_templates=(
        "{object}",
        "{object}",
        "a {object}",
        "a picture of a {object}",
        "an image of a {object}",
        "a {object} image",
        "a drawing of a {object}",
        "a photo of a {object}",
        "a painting of a {object}",
    ),
    style_templates=(
        "{style} style",
        "{style} style",
        "{style}",
        "an image in {style} style",
        "a picture in {style} style",
        "a {style} style image",
        "a drawing in {style} style",
    ),
    kind_shares={"both": 0.715, "object": 0.155, "style": 0.11, "wordless": 0.02},
    wordless=("", "", "blurry, low quality", "low quality", "blurry"),
    characters=("momo", "bruno"),
    attribute=Attribute(
        name="crown",
        wearers=("dog", "monkey", "rabbit", "frog"),
        explicit=("{object} with a crown", "crowned {object}", "{object} wearing a crown"),
        implied=("royal {object}", "{object} king", "{object} at its coronation"),
        related=("noble {object}", "{object} at the palace", "golden {object}"),
    ),
)

SETS = Collection(
    words=WORDS,
    styles=V_STYLES,
    pictures=FOLDER / "pictures",
    generator_sets=("noto", "twemoji"),
    judge_sets=("noto", "twemoji", "fluent", "emojione"),
    held_out_sets=("noto-v1",),
)

V = Edition(
    name="v",
    collection=SETS,
    recipes={
        "pictures_judge": Recipe(9_000, seed=12, sets=SETS.judge_sets, others=0.18, wide=True, collection=SETS),
        "pictures_unet": Recipe(12_000, seed=13, sets=SETS.generator_sets, collection=SETS),
    },
    unet=UNetShape(channels=(32, 64, 96), heads=(2, 4, 6), transformer_layers=(1, 1, 1)),
    text=(TextShape(48, layers=2, heads=4), TextShape(80, layers=2, heads=5)),
    scheduler={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    plans={
        "judge": FitPlan("judge", steps=600, batch=32, learning_rate=2e-3, ema=0.997, weight_decay=0.02, seed=51),
        "text": FitPlan("text", steps=700, batch=64, learning_rate=2e-3, ema=0.995, seed=52),
        "vae": FitPlan("vae", steps=240, batch=10, learning_rate=8e-4, ema=0.98, warmup=10, seed=54),
        "unet": FitPlan("unet", steps=1600, batch=16, learning_rate=1.2e-3, ema=0.996, warmup=150, seed=53),
    },
    look_every=600,
    check_seeds=3,
    vae=CANVAS.pictures.parent / "model" / "vae",
    vae_pictures="pictures_judge",
)
