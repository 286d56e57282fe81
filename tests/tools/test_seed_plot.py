"""tools/seed_plot.py: the places of dots and bars."""

import re
from xml.etree import ElementTree

import seed_plot

SVG = "{http://www.w3.org/2000/svg}"


def test_dots_are_at_the_values_of_seeds_and_bars_at_their_means():
  drawn = ElementTree.fromstring(seed_plot.svg("KL, nats", {"a<b": [1.0, 3.0], "c": [2.0]}))
  ticks = {
    float(t.text): float(t.get("x"))
    for t in drawn.iter(f"{SVG}text")
    if t.get("text-anchor") == "middle"
  }
  (low, x_low), (high, x_high) = min(ticks.items()), max(ticks.items())

  def value(x):
    return low + (float(x) - x_low) * (high - low) / (x_high - x_low)

  dots = [(round(value(c.get("cx")), 2), c.get("cy")) for c in drawn.iter(f"{SVG}circle")]
  assert dots == [(1.0, "39.0"), (3.0, "39.0"), (2.0, "65.0")]
  bars = [p.get("d") for p in drawn.iter(f"{SVG}path") if p.get("stroke-width")]
  assert [round(value(re.match(r"M([\d.]+) ", d)[1]), 2) for d in bars] == [2.0, 2.0]
  words = [t.text for t in drawn.iter(f"{SVG}text")]
  assert words[0] == "KL, nats" and "a<b" in words and words.count("2") == 3  # a tick and two means
