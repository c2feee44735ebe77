"""Operations with a plain-torch definition and faster backends; knows nothing of transformers."""

from maskprune.ops.fold import fold_columns, gather_rows

__all__ = ["fold_columns", "gather_rows"]
