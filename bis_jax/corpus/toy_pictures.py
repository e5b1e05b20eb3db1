"""Draws the pictures of the embedded corpus: cards with a coloured frame and a black glyph.

A picture is 112 x 112 px: 4 x 4 cells of 28 px. A cell is what a vision tower with 14 px patches
and 2 x 2 merging turns into one token, so a card is one image token, and a picture is one
attention window of 8 x 8 patches.
"""

import functools
import io
import math
from typing import NamedTuple

from PIL import Image, ImageDraw

CELL = 28  # px
SIDE = 4  # cells
COLOURS = {
  "red": (220, 30, 30),
  "orange": (255, 150, 0),
  "yellow": (250, 230, 40),
  "green": (30, 150, 50),
  "cyan": (60, 215, 230),
  "blue": (40, 60, 220),
  "purple": (140, 40, 170),
  "pink": (250, 150, 200),
}
SHAPES = ("star", "disc", "ring", "square", "triangle", "diamond", "cross", "bar")
DIGITS = ("1", "2", "3", "4", "5", "6", "7", "8", "9")

_MARGIN = 1  # px of paper around a card
_FRAME = 5  # px, width of a card's frame
_BOX = (8, 7, 19, 20)  # px, the rectangle that a glyph fills: left, top, right, bottom
_INK = (0, 0, 0)
# Which of the segments top, upper left, upper right, middle, lower left, lower right, bottom are
# inked, as on a seven-segment display.
_SEGMENTS = {
  "1": "0010010",
  "2": "1011101",
  "3": "1011011",
  "4": "0111010",
  "5": "1101011",
  "6": "1101111",
  "7": "1010010",
  "8": "1111111",
  "9": "1111011",
}


class Card(NamedTuple):
  """One card: its cell (row and column, from 0), a key of COLOURS, and a shape, a digit or ""."""

  row: int
  column: int
  colour: str
  glyph: str


def draw_picture(cards: list[Card], paper: int) -> bytes:
  """Returns the PNG bytes of a 112 x 112 RGB picture of `cards` on grey paper of 0-255."""
  picture = Image.new("RGB", (SIDE * CELL, SIDE * CELL), (paper, paper, paper))
  for card in cards:
    stamp = _stamp(card.colour, card.glyph)
    picture.paste(stamp, (card.column * CELL + _MARGIN, card.row * CELL + _MARGIN))
  data = io.BytesIO()
  picture.save(data, "PNG", compress_level=1)
  return data.getvalue()


@functools.cache
def _stamp(colour: str, glyph: str) -> Image.Image:
  """Returns one card without its margin."""
  side = CELL - 2 * _MARGIN
  stamp = Image.new("RGB", (side, side), COLOURS[colour])
  draw = ImageDraw.Draw(stamp)
  draw.rectangle((_FRAME, _FRAME, side - 1 - _FRAME, side - 1 - _FRAME), fill="white")
  box = tuple(edge - _MARGIN for edge in _BOX)
  if glyph in _SEGMENTS:
    _draw_digit(draw, glyph, box)
  elif glyph:
    _draw_shape(draw, glyph, box)
  return stamp


def _draw_digit(draw: ImageDraw.ImageDraw, digit: str, box: tuple[int, ...]) -> None:
  left, top, right, bottom = box
  middle = (top + bottom) // 2
  thick = 2  # px beyond the first
  places = (
    (left, top, right, top + thick),
    (left, top, left + thick, middle),
    (right - thick, top, right, middle),
    (left, middle - 1, right, middle + 1),
    (left, middle, left + thick, bottom),
    (right - thick, middle, right, bottom),
    (left, bottom - thick, right, bottom),
  )
  for place, inked in zip(places, _SEGMENTS[digit], strict=True):
    if inked == "1":
      draw.rectangle(place, fill=_INK)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, ...]) -> None:
  left, top, right, bottom = box
  x, y = (left + right) / 2, (top + bottom) / 2
  if shape == "disc":
    draw.ellipse(box, fill=_INK)
  elif shape == "ring":
    draw.ellipse(box, outline=_INK, width=3)
  elif shape == "square":
    draw.rectangle(box, fill=_INK)
  elif shape == "triangle":
    draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=_INK)
  elif shape == "diamond":
    draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=_INK)
  elif shape == "cross":
    draw.line([(left, top), (right, bottom)], fill=_INK, width=3)
    draw.line([(left, bottom), (right, top)], fill=_INK, width=3)
  elif shape == "bar":
    draw.rectangle((x - 2, top, x + 2, bottom), fill=_INK)
  elif shape == "star":
    radius = (bottom - top) / 2 + 1
    points = []
    for i in range(10):
      angle, reach = math.pi * i / 5, radius if i % 2 == 0 else 0.4 * radius
      points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    draw.polygon(points, fill=_INK)
  else:
    raise ValueError(f"no shape is called {shape!r}: use one of {SHAPES}")
