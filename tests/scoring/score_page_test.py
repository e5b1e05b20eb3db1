"""The server's page in a real browser: it scores what is dropped and pasted, and loads nothing."""

import re

from bis_jax.reports import page
from bis_jax.scoring import server
from tests.served import Lengths, Served, png

# What a person does on the page: drops an image, fills in the texts, and presses the button.
ACTS = """
<script>
const bytes = Uint8Array.from(atob("PNG"), (c) => c.charCodeAt(0));
const dropped = new DataTransfer();
dropped.items.add(new File([bytes], "a.png", { type: "image/png" }));
document.dispatchEvent(
  new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
at("question").value = "How many?";
at("solution").value = "SOLUTION";
setTimeout(() => at("score").click(), 300);
</script>
"""


def shown(browse, monkeypatch, solution):
  """Returns (DOM, console messages) of the page after the acts."""
  acts = ACTS.replace("PNG", png()).replace("SOLUTION", solution)
  monkeypatch.setattr(
    server.page, "render", lambda *args, _render=page.render, **kw: _render(*args, **kw) + acts
  )
  served = Served(Lengths())
  found = browse(f"http://127.0.0.1:{served.port}/")
  served.stop()
  return found


def test_the_page_loads_nothing_from_elsewhere():
  text = page.render("score.html", title="Step scores", model="lengths")
  assert "lengths: the probability" in text
  assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|https?://""", text)


def test_steps_are_coloured_by_their_scores(browse, monkeypatch):
  dom, console = shown(browse, monkeypatch, "a" * 20 + "\\n\\n" + "b" * 900)
  assert not console
  assert re.findall(r'class="step" style="--score: ?([\d.]+);?"', dom) == ["0.0200", "0.9000"]
  assert re.findall(r'class="score">([\d.]+)<', dom) == ["0.02", "0.90"]
  assert "min 0.020   product 0.018   last 0.900   mean 0.460" in dom
  assert dom.count('<img src="data:image/png;base64,') == 1


def test_what_the_server_refuses_is_said_on_the_page(browse, monkeypatch):
  dom, console = shown(browse, monkeypatch, "c" * 1001)
  assert re.search(r'id="state"[^>]*>too long<', dom)
  assert 'class="step"' not in dom and not [line for line in console if "Uncaught" in line]
