"""The look that the result pages share: one style sheet, and pieces of HTML.

Pages are whole by themselves: no script library, no font, style or image from anywhere else. They
follow the reader's light or dark setting.
"""

import base64
import html
import io

from PIL import Image, ImageOps

# Files of these formats at most this large go into a page as they are; others are redrawn.
_SHOWN_AS_IS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
_AS_IS_BYTES = 40_000
_LONGEST_SIDE = 560

CSS = """
:root {
  color-scheme: light dark;
  --page: light-dark(#f6f6f4, #16181b); --card: light-dark(#ffffff, #1f2226);
  --ink: light-dark(#1d1f21, #e8e8e6); --quiet: light-dark(#63676b, #a2a6ab);
  --line: light-dark(#dededa, #363a40); --link: light-dark(#0b5fa5, #7cc0f5);
  --correct: light-dark(#0a8f6a, #2fc79a); --error: light-dark(#cf4f0a, #ff8a4c);
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--page);
  color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: 1rem; margin: 0; } p { margin: .4rem 0; } .quiet { color: var(--quiet); }
small, .small { font-size: .82rem; } a { color: var(--link); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; }
.tile, .card, figure { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: .9rem 1.1rem; margin: 0; }
.tile b { display: block; font-size: 1.55rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: .8rem; }
figure img { width: 100%; display: block; background: #fff; border-radius: 6px; }
figcaption { color: var(--quiet); font-size: .85rem; margin-top: .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .4rem .5rem; font-size: .93rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11rem; } th { color: var(--quiet); font-weight: 600; }
td small { display: block; color: var(--quiet); }
.item { display: grid; grid-template-columns: minmax(10rem, 19rem) 1fr; gap: 1.1rem;
  margin-bottom: .9rem; }
.item .images img { max-width: 100%; max-height: 24rem; display: block; border-radius: 6px;
  background: #fff; margin-bottom: .5rem; }
.question { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 .7rem; }
ol.steps { list-style: none; margin: 0; padding: 0; display: grid; gap: .35rem; }
.step { --hue: color-mix(in oklab, var(--correct) calc(var(--score) * 100%), var(--error));
  display: grid; grid-template-columns: 1fr auto; gap: .8rem; padding: .45rem .7rem;
  border-left: 5px solid var(--hue); border-radius: 4px;
  background: color-mix(in oklab, var(--hue) 16%, var(--card)); }
.step .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.step .marks { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.step .score { font-weight: 650; } .label.correct { color: var(--correct); }
.label.error { color: var(--error); } .label.neutral { color: var(--quiet); }
.wrong { border: 1px solid currentColor; border-radius: 4px; padding: 0 .3rem; font-size: .78rem; }
.key { display: inline-block; width: 9rem; height: .7rem; border-radius: 4px; margin: 0 .4rem;
  background: linear-gradient(in oklab to right, var(--error), var(--correct)); }
@media (max-width: 46rem) { .item { grid-template-columns: 1fr; } }
"""


def document(title: str, body: str, extra_head: str = "") -> str:
  """Returns a whole HTML page; `body` and `extra_head` are HTML, `title` is plain text."""
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n{extra_head}</head>\n"
    f"<body>\n{body}\n</body>\n</html>\n"
  )


def data_uri(encoded: bytes, kind: str) -> str:
  """Returns an image's bytes as a data: address; `kind` is the part after image/."""
  return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def thumbnail(encoded: bytes) -> tuple[bytes, str]:
  """Returns (bytes, kind) of an image for a page: small files as they are, others redrawn.

  Redrawn means WebP, at most 560 pixels a side, transparent parts on white. Raises OSError (PIL's
  UnidentifiedImageError) where the bytes are no image.
  """
  with Image.open(io.BytesIO(encoded)) as image:
    if image.format in _SHOWN_AS_IS and len(encoded) <= _AS_IS_BYTES:
      return encoded, _SHOWN_AS_IS[image.format]
    shown = ImageOps.exif_transpose(image).convert("RGBA")
  shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
  sheet = Image.new("RGBA", shown.size, "white")
  sheet.alpha_composite(shown)
  small = io.BytesIO()
  sheet.convert("RGB").save(small, "WEBP", quality=82)
  return small.getvalue(), "webp"
