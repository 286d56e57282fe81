"""docs/costs.md has the table that tools/run_costs.py computes."""

import run_costs
from launcher import ROOT


def test_the_table_of_the_docs_is_computed():
  assert run_costs.table() in (ROOT / "docs/costs.md").read_text()


def test_requests_and_machines_are_charged():
  cost = run_costs.Cost(
    read=0, written=0, reads=1000, writes=1000, hours=2.0, machine_dollars_per_hour=3.0
  )
  assert cost.dollars == 6.0 + 0.0004 + 0.005
