"""Draws the pictures of the toy corpus: panels of tiles, each with 1 to 6 stripes or of some kind.

A picture is 112 x 112 px: 4 x 4 tiles of 28 px. A vision tower with 14 px patches and 2 x 2 merging
turns a tile into one token, and a picture is one attention window of 8 x 8 patches.

A randomly initialized model learns such pictures in minutes because their normalized pixels are
nearly uncorrelated: square waves of different frequencies are close to orthogonal, half of a tile is
ink, and the background has the mean colour that the normalization subtracts. (Digits or thin shapes
on white differ in a few per cent of the first layer's input, and a small model does not learn to
distinguish them within an hour.) So are the random checks of the kinds.
"""

import functools
import io
import random
from typing import NamedTuple

import numpy as np
from PIL import Image

TILE = 28  # px
SIDE = 4  # tiles
MOST_STRIPES = 6  # in a tile
_CHECKS = 7  # along the side of a tile of some kind
PAPER = (123, 117, 104)  # the mean colour of CLIP's normalisation, which Qwen2.5-VL uses
INKS = {  # bright, so that stripes are visible in all
  "white": (255, 255, 255),
  "red": (255, 90, 90),
  "green": (90, 255, 90),
  "blue": (110, 110, 255),
  "yellow": (255, 255, 60),
  "pink": (255, 100, 255),
  "cyan": (60, 255, 255),
}


class Panel(NamedTuple):
  """A block of tiles: its name in steps, score of a tile, ink, position and size in tiles."""

  name: str
  score: int  # 1 to 6
  ink: str
  row: int
  column: int
  rows: int
  columns: int
  kind: int | None = None  # of its tiles; None: as many stripes as they score


def draw_picture(panels: tuple[Panel, ...]) -> bytes:
  """Returns the PNG bytes of a 112 x 112 RGB picture of `panels` on the background."""
  picture = Image.new("RGB", (SIDE * TILE, SIDE * TILE), PAPER)
  for panel in panels:
    tile = _tile(panel.score, panel.ink, panel.kind)
    for row in range(panel.row, panel.row + panel.rows):
      for column in range(panel.column, panel.column + panel.columns):
        picture.paste(tile, (column * TILE, row * TILE))
  data = io.BytesIO()
  picture.save(data, "PNG", compress_level=1)
  return data.getvalue()


@functools.cache
def _tile(stripes: int, ink: str, kind: int | None) -> Image.Image:
  """Returns a tile with vertical stripes as wide as the black between them, or one of a kind."""
  if kind is None:
    inked = (np.arange(TILE) * 2 * stripes // TILE % 2 == 0)[:, None]
  else:
    checks = np.zeros(_CHECKS**2, bool)
    checks[random.Random(f"kind {kind}").sample(range(_CHECKS**2), _CHECKS**2 // 2)] = True
    size = TILE // _CHECKS
    inked = checks.reshape(_CHECKS, _CHECKS).repeat(size, 0).repeat(size, 1)[..., None]
  tile = np.broadcast_to(np.where(inked, INKS[ink], 0), (TILE, TILE, 3))
  return Image.fromarray(tile.astype(np.uint8))
