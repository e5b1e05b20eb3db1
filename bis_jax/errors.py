"""The base of every error that is the user's to mend: shown as a sentence, without a traceback."""


class UserError(Exception):
  """Input, a setting or a file that cannot be used; the message names it and the remedy.

  Commands catch this class and OSError only, so any other exception is a bug and keeps its
  traceback.
  """
