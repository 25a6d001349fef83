"""StreamingLLM (arXiv 2309.17453), section 3.2: attention sinks and a window.

Deviations from the paper: whole pages, so the window begins at a page's edge; tokens keep the positions that they were
stored with, where the paper counts positions anew inside the window; and tokens that have left the window stay in
memory, unread, so that one cache can serve other methods too.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltakv.field import StreamingLLM
from deltakv.methods.base import Lengths, Picks
from deltakv.methods.unscored import first_and_latest


@dataclass(frozen=True)
class StreamingSelector:
    """The first pages and the last ones."""

    config: StreamingLLM

    def pick(self, seen: Lengths) -> Picks:
        return first_and_latest(seen, self.config.sink_pages, self.config.recent_pages)
