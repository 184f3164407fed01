"""Datasets, batches and image files.

`open_data` opens a `Dataset`: a folder of pictures, an archive, arrays, a data set of TFDS. `load` reads a data set of
TFDS into memory, as `Images`. `stream` and `batches` yield shuffled batches of any `Dataset`. `to_uint8` and
`from_uint8` convert between pixels and the floats in [-1, 1] that models work on. `save_npz` and `save_png` write
samples to files. `write_array_record` writes pictures to a file with fast random access. Grain, TFDS, scikit-learn,
Pillow and pyarrow are imported only by the functions that need them.
"""

from jaxguide.data.batches import batches, stream
from jaxguide.data.config import DataConfig, grown, open_data, split
from jaxguide.data.dataset import Batch, Dataset
from jaxguide.data.files import load_npz, save_npz, settings_of
from jaxguide.data.images import Images
from jaxguide.data.pictures import image_grid, save_png
from jaxguide.data.pixels import from_uint8, saturation, to_uint8
from jaxguide.data.sources import load
from jaxguide.data.sources.array_record import write_array_record

__all__ = [
  "Batch",
  "DataConfig",
  "Dataset",
  "Images",
  "batches",
  "from_uint8",
  "grown",
  "image_grid",
  "load",
  "load_npz",
  "open_data",
  "saturation",
  "save_npz",
  "save_png",
  "settings_of",
  "split",
  "stream",
  "to_uint8",
  "write_array_record",
]
