"""Files written by a thread while their maker computes the next one.

At most one file is on its way, so that memory holds one more than without. An error comes up at the next file or at the end of
the block: always before a commit that follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from pipeline.artifacts import Writer


class Behind:
    """Writes the files of one `Writer`, one after another."""

    def __init__(self, writer: Writer, thread: ThreadPoolExecutor) -> None:
        self.writer = writer
        self.thread = thread
        self.coming: Future[None] | None = None

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Begin to write; the tensors must not be changed any more. Raises what writing the file before raised."""
        self.settle()
        self.coming = self.thread.submit(self.writer.write_tensors, name, tensors)

    def settle(self) -> None:
        """Wait for the file on its way. Raises what writing it raised."""
        coming, self.coming = self.coming, None
        if coming is not None:
            coming.result()


@contextmanager
def behind(writer: Writer) -> Iterator[Behind]:
    """All files are written when the block ends, and none is being written any more when it is left by an error."""
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:
        files = Behind(writer, thread)
        yield files
        files.settle()
