"""The policy that writes the toy corpus's solutions, and the continuations that score them.

A solution goes through fixed slots. With K things to look at:

    slot 0        a preface that claims nothing                              (sometimes)
    slot 2u + 1   look at thing u = 0 .. K-1, note its value, add it up
    slot 2u       look again at one of the u things noted so far, u = 1 .. K  (sometimes)
    slot 2K + 1   the final answer

The state after a slot is the notes so far, so a continuation is the same policy run on through the
remaining slots. A wrong note stays wrong until its thing is looked at again; that is how a wrong
state recovers.
"""

# Array dims: N rollouts, K things (the maximum of any rollout), V values of a thing, S slots
# (2K + 2), M runs side by side (1 when writing, the number of continuations when scoring).

import dataclasses

import numpy as np

NOTHING, PREFACE, LOOK, AGAIN, FINAL = 0, 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Habits:
  """Probabilities that define a policy's behaviour."""

  slip: float  # a look notes a wrong value that nothing in the picture has
  mix_up: float = 0.0  # a slip notes the value of a thing not looked at yet instead, if any
  again: float = 0.0  # after a look, one of the things noted so far is looked at again
  lapse: float = 0.0  # a continuation does not end, or its answer cannot be parsed
  preface: float = 0.1  # the solution starts by announcing what it will do

  def scaled(self, **factors: float) -> "Habits":
    """Returns the habits with some probabilities multiplied, at most 1."""
    scaled = {name: min(1.0, getattr(self, name) * by) for name, by in factors.items()}
    return dataclasses.replace(self, **scaled)


@dataclasses.dataclass(frozen=True)
class Problems:
  """The problems that N solutions are about; the answer is start + the sum of worth[truth]."""

  truth: np.ndarray  # int[N, K], the value (0 .. V-1) of each thing, 0 beyond `things`
  things: np.ndarray  # int[N], how many things are looked at
  start: np.ndarray  # int[N]
  worth: np.ndarray  # int[N, V]
  absent: np.ndarray  # bool[N, V], values that nothing has; at least one per problem

  def rows(self, index: np.ndarray) -> "Problems":

    return Problems(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Solutions:
  """N solutions, slot by slot; all arrays start [N, S]."""

  event: np.ndarray  # what happens in the slot; NOTHING: no step
  thing: np.ndarray  # the thing that is looked at
  value: np.ndarray  # the value that is noted
  total: np.ndarray  # start + the worth of the notes so far
  right: np.ndarray  # the note and the total are correct
  notes: np.ndarray  # int8[N, S, K], the notes after the slot


def solve(rng: np.random.Generator, problems: Problems, habits: Habits) -> Solutions:
  n, k = problems.truth.shape
  notes = np.zeros((n, 1, k), np.int8)
  columns = []
  for slot in range(2 * k + 2):
    event, thing = _run_slot(rng, slot, notes, problems, habits)
    at = thing[..., None]
    value = np.take_along_axis(notes, at, 2)[:, 0, 0]
    truth = np.take_along_axis(problems.truth[:, None], at, 2)[:, 0, 0]
    looked = np.minimum((slot + 1) // 2, problems.things)
    total = _total(notes, looked, problems)[:, 0]
    right = total == _total(problems.truth[:, None], looked, problems)[:, 0]
    event, thing = event[:, 0], thing[:, 0]
    right &= (value == truth) | (event == PREFACE) | (event == FINAL)
    columns.append((event, thing, value, total, right, notes[:, 0].copy()))
  return Solutions(*(np.stack(column, 1) for column in zip(*columns, strict=True)))


def count_successes(
  rng: np.random.Generator, problems: Problems, solutions: Solutions, habits: Habits, n_mc: int
) -> np.ndarray:
  """Returns int[N, S]: how many of `n_mc` continuations after each slot reach the right answer."""
  # Slots without a step get 0. After the final answer either all succeed or none.
  n, slots = solutions.event.shape
  counts = np.zeros((n, slots), np.int64)
  for slot in range(slots):
    index = np.flatnonzero(solutions.event[:, slot] != NOTHING)
    if not index.size:
      continue
    here = problems.rows(index)
    notes = np.repeat(solutions.notes[index, slot, None], n_mc, 1)
    for later in range(slot + 1, slots):
      _run_slot(rng, later, notes, here, habits)
    target = _total(here.truth[:, None], here.things, here)
    success = _total(notes, here.things, here) == target
    ended = solutions.event[index, slot, None] == FINAL
    success &= ended | (rng.random(success.shape) >= habits.lapse)
    counts[index, slot] = success.sum(1)
  return counts


def _run_slot(
  rng: np.random.Generator, slot: int, notes: np.ndarray, problems: Problems, habits: Habits
) -> tuple[np.ndarray, np.ndarray]:
  """Runs one slot on `notes` int8[N, M, K], in place; returns event and thing, both [N, M]."""
  n, m, _ = notes.shape
  things = problems.things[:, None]
  event, thing = np.zeros((n, m), np.int8), np.zeros((n, m), np.int8)
  if slot == 0:
    event[rng.random((n, m)) < habits.preface] = PREFACE
    return event, thing
  looked = slot // 2
  if slot % 2:
    acts = np.broadcast_to(looked < things, (n, m))
    event[acts] = LOOK
    event[np.broadcast_to(looked == things, (n, m))] = FINAL
    thing[acts] = looked
  else:
    acts = (looked <= things) & (rng.random((n, m)) < habits.again)
    event[acts] = AGAIN
    thing[acts] = rng.integers(0, looked, int(acts.sum()))
  row, run = np.nonzero(acts)
  if row.size:
    notes[row, run, thing[acts]] = _look(rng, row, thing[acts], problems, habits)
  return event, thing


def _look(
  rng: np.random.Generator,
  row: np.ndarray,
  thing: np.ndarray,
  problems: Problems,
  habits: Habits,
) -> np.ndarray:
  """Returns what looks at `thing` of problems `row` note, all of shape [L]."""
  truth = problems.truth[row, thing]
  noted = truth.copy()
  slips = np.flatnonzero(rng.random(truth.shape) < habits.slip)
  row, first_other = row[slips], thing[slips] + 1
  lots = rng.random((slips.size, problems.absent.shape[1]))
  wrong = np.where(problems.absent[row], lots, -1.0).argmax(1)  # uniform over the absent values
  n_others = problems.things[row] - first_other
  other = first_other + (rng.random(slips.size) * n_others).astype(int)
  mixed_up = (rng.random(slips.size) < habits.mix_up) & (n_others > 0)
  noted[slips] = np.where(mixed_up, problems.truth[row, np.where(mixed_up, other, 0)], wrong)
  return noted


def _total(notes: np.ndarray, looked: np.ndarray, problems: Problems) -> np.ndarray:
  """Returns int[N, M]: start + the worth of the first `looked` int[N] notes of int[N, M, K]."""
  n, _, k = notes.shape
  worth = problems.worth[np.arange(n)[:, None, None], notes]
  counted = np.arange(k) < looked[:, None]
  return problems.start[:, None] + (worth * counted[:, None]).sum(2)
