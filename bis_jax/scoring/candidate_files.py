"""Scores Best-of-N candidates that have steps but no scores."""

from collections.abc import Sequence

import msgspec
from etils import epath

from bis_jax import files
from bis_jax.evaluation import vlmevalkit
from bis_jax.evaluation.best_of_n import Candidate, Question
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solution_files import read_image
from bis_jax.scoring.solutions import Record, Solution, SolutionError


def add_scores(
  checkpoint: str,
  questions: Sequence[Question],
  source: epath.Path,
  images_tsv: str = "",
  base: str | None = None,
) -> None:
  """Scores the candidates that have steps alone: sets `scores`, and `concentrations` if there are any.

  Images are in the TSV file or beside `source`; `base` as in `load_run`. Raises EvaluationError that
  names the question and candidate that cannot be scored.
  """
  inline = vlmevalkit.images(images_tsv, [str(q.id) for q in questions]) if images_tsv else {}
  waiting: list[tuple[str, Candidate, Solution]] = []
  for question in questions:
    shared = {"question": question.question, "image": question.image, "images": question.images}
    for k, candidate in enumerate(question.candidates):
      if candidate is None or candidate.scores or not candidate.steps:
        continue
      where = f"{source}: question {question.id} candidate {k}"
      try:
        record = Record.of(shared | {"steps": candidate.steps})
        encoded = inline.get(str(question.id))
        if encoded is None:
          encoded = [read_image(source.parent, name) for name in record.named_images]
        one = Solution.of(question.question, candidate.steps, encoded)
      except SolutionError as error:
        raise EvaluationError(f"{where}: {error}") from error
      waiting.append((where, candidate, one))
  scorer = step_scorer.load(checkpoint, base=base)
  several = [one for *_, one in waiting]
  results = solutions.score(scorer, several) if waiting else []
  for (where, candidate, _), result in zip(waiting, results, strict=True):
    if isinstance(result, SolutionError):
      raise EvaluationError(f"{where}: {result}")
    candidate.scores = result.tolist()
  if scorer.believes and waiting:
    found = solutions.score(scorer.of_concentrations(), several)
    for (_, candidate, _), result in zip(waiting, found, strict=True):
      if not isinstance(result, SolutionError):
        candidate.concentrations = result.tolist()


def write(path: str, questions: Sequence[Question]) -> None:
  """Writes questions as JSON lines that `evaluate --candidates` reads."""
  files.write_text(
    path, "".join(msgspec.json.encode(question).decode() + "\n" for question in questions)
  )
