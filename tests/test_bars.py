import sys

import pytest

from jaxguide._core import bars


@pytest.mark.parametrize(("terminal", "interval"), [(True, 0.1), (False, 10)])
def test_a_file_gets_few_lines(terminal, interval, capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
  with bars.progress_bar(300, title="sampling", unit="sample", show=True) as bar:
    assert bar.mininterval == interval
    for _ in range(300):
      bar.update()
  err = capsys.readouterr().err
  assert "sampling: 100%" in err
  assert terminal or err.count("\r") <= 3
