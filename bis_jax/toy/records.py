"""Pictures, rollouts and benchmark items of the toy corpus, some question groups at a time.

Random numbers depend on (seed, source, group) or (seed, source, first group of the task) alone, so
neither the number of processes nor their order changes what is drawn.
"""

import dataclasses
import json
import pathlib
import random

import numpy as np

from bis_jax.toy import policies
from bis_jax.toy.pictures import MOST_STRIPES, draw_picture
from bis_jax.toy.policies import Problems, Solutions
from bis_jax.toy.questions import SCORES, SOURCES, Kinds, Question, Scene, Source, ask, fact

# Slip rates of the policies that write the benchmark's solutions.
BENCHMARK_POLICIES = {"toy-policy-large": 0.08, "toy-policy-medium": 0.12, "toy-policy-small": 0.16}

# The least value of each setting.
_LEAST = {"rollouts": 60, "images": 20, "seed": 0, "benchmark_items": 18, "n_mc": 1}
_LEAST |= {"kinds": 0, "first_kind": 0, "kind_exponent": 0}
_LEAST |= {"rollouts_per_group": 1, "slip": 0, "recovery": 0, "lapse": 0, "continuation_slip": 0}
_TEXT_RECORDS = 400  # per call, for the tokenizer: enough for every word
_CAPTION_QUESTION = "What is to be seen?"
_INSTRUCTION = (
  "Your task is to answer the question below. Give step by step reasoning before you answer, and "
  'when you\'re ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\n'
)


@dataclasses.dataclass(frozen=True)
class Knobs:
  """The settings of a corpus; `slip`, `recovery` and `lapse` are factors on every source's rates.

  The solutions depend on neither n_mc, lapse, continuation_slip nor stop_at_zero.
  """

  rollouts: int = 48_000
  images: int = 16_000  # maximum; if there are more question groups, some share images
  seed: int = 0
  benchmark_items: int = 500
  n_mc: int = 16  # continuations per step
  rollouts_per_group: int = 3  # per question about a scene
  slip: float = 1.0  # of wrong notes
  recovery: float = 1.0  # of looking again
  lapse: float = 1.0  # of continuations whose answer is lost
  # A further factor on the wrong notes of continuations: their policy is weaker than the writer.
  continuation_slip: float = 1.0
  stop_at_zero: bool = False  # steps after one with MC score 0 stay unmeasured
  described: bool = False  # the question describes the picture; there is none: text alone
  kinds: int = 0  # of tile, see `Kinds`; 0: tiles with stripes
  first_kind: int = 0
  kind_exponent: float = 0.0  # of their frequencies in the corpus; the benchmark has all alike

  def __post_init__(self):
    for name, least in _LEAST.items():
      if getattr(self, name) < least:
        raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")
    for name in ("kinds", "first_kind"):
      if getattr(self, name) % MOST_STRIPES:
        raise ValueError(f"{name} is {getattr(self, name)}: give a multiple of {MOST_STRIPES}")


@dataclasses.dataclass(frozen=True)
class Groups:
  """Consecutive question groups of one source, and where their pictures go."""

  source: int  # index into SOURCES
  first: int  # the first group
  rollouts: int
  rollouts_per_group: int
  scenes: int  # of the source; group g is about scene g % scenes
  root: pathlib.Path  # folder of the pictures
  folder: str  # of the source's pictures in `root`
  prefix: str  # before `folder` in the records
  seed: str  # the output is a function of it alone
  kinds: Kinds
  described: bool = False  # see `Knobs`

  def rng(self) -> np.random.Generator:
    return np.random.default_rng([*self.seed.encode(), self.source, self.first])


@dataclasses.dataclass(frozen=True)
class Drawn:
  """The result of drawing some groups, as JSON lines, and some of its text for the tokenizer."""

  records: bytes
  truth: bytes
  captions: bytes
  texts: list[str]


@dataclasses.dataclass(frozen=True)
class _Asked:
  question: Question
  images: list[str]  # none if the text describes them
  text: str


def draw_rollouts(groups: Groups, knobs: Knobs) -> Drawn:
  """Draws pictures and returns VisualPRM400K records, the truth of their steps, and captions."""
  source = SOURCES[groups.source]
  asked, captions = _draw_and_ask(groups)
  owners = np.arange(groups.rollouts) // groups.rollouts_per_group
  problems = _problems([asked[i] for i in owners])
  writer = source.habits.scaled(slip=knobs.slip, again=knobs.recovery, lapse=knobs.lapse)
  continuer = writer.scaled(slip=knobs.continuation_slip)
  rng = groups.rng()
  solutions = policies.solve(rng, problems, writer)
  counts = policies.count_successes(rng, problems, solutions, continuer, knobs.n_mc)
  records, truths = [], []
  for row, owner in enumerate(owners):
    about = asked[owner]
    slots = np.flatnonzero(solutions.event[row])
    steps = _steps(source, about, solutions, row, slots)
    line = groups.first * groups.rollouts_per_group + row
    records.append(
      {
        "id": line,  # two rollouts may have the same text; a line must not repeat
        "image": about.images if len(about.images) > 1 else next(iter(about.images), None),
        "question": "<image>\n" * len(about.images) + _INSTRUCTION + about.text,
        "answer": str(about.question.answer),
        "response": "\n\n".join(steps),
        "num_mc_sequences": knobs.n_mc,
        "steps_with_score": _scored(steps, counts[row, slots].tolist(), knobs),
        "question_orig": about.text,
      }
    )
    truth = solutions.right[row, slots].astype(int).tolist()
    truths.append({"file": f"{source.name}.jsonl", "line": line, "truth": truth})
  some = records[:_TEXT_RECORDS]
  texts = [_CAPTION_QUESTION]
  texts += [text for record in some for text in (record["question_orig"], record["response"])]
  return Drawn(_json_lines(records), _json_lines(truths), _json_lines(captions), texts)


