"""dreslcl: slide representations learnt from whole-slide images and their pathology reports.

Public names resolve on first use, so that `import dreslcl` loads neither torch nor OpenCLIP.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for editors and type checkers
    from .bank import MemoryBank as MemoryBank
    from .cohort import Cohort as Cohort
    from .common import DreslclError as DreslclError
    from .embedding import embed as embed
    from .embedding import load as load
    from .encoder import Encoder as Encoder
    from .evaluation import evaluate as evaluate
    from .formats import Embeddings as Embeddings
    from .model import AGGREGATORS as AGGREGATORS
    from .model import DRESLCL as DRESLCL
    from .model import Aggregator as Aggregator
    from .model import Bag as Bag
    from .model import residual_sums as residual_sums
    from .slide import Slide as Slide
    from .tiles import TileGrid as TileGrid
    from .tiles import tile_slides as tile_slides
    from .tissue import tissue_mask as tissue_mask
    from .trainer import pretrain as pretrain

__version__ = "0.1.0"

_MODULE_OF = {
    "Cohort": "cohort",
    "DRESLCL": "model",
    "DreslclError": "common",
    "Embeddings": "formats",
    "embed": "embedding",
    "Encoder": "encoder",
    "MemoryBank": "bank",
    "AGGREGATORS": "model",
    "Aggregator": "model",
    "Bag": "model",
    "Slide": "slide",
    "TileGrid": "tiles",
    "evaluate": "evaluation",
    "load": "embedding",
    "pretrain": "trainer",
    "residual_sums": "model",
    "tile_slides": "tiles",
    "tissue_mask": "tissue",
}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dreslcl' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
