"""JSON that a stranger may have written.

``json.loads`` recurses on the C stack up to Python's recursion limit, which is the process's: a
library that raises it (symfc does) lets a deeply nested file end the process. pydantic's parser
has a limit of its own.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json


def loads(text: str | bytes) -> Any:
    """Plain data of a JSON document.

    Raises:
      ValueError: it is none, or nested too deep.
    """
    return from_json(text)
