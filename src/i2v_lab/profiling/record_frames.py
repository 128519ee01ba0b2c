"""Records as tables: one row a record, one column a field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    import pandas as pd

DTYPES: dict[Any, str] = {int: "int64", int | None: "Int64", float: "float64", bool: "bool", str: "str"}


def record_frame(kind: type[Any], records: Sequence[Any]) -> pd.DataFrame:
    """Records of one type as a table.

    Args:
        kind: The type, such as :class:`~i2v_lab.profiling.records.PhaseRecord`.
        records: All of that type; there may be none.

    Returns:
        One row a record and one column a field, in the order of the type, with the same column types whether there are
        rows or not: whole bytes are integers, and those that may be unknown are nullable.

    Example:
        >>> from i2v_lab.profiling.records import GraphRecord
        >>> record_frame(GraphRecord, [GraphRecord("decode_video", "video_decoder.conv_in", 1024)])["nbytes"].tolist()
        [1024]
    """
    import pandas as pd

    hints = get_type_hints(kind)
    columns = {
        field.name: pd.Series(
            [getattr(record, field.name) for record in records], dtype=DTYPES.get(hints[field.name], "object")
        )
        for field in fields(kind)
    }
    return pd.DataFrame(columns)
