"""Renders the result pages from the Jinja2 templates of this folder.

A page loads nothing: style sheet, scripts and images are part of it.
"""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from etils import epath

from bis_jax import files, images

# Files of these formats at most this large go into a page as they are; others are redrawn.
_SHOWN_AS_IS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
_AS_IS_BYTES = 40_000
_LONGEST_SIDE = 560

_TEMPLATES = pathlib.Path(__file__).with_name("templates")


def percent(value: float | None) -> str:
  return "\N{EN DASH}" if value is None else f"{100 * value:.2f}"


class Table(NamedTuple):
  """A table of text; a cell that is a pair has its second text in small print."""

  headings: Sequence[str]
  rows: Sequence[Sequence[str | tuple[str, str]]]


def render(template: str, *folders: pathlib.Path, **content: Any) -> str:
  """Returns a template filled in; `folders` are searched before the package's own."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader([*folders, _TEMPLATES]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
  environment.filters |= {"percent": percent, "thousands": "{:,}".format}
  return environment.get_template(template).render(content)


def write(
  path: epath.PathLike,
  template: str,
  *folders: pathlib.Path,
  figures: Mapping[str, bytes] | None = None,
  plots: epath.PathLike = "",
  **content: Any,
) -> None:
  """Writes a page; `figures` are PNGs, shown on the page and also written as `plots`/NAME.png."""
  shown = {}
  for name, png in (figures or {}).items():
    shown[name] = data_uri(png, "png")
    with files.replacing(epath.Path(plots) / f"{name}.png") as file:
      file.write(png)
  files.write_text(path, render(template, *folders, figures=shown, **content))


def data_uri(encoded: bytes, kind: str) -> str:
  """Returns an image's bytes as a data: address; `kind` is the part after image/."""
  return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def thumbnail(encoded: bytes) -> tuple[bytes, str]:
  """Returns (bytes, kind) of an image for a page: small files as they are, others redrawn.

  Redrawn means WebP, at most 560 pixels per side, transparent parts on white. Raises ImageError.
  """
  with images.opened(encoded) as image:
    if image.format in _SHOWN_AS_IS and len(encoded) <= _AS_IS_BYTES:
      return encoded, _SHOWN_AS_IS[image.format]
    image.draft("RGB", (_LONGEST_SIDE, _LONGEST_SIDE))  # a JPEG is decoded no larger than needed
    shown = images.upright_rgb(image)
  shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
  small = io.BytesIO()
  shown.save(small, "WEBP", quality=80, method=2)
  return small.getvalue(), "webp"
