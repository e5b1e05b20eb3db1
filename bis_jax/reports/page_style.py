"""The look that the result pages share: one style sheet (page.css), and pieces of HTML.

Pages are whole by themselves: no script library, no font, style or image from anywhere else. They
follow the reader's light or dark setting.
"""

import base64
import html
import io
import pathlib
from collections.abc import Sequence

from bis_jax import images

# Files of these formats at most this large go into a page as they are; others are redrawn.
_SHOWN_AS_IS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
_AS_IS_BYTES = 40_000
_LONGEST_SIDE = 560

CSS = pathlib.Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def document(title: str, body: str, body_class: str = "") -> str:
  """Returns a whole HTML page; `body` is HTML, `title` is plain text."""
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
    f'<body class="{body_class}">\n{body}\n</body>\n</html>\n'
  )


def table(headings: Sequence[str], rows: Sequence[str]) -> str:
  """Returns a card with a table; headings are plain text, rows HTML from <tr> to </tr>."""
  head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
  return (
    f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


def figure(png: bytes, caption: str) -> str:
  """Returns a figure that holds the picture itself; the caption is plain text."""
  words = html.escape(caption)
  return (
    f'<figure><img alt="{words}" src="{data_uri(png, "png")}">'
    f"<figcaption>{words}</figcaption></figure>"
  )


def data_uri(encoded: bytes, kind: str) -> str:
  """Returns an image's bytes as a data: address; `kind` is the part after image/."""
  return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def thumbnail(encoded: bytes) -> tuple[bytes, str]:
  """Returns (bytes, kind) of an image for a page: small files as they are, others redrawn.

  Redrawn means WebP, at most 560 pixels a side, transparent parts on white. Raises
  `images.ImageError` if the bytes are no image.
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
