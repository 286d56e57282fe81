"""One filter a file; the folder is the registry.

A filter is a module with a frozen dataclass `Filter` whose fields are its config keys. A sample
is an object of samples.jsonl (generate.py) with `of`, how many samples its prompt has. There
are two kinds of filters:

  of one sample: `keep(sample) -> str | None`, why it is rejected, or None.
  of a stream: `select(samples) -> iterator of (sample, str | None)`, each sample once and in
    order; samples of one prompt come together. A sample may come back with more fields.

Why is a few words that are counted, and then, after ": ", what they are about in this case. A
`_sample.Bad` says that the sample cannot be judged at all: filter.on_bad decides what follows.
"""

SHARED = ("answers", "samples")
