"""Kept records against a plain reading of the rule: 200 random corpora, on 8 devices of 1, 2 or 4 processes.

  python -m benchmarks.selection_equality [--corpora=200]

Every corpus has three annotation files with invalid lines, unmeasured steps and, by turns, N of 1, 4, 7,
10, 16, 64 or not stated. Rules are drawn: strategy, fraction, alpha, tau, order, scope, policy. The
expected lines come from a loop over the JSON records, in Python floats. Results: benchmarks/RESULTS.md.
"""

import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_CORPORA = flags.DEFINE_integer("corpora", 200, "random corpora")
_RULES = 2  # of each corpus
_CONTINUATIONS = (1, 4, 7, 10, 16, 64, None)
_SPOILED = ("none", "range", "image", "text", "score", "json", "counts")


def draw(rng: random.Random, continuations: int | None) -> dict[str, list[str]]:
  """Returns the lines of the annotation files of a corpus, with many equal rollouts."""
  kinds = [[_step(rng, continuations) for _ in range(rng.randint(1, 9))] for _ in range(12)]
  return {
    name: [_line(rng, rng.choice(kinds), number) for number in range(rng.randint(1, 60))]
    for name in ("a", "b", "c")
  }


def _step(rng: random.Random, continuations: int | None) -> dict:
  if continuations is None:
    return {"step": "s", "score": rng.choice([0.0, 0.1, 0.25, 1 / 3, 0.7, 1.0, rng.random()])}
  if rng.random() < 0.05:
    return {"step": "s", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0}
  correct = rng.choice([0, rng.randint(0, continuations)])
  score = correct / continuations
  return {"step": "s", "score": score, "num_mc_correct": correct, "num_mc_total": continuations}


def _line(rng: random.Random, steps: list[dict], number: int) -> str:
  steps, spoiled = [dict(step) for step in steps], "none"
  record = {"image": "i.png", "question": f"q{number}", "steps_with_score": steps}
  if rng.random() < 0.15:
    spoiled = rng.choice(_SPOILED)
  step = rng.choice(steps)
  if spoiled == "range":
    step["score"] = rng.choice([1.5, -0.5])
  elif spoiled == "image":
    record["image"] = rng.choice([None, "", []])
  elif spoiled == "text":
    step["step"] = " "
  elif spoiled == "score":
    step["score"] = rng.choice([None, "many", "0.5"])
  elif spoiled == "counts":
    step["num_mc_total"], step["num_mc_correct"] = 16, 17
  record["spoiled"] = spoiled
  return json.dumps(record)[: -1 if spoiled == "json" else None]


def draw_rule(rng: random.Random) -> dict:
  """Returns keyword arguments of `rule.select`."""
  strategies = ("bis", "bis", "mixture_only", "reliability_only", "low_mc", "average_stepwise")
  return {
    "strategy": rng.choice(strategies),
    "fraction": rng.choice([0.05, 0.1, 0.25, 0.29, 0.5, 1.0]),
    "alpha": rng.choice([0.0, 0.05, 0.2]),
    "tau": rng.choice([0.0, 0.0, 1 / 16, 0.25, 0.3]),
    "order": rng.choice(["strict", "paper"]),
    "scope": rng.choice(["per_source", "global"]),
    "unmeasured": rng.choice(["negative", "ignore"]),
    "reliability_if_no_positive": rng.choice([1.0, 1.0, 0.3]),
  }


def expected(files: dict[str, list[str]], rule: dict) -> dict[str, list[int]]:
  """Returns the kept lines of each file by a loop over its records."""
  ranked = []  # (score, file, line, is written)
  for name, lines in files.items():
    for number, line in enumerate(lines):
      try:
        record = json.loads(line)
      except ValueError:
        continue
      if rule["order"] == "strict" and record["spoiled"] != "none":
        continue
      steps = record["steps_with_score"]
      scored = [(_number(s["score"]), s.get("num_mc_total")) for s in steps]
      scores = [
        score
        for score, total in scored
        if score is not None and not (rule["unmeasured"] == "ignore" and total == 0 and score == 0)
      ]
      if scores:
        whole = all(score is not None for score, _ in scored)
        written = bool(record["image"]) and whole and all(s["step"].strip() for s in steps)
        ranked.append((_score(scores, rule), name, number, written))
  groups = [files] if rule["scope"] == "global" else [[name] for name in files]
  kept = {name: [] for name in files}
  for group in groups:
    rows = [row for row in ranked if row[1] in group]
    if not rows:
      continue
    quota = max(1, int(len(rows) * rule["fraction"]))
    best = sorted((r for r in rows if r[0] is not None), key=lambda r: r[0], reverse=True)[:quota]
    for _, name, number, written in best:
      if written or rule["order"] == "strict":
        kept[name].append(number)
  return {name: sorted(numbers) for name, numbers in kept.items()}


