"""The target of the demo: the shipped one, inflated to a size at which passes cost."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.errors import BundleError
from atspeed.training.inflated_export import inflate_export
from atspeed.training.inflation import SHAPES, InflationError

ROOT = Path(__file__).parents[3]
BUNDLE = ROOT / "bundles" / "movielens-100k"
GRAPH = ROOT / "bundles" / "movielens-100k-85m.onnx"  # `make demo-graph`
SHAPE = SHAPES["85m"]
FOLDER = ROOT / "var" / "demo"


def kept_place(bundle: Bundle, folder: Path) -> Path:
    """Return the folder of a bundle's inflation, which depends on the bundle and on the graph."""
    graph = hashlib.sha256(GRAPH.read_bytes()).hexdigest()
    return folder / f"{bundle.manifest.name}-85m-{bundle.manifest.version[:8]}-{graph[:8]}"


def larger_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Return the inflated bundle in `folder`, made if it is not there or is damaged. Older ones are removed.

    Raises InflationError when it cannot be written.
    """
    place = kept_place(bundle, folder)
    try:
        kept = Bundle(place)
        kept.verify()
    except BundleError:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        return kept
    try:
        return Bundle(inflate_export(bundle, GRAPH, SHAPE, place, label="85m"))
    except OSError as error:
        raise InflationError(f"{place}: not written, 340 MB: {error.strerror or error}") from error
