"""A parser of the pages that the report writes, for tests."""

import html.parser


class Page(html.parser.HTMLParser):
  """A parser that collects tags and the text of table rows, and checks that every tag is closed."""

  VOID = ("meta", "br", "path", "link", "img", "input")

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.words, self.rows = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f"not closed: {self.open}"

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)
    if tag == "tr":
      self.rows.append([])

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] != ["style"] and data.strip():
      self.words.append(data.strip())
      if "tr" in self.open:
        self.rows[-1].append(data.strip())

  def row(self, name):
    return next(r for r in self.rows if r[:1] == [name])
