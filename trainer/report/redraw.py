"""Lines that stay at the bottom of a terminal and are drawn again by a thread, while text appears above them.

Before a frame is drawn, the rows of the last one are erased: as many as its lines take at the width that the terminal
has now, as terminals wrap lines anew when they become narrower. The cursor is never hidden, so that a killed process
leaves a terminal as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

FRAMES_PER_SECOND = 3


class Redraw:
    """Draws `frame(columns)`, lines that are narrower than `columns`, on the terminal of `console`.

    An error of the terminal ends the thread, and is raised by the next `check` or `print`.
    """

    def __init__(self, console: Console, frame: Callable[[int], list[Text]]) -> None:
        self._console, self._frame = console, frame
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._cells: list[int] = []  # columns of each line that is drawn
        self._shown = ""
        self._thread = threading.Thread(target=self._draw_again_and_again, name="live view", daemon=True)

    def start(self) -> None:
        self._draw()
        self._thread.start()

    def check(self) -> None:
        """Raises what has ended the drawing."""
        if self._failure is not None:
            raise self._failure

    def print(self, text: str) -> None:
        """A line above the frame."""
        self.check()
        self._draw(f"{text}\n")

    def stop(self) -> None:
        """Draws the last frame, which stays."""
        self._ended.set()
        self._thread.join()
        self.check()
        self._draw()

    def _draw_again_and_again(self) -> None:
        while not self._ended.wait(1 / FRAMES_PER_SECOND):
            try:
                self._draw()
            except Exception as error:  # a closed terminal, say: the observers are told with their next event
                self._failure = error
                return

    def _draw(self, above: str = "") -> None:
        with self._lock:
            columns, rows = self._console.size
            lines = self._frame(columns)[: max(1, rows - 1)]
            with self._console.capture() as rendered:
                for line in lines:
                    self._console.print(line, soft_wrap=True)
            shown = rendered.get()
            up = sum(max(1, -(-cells // columns)) for cells in self._cells)
            if not above and shown == self._shown and up == len(self._cells):
                return
            erase = f"\x1b[{up}A\r\x1b[J" if up else ""
            self._console.file.write(erase + above + shown)
            self._console.file.flush()
            self._cells, self._shown = [line.cell_len for line in lines], shown
