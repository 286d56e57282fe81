"""Texts for which two tokenizers that differ somewhere are likely to give different ids."""

import random
import unicodedata

BASE = [
  "It was the best of times, it was the worst of times.",
  "",
  " ",
  "     ",
  " a",
  "a ",
  "  two  spaces   three    four     five" + " " * 40 + "forty",
  "\n",
  "\n\n\n text \n\n\n\n\n  indented\n\ttab\t\ttabs \t \n \r\n\r\n end\n" + "\n" * 35 + "x",
  "I'm you're WE'VE he'd SHE'LL it's 'tis O'Reilly rock'n'roll ''s ''' don\u2019t",
  "1 12 123 1234 12345 3.14159 1,000,000 0x1F 2^10 1st 2nd \u00bd \u00b2 \u2168 \u0661\u0662",
  "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # comment\n\n\nclass A(B): pass\n",
  "<html><body>&nbsp;<!-- x --></body></html> http://example.com/a?b=c&d=%20#e",
  "====----____....!!!!????####****~~~~``````$$$$%%%%^^^^&&&&((((",
  "\u4e2d\u6587\u5b57\u7b26\u6d4b\u8bd5\uff0c\u5305\u62ec\u6807\u70b9\u3002 \u65e5\u672c\u8a9e"
  "\u306e\u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4 \uff21\uff22\uff23\uff11\uff12",
  "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440! \u039a\u03b1\u03bb\u03b7\u03bc\u03ad"
  "\u03c1\u03b1 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d"
  "\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u1019\u1004\u103a\u1039\u1002\u101c",
  "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001d54f",
  "caf\u00e9 na\u00efve \u00dcber STRASSE stra\u00dfe \u0130stanbul \u01c5 \ufb01ne",
  "non\u00a0breaking\u2003em\u2009thin\u3000wide\u200bzero\u2028line\u2029para\u0085next\u00adsoft",
  "control \x00 \x01 \x07 \x1b[0m \x7f end \ufeffbom \ufffd",
  "<0x0A> <0xFF> [PAD1] [INST] x [/INST] <|x|> |> <| >< >",
  "\u0120 \u010a letters of byte-level vocabularies",
  "x" * 300,
  "ab" * 100 + " " + "\u00e9" * 50,
]


def fuzz(seed: int, n: int) -> list[str]:
  """Returns `n` random texts of words, spaces, digits and many scripts, in composed form (NFC)."""
  rng = random.Random(seed)
  ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x5FF), (0x900, 0xDFF), (0x2000, 0x2580)]
  ranges += [
    (0x3000, 0x30FF),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0x2600, 0x27BF),
    (0x1F300, 0x1F64F),
  ]
  parts = [" ", "  ", "\n", "\n\n", "\t", "'s", "'LL", "12", "2024", "the", " of", "ing", "==", "_"]

  def part() -> str:
    if rng.random() < 0.6:
      return rng.choice(parts)
    first, last = rng.choice(ranges)
    return chr(rng.randint(first, last)) * rng.randint(1, 3)

  texts = ("".join(part() for _ in range(rng.randint(1, 40))) for _ in range(n))
  return [unicodedata.normalize("NFC", text) for text in texts]
