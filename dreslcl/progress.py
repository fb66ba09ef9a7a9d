"""Progress with rate and time left, on stderr: a bar on a terminal, elsewhere (a file, a pipe, Slurm) a line of the log now and then."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

log = logging.getLogger(__name__)

EVERY_S = 30
"""Seconds between two lines of the log."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2f}/s")


class _Progress(Progress):
    logged = time.monotonic()

    def advance(self, task_id: Any, advance: int | float = 1) -> None:
        super().advance(task_id, advance)
        if self.disable and time.monotonic() - self.logged >= EVERY_S:
            self.logged = time.monotonic()
            task = self.tasks[0]
            cells = (column.render(task) for column in self.columns if isinstance(column, ProgressColumn) and type(column) is not BarColumn)
            log.info("%s left", " ".join(map(str, cells)))


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Progress]:
    """A bar over `total` units; move it on with `bar.advance(bar.task_ids[0], n)`.

    Args:
        title: what is being done.
        total: units of work.
        unit: what is counted, in the plural.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), _Rate(), TimeRemainingColumn())
    quiet = logging.getLogger("dreslcl").level > logging.INFO
    with _Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        bar.logged = time.monotonic()
        bar.add_task(title, total=total)
        yield bar
