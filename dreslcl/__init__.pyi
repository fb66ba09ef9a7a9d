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

__version__: str
