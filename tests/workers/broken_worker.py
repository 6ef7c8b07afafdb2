"""A training in which something breaks after its last update. Started by test_missing_results.py; not a test itself.

Usage: broken_worker.py WHAT [options of train.py].
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastunlearn.utils.environment import prepare_environment


def base_gone() -> None:
    """The disk with the model is unmounted as soon as the weights are safe."""
    from fastunlearn.training import trainer

    real = trainer.keep_weights

    def keep(cfg: Any, weights: Any) -> Any:
        place = Path(cfg.model.pretrained_model_name_or_path)
        place.rename(place.with_name("unmounted"))
        return real(cfg, weights)

    setattr(trainer, "keep_weights", keep)  # noqa: B010 (mypy knows its type)


def full_folder() -> None:
    """The output folder takes no more weights, and no U-Net."""
    from fastunlearn.export import results
    from fastunlearn.export.formats import delta, unet

    tempfile.tempdir = os.environ["TMPDIR"]  # a forked process remembers another
    real = results.write_delta

    def write(weights: Any, path: Path, metadata: Any) -> None:
        if "out" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(weights, path, metadata)

    for module in (results, delta):
        setattr(module, "write_delta", write)  # noqa: B010 (mypy knows its type)
    unet.write_unet = fails


def no_pictures() -> None:
    """Drawing needs more memory than there is."""
    from fastunlearn.export import results

    results.before_after = fails


def no_scores() -> None:
    """The evaluation fails, which this model would not even have."""
    from fastunlearn.export import results

    results.why_not_evaluated = lambda cfg: None
    results.evaluate_pair = fails


def often() -> None:
    """A run that counts as long: it saves its state by itself."""
    from fastunlearn.training import saving

    saving.INTERVAL_SECONDS = 0.0


def often_without_base() -> None:
    """Both."""
    often()
    base_gone()


def fails(*arguments: object, **options: object) -> NoReturn:
    """What breaks."""
    raise RuntimeError("CUDA out of memory, say\nwith more lines")


WHAT: dict[str, Callable[[], None]] = {
    made.__name__: made for made in (base_gone, full_folder, no_pictures, no_scores, often, often_without_base)
}

if __name__ == "__main__":
    prepare_environment(1)
    WHAT[sys.argv[1]]()
    del os.environ["RANK"]  # for the program itself to find that it is alone
    from fastunlearn.train import main

    sys.exit(main(sys.argv[2:]))
