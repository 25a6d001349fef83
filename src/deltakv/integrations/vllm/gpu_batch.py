"""A batch that vLLM has put in order: rows with one token come first. Decided on the host, from what it knows anyway."""

from __future__ import annotations

from vllm.v1.attention.backend import CommonAttentionMetadata

from deltakv.errors import UnsupportedUseError


def decode_count(common: CommonAttentionMetadata) -> int:
    """How many rows are at a decode step: the first ones, with one token each. Padding of a captured batch counts.

    One that reads the last token of its prompt counts, as in transformers: vLLM replays the graph of the decode step
    for any batch of one-token rows, and a row must not depend on what stands beside it. Raises `UnsupportedUseError`
    if vLLM has not put them first.
    """
    if common.max_query_len <= 1:
        return common.num_reqs
    lengths = (common.query_start_loc_cpu[1:] - common.query_start_loc_cpu[:-1]).numpy()
    one = lengths == 1
    count = int(one.argmin())
    # A prompt of a single token may stand anywhere: nothing can be left out of it.
    upper = common.seq_lens_cpu_upper_bound
    if upper is None or (upper.numpy()[count : len(one)][one[count:]] > 1).any():
        raise UnsupportedUseError("this vLLM does not put rows at a decode step before the others")
    return count


def behind(common: CommonAttentionMetadata, count: int) -> CommonAttentionMetadata:
    """The batch without its first `count` rows, of one token each. Its tokens count from the first one that is left."""
    rows = {
        name: None if value is None else value[count:]
        for name in (
            "seq_lens", "block_table_tensor", "slot_mapping", "is_prefilling", "positions", "seq_lens_cpu_upper_bound",
            "_seq_lens_cpu", "_num_computed_tokens_cpu",
        )
        for value in (getattr(common, name),)
    }  # fmt: skip
    return common.replace(
        **rows,
        query_start_loc=common.query_start_loc[count:] - count,
        query_start_loc_cpu=common.query_start_loc_cpu[count:] - count,
        num_reqs=common.num_reqs - count,
        num_actual_tokens=common.num_actual_tokens - count,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