def _number(value) -> float | None:
  try:
    return float(value)
  except (TypeError, ValueError):
    return None


def _score(scores: list[float], rule: dict) -> float | None:
  positive = [score for score in scores if score > rule["tau"]]
  total = spread = 0.0
  for score in positive:
    total += score
  for score in scores:
    spread += score * (1.0 - score)
  p = len(positive) / len(scores)
  reliability = total / len(positive) if positive else rule["reliability_if_no_positive"]
  return {
    "bis": (p * (1.0 - p) + rule["alpha"]) * reliability,
    "mixture_only": p * (1.0 - p),
    "reliability_only": reliability,
    "low_mc": -reliability if positive else None,
    "average_stepwise": spread / len(scores),
  }[rule["strategy"]]


def work(folder: str, process: int, processes: int, address: str) -> None:
  """Prints the kept lines of every corpus and rule, selected on all devices of all processes."""
  import jax

  if processes > 1:
    jax.distributed.initialize(address, processes, process)
  from bis_jax.corpus.score_table import ScoreTable
  from bis_jax.errors import UserError
  from bis_jax.selection import cut
  from bis_jax.selection.rule import select

  cut.BLOCK = 37
  found = []
  for path in sorted(pathlib.Path(folder).glob("*.npz")):
    table = ScoreTable.load(path)
    for rule in json.loads(path.with_suffix(".json").read_text()):
      try:
        manifest = select(table, devices=True, **rule)
        found.append({s.name: s.lines.tolist() for s in manifest.sources})
      except UserError:
        found.append({name: [] for name in table.source_names})
  print(json.dumps([jax.device_count(), found]))


def main(_) -> None:
  """Prints how many selections are equal."""
  from bis_jax.corpus.scan import scan

  rng, wanted = random.Random(0), []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for at in range(_CORPORA.value):
      files = draw(rng, _CONTINUATIONS[at % len(_CONTINUATIONS)])
      (folder / "annotations").mkdir(exist_ok=True)
      for source, lines in files.items():
        (folder / f"annotations/{source}.jsonl").write_text("\n".join(lines) + "\n")
      scan(folder / "annotations").table().save(folder / f"{at:04d}.npz")
      rules = [draw_rule(rng) for _ in range(_RULES)]
      (folder / f"{at:04d}.json").write_text(json.dumps(rules))
      wanted += [expected(files, rule) for rule in rules]
    for processes in (1, 2, 4):
      started = time.perf_counter()
      answers = [json.loads(text.splitlines()[-1]) for text in _run(folder, processes)]
      same = [sum(map(dict.__eq__, found, wanted)) for _, found in answers]
      print(
        f"Python {sys.version.split()[0]}, {processes} processes, {answers[0][0]} devices: equal "
        f"selections on each process {same} of {len(wanted)} ({time.perf_counter() - started:.0f} s)"
      )
      if any(count != len(wanted) for count in same):
        raise SystemExit("NOT EQUAL")


def _run(folder: pathlib.Path, processes: int) -> list[str]:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  flag = f"--xla_force_host_platform_device_count={8 // processes}"
  code = f"from benchmarks.selection_equality import work; work({str(folder)!r}, "
  started = [
    subprocess.Popen(
      [sys.executable, "-c", f"{code}{process}, {processes}, {address!r})"],
      env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      text=True,
    )
    for process in range(processes)
  ]
  return [process.communicate()[0] for process in started]


if __name__ == "__main__":
  app.run(main)
