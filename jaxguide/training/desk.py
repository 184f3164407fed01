"""Work in the background: writing models, pages and pictures while the training goes on."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

ABANDONED: list[Callable[[], object]] = []
"""Functions that wait for work of this process that was not waited for, after a second Ctrl-C."""


def settle() -> None:
  """Wait for work that was abandoned, before the same files are written again by this process."""
  while ABANDONED:
    with contextlib.suppress(Exception):
      ABANDONED.pop()()


class Desk:
  """Does one task after another in a thread of its own. Use it as a context manager.

  An error of a task is raised by the next call of `submit` or `finish`.
  """

  def __init__(self) -> None:
    self._pool = ThreadPoolExecutor(1, "jaxguide-desk")
    self._tasks: list[Future[None]] = []
    self._abandoned = False

  def submit(self, task: Callable[[], None]) -> None:
    """Do a task after those before it.

    Raises:
      Exception: the error of an earlier task.
    """
    finished = [task for task in self._tasks if task.done()]
    self._tasks = [task for task in self._tasks if not task.done()]
    for earlier in finished:
      earlier.result()
    self._tasks.append(self._pool.submit(task))

  def finish(self) -> None:
    """Wait until all tasks are done.

    Raises:
      Exception: the error of a task.
    """
    tasks, self._tasks = self._tasks, []
    for task in tasks:
      task.result()

  def abandon(self) -> None:
    """Do not wait for the tasks."""
    self._tasks, self._abandoned = [], True
    ABANDONED.append(lambda: self._pool.shutdown(wait=True))
    self._pool.shutdown(wait=False, cancel_futures=True)

  def __enter__(self) -> "Desk":
    return self

  def __exit__(self, kind: object, *error: object) -> None:
    try:
      if kind is None:
        self.finish()
    finally:
      self._pool.shutdown(wait=not self._abandoned)
