"""The one exception for input that cannot be used."""


class InputError(ValueError):
  """A config, file or workdir that cannot be used as it is.

  The message is one sentence in two halves: what was found beside what was
  expected, and what to do. The command line prints it and exits with code 2.
  """


class Preempted(Exception):
  """The machine is being taken away, and all is saved: the same command goes on."""
