"""The faults of `mutations.py` fit the code as it is; what the tests notice of them is for that script to say."""

from pathlib import Path

import mutations


def test_every_fault_can_be_made():
  assert mutations.stale(Path(__file__).parents[1], mutations.MUTATIONS) == []
