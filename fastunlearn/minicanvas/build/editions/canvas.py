"""MiniCanvas: the edition that the package ships."""

from __future__ import annotations

from fastunlearn.minicanvas.build.editions.edition import Edition, FitPlan, TextShape, UNetShape
from fastunlearn.minicanvas.data import collection
from fastunlearn.minicanvas.data.dataset import Recipe

SETS = collection.CANVAS

CANVAS = Edition(
    name="canvas",
    collection=SETS,
    recipes={
        "pictures_vae": Recipe(count=12_000, seed=1, others=0.35),
        "pictures_judge": Recipe(count=24_000, seed=2, sets=SETS.judge_sets, others=0.18, wide=True),
        "pictures_unet": Recipe(count=32_000, seed=3),
    },
    unet=UNetShape(channels=(32, 64, 128), heads=(2, 4, 8), transformer_layers=(1, 1, 2)),
    text=(TextShape(32, layers=2, heads=4), TextShape(64, layers=3, heads=4)),
    scheduler={},
    plans={
        "judge": FitPlan("judge", steps=2400, batch=32, learning_rate=2e-3, ema=0.998, weight_decay=0.02, seed=11),
        "vae": FitPlan("vae", steps=2400, batch=10, learning_rate=1.5e-3, ema=0.998, weight_decay=1e-4, seed=21),
        "text": FitPlan("text", steps=1500, batch=64, learning_rate=2e-3, ema=0.995, seed=31),
        "unet": FitPlan("unet", steps=4500, batch=24, learning_rate=1.2e-3, ema=0.999, warmup=200, seed=41),
    },
    look_every=600,
    check_seeds=10,
)