def draw_benchmark(groups: Groups) -> bytes:
  """Draws pictures and returns VisualProcessBench items, one per group, with true labels."""
  source = SOURCES[groups.source]
  asked, _ = _draw_and_ask(groups)
  rng = groups.rng()
  items: list[dict] = [{}] * len(asked)
  for start, (policy, slip) in enumerate(BENCHMARK_POLICIES.items()):
    mine = range(start, len(asked), len(BENCHMARK_POLICIES))
    problems = _problems([asked[i] for i in mine])
    solutions = policies.solve(rng, problems, dataclasses.replace(source.habits, slip=slip))
    for row, i in enumerate(mine):
      slots = np.flatnonzero(solutions.event[row])
      labels = np.where(solutions.right[row, slots], 1, -1)
      labels[solutions.event[row, slots] == policies.PREFACE] = 0
      items[i] = {
        "image": asked[i].images,
        "question": asked[i].text,
        "answer": str(asked[i].question.answer),
        "response": {
          "steps": _steps(source, asked[i], solutions, row, slots),
          "process_correctness": labels.tolist(),
        },
        "policy_model": policy,
        "data_source": source.benchmark,
      }
  return _json_lines(items)


def _scored(steps: list[str], successes: list[int], knobs: Knobs) -> list[dict]:
  first_zero = successes.index(0) if knobs.stop_at_zero and 0 in successes else len(steps)
  n_mc = knobs.n_mc
  scored = [
    {"step": step, "score": n / n_mc, "num_mc_correct": n, "num_mc_total": n_mc}
    for step, n in zip(steps, successes, strict=True)
  ]
  unmeasured = {"score": 0.0, "num_mc_correct": 0, "num_mc_total": 0}
  return [step if i <= first_zero else step | unmeasured for i, step in enumerate(scored)]


def _json_lines(records: list[dict]) -> bytes:
  return "".join(json.dumps(record) + "\n" for record in records).encode()


def scene_and_question(groups: Groups, group: int) -> tuple[Scene, Question]:
  """Returns what a group is about: a function of `groups.seed`, source and kinds, and of `group`."""
  source = SOURCES[groups.source]
  place = f"{groups.seed}/{source.name}"
  scene = source.scene(random.Random(f"{place}/scene/{group % groups.scenes}"), groups.kinds)
  return scene, ask(random.Random(f"{place}/question/{group}"), source, scene)


def _draw_and_ask(groups: Groups) -> tuple[list[_Asked], list[dict]]:
  n_groups = -(-groups.rollouts // groups.rollouts_per_group)
  asked, captions = [], []
  for group in range(groups.first, groups.first + n_groups):
    scene, question = scene_and_question(groups, group)
    stem = f"{groups.folder}/{group % groups.scenes:06d}"
    names = [f"{stem}{letter}.png" for letter in "ab"[: len(scene)]]
    facts = [f"{fact(panel, panel.score)}." for panels in scene for panel in panels]
    if group < groups.scenes and not groups.described:
      captions.append({"image": names, "question": _CAPTION_QUESTION, "sentences": facts})
      for name, panels in zip(names, scene, strict=True):
        path = groups.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_picture(panels))
    if groups.described:
      asked.append(_Asked(question, [], " ".join([*facts, question.text])))
    else:
      asked.append(_Asked(question, [groups.prefix + name for name in names], question.text))
  return asked, captions


def _problems(asked: list[_Asked]) -> Problems:
  """Returns what the policy needs, padded to the maximum number of panels."""
  questions = [a.question for a in asked]
  things = np.array([len(question.panels) for question in questions])
  truth = np.zeros((len(asked), things.max()), np.int8)
  absent = np.ones((len(asked), len(SCORES)), bool)
  for row, question in enumerate(questions):
    values = [panel.score - 1 for panel in question.panels]
    truth[row, : len(values)] = values
    absent[row, values] = False
  sign = np.array([question.sign for question in questions])
  return Problems(
    truth=truth,
    things=things,
    start=np.array([question.start for question in questions]),
    worth=sign[:, None] * np.arange(1, len(SCORES) + 1),
    absent=absent,
  )


def _steps(
  source: Source, about: _Asked, solutions: Solutions, row: int, slots: np.ndarray
) -> list[str]:
  steps = []
  for slot in slots:
    event, total = solutions.event[row, slot], solutions.total[row, slot]
    if event == policies.PREFACE:
      steps.append(f"Take the {', '.join(panel.name for panel in about.question.panels)} in turn.")
    elif event == policies.FINAL:
      steps.append(f"Final answer: {total}")
    else:
      panel = about.question.panels[solutions.thing[row, slot]]
      note = fact(panel, solutions.value[row, slot] + 1)
      if event == policies.AGAIN:
        note = f"Look again: {note[0].lower()}{note[1:]}"
      steps.append(f"{note}, {source.result(total)}.")
  return steps
