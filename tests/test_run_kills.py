"""A training that is killed from outside; ``python tests/kills.py 50`` does the same fifty times."""

import kills
import pytest


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path):
  report = kills.kill(tmp_path, 2, 120)
  assert report.equal
  assert report.kills == 2
  # A checkpoint that is being written when the process is killed is lost, and the one before it is not.
  assert report.lost <= 2 * kills.SAVE_EVERY
  assert not [line for line in report.warnings if "Traceback" in line]
