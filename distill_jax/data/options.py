"""Config section `data`: the corpus and its tokenizer."""

from __future__ import annotations

import dataclasses
import itertools

from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """The corpus, and how it is tokenized and packed into sequences."""

  kind: str = "text"
  """Format of the corpus: "text" (UTF-8 text files), "jsonl" (one JSON object per line), "chat"
  (one JSON chat per line), "tfds" (a TensorFlow dataset in array_record format), or "pydoc"
  (Python's language reference, which every Python installation contains)."""
  path: str = ""
  """File or folder of the corpus, as a path or URL; "" for "pydoc". Of a folder, the files directly
  in it are read, of JSON lines also compressed ones (.jsonl.gz). For "tfds", a prepared dataset's
  folder, DATA_DIR/NAME[:VERSION], or the NAME of a dataset in TFDS's default folder."""
  packed: str = ""
  """Store that `pack` made of the corpus, as a path or URL, whose rows `record` reads by index. "":
  `record` first packs the corpus into WORKDIR/packed. Held-out rows are in its folder `heldout`."""
  split: str = "train"
  """Split to read: "train" or "heldout"; for "tfds", any split of the dataset, e.g. "train[:90%]".
  With `tasks`, the split that `record` reads."""
  field: str = "text"
  """Field that contains the text, for "jsonl" and "tfds"."""
  heldout_fraction: float = 0.1
  """Fraction of the documents that are held out, in [0, 1). A document's split depends only on a
  hash of its text. 0 puts every document into both splits, for a corpus with a separate held-out
  file. Not used for "tfds"."""
  tokenizer: str = ""
  """Tokenizer: the path or URL of a tokenizer.json file, a sentencepiece .model file, or a folder
  with one of them. "": the model's tokenizer."""
  seq_len: int = 1024
  """Length of the packed sequences, in tokens."""
  whole: bool = False
  """True to cut only documents that are longer than a sequence, by best-fit packing, instead of
  concatenating documents and cutting them at the end of each sequence. Chats are always whole, and
  so are documents with `buckets`."""
  buckets: tuple[int, ...] = ()
  """Lengths of packed sequences in ascending order, of which each divides the last, data.seq_len.
  There is one store for each length, in a folder of that name. A document is packed into a sequence
  of the smallest length that holds it, or into the space that is left in a longer one. (): one
  store with sequences of data.seq_len."""
  sequences: int = 0
  """Maximum number of packed sequences, of which n tokens count as n / data.seq_len. 0: all."""
  on_bad: str = "stop"
  """Action at a chat that cannot be used: "stop" (raise an error) or "skip" (skip and count it)."""
  trust: str = ""
  """Name of a per-chat confidence field in [0, 1], e.g. "agreement", which the filter `votes`
  writes. 1 - confidence is used as label smoothing. "": no label smoothing. For "chat" only."""

  def __post_init__(self) -> None:
    if self.kind == "text" and self.path.removesuffix(".gz").endswith(".jsonl"):
      expected = f"'jsonl', or 'chat' for chats, to read {self.path}"
      raise bad_value("data.kind", self.kind, expected, "Set data.kind=jsonl")
    lengths = self.buckets
    ascend = all(a < b for a, b in itertools.pairwise((1, *lengths)))
    if lengths and (
      lengths[-1] != self.seq_len or not ascend or any(self.seq_len % n for n in lengths)
    ):
      expected = (
        f"ascending lengths of at least 2 tokens, of which each divides the last, {self.seq_len} "
        "(data.seq_len)"
      )
      raise bad_value("data.buckets", lengths, expected, "Correct them")

  @property
  def folder_of_length(self) -> dict[int, str]:
    """The folder of the store of each length of sequences, by length; "" without `buckets`."""
    return {n: str(n) for n in self.buckets} or {self.seq_len: ""}

  @property
  def fraction_of_split(self) -> float:
    """The fraction of the documents that are held out if they are those to read; otherwise 0."""
    of_hash = self.split == "heldout" and self.kind != "tfds"
    return self.heldout_fraction if of_hash else 0.0


@dataclasses.dataclass(frozen=True)
class PackOptions:
  """Options of the `pack` command, and of the packing that `record` begins with."""

  workers: int = 0
  """Number of processes that tokenize the corpus; 0 for one per CPU core. The result does not
  depend on it."""
