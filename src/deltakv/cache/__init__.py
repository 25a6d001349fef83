"""The paged KV pool, block tables, and the rows that live in them."""

from deltakv.cache.rows import Append, PagedKV, Row, RowStore

__all__ = ["Append", "PagedKV", "Row", "RowStore"]
