"""Caches, handles, threads and modes in turns, at steps that keep their books on the device."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import deltakv
from hf.harness import assert_close, greedy, ragged, tokens
from hf.on_device import COVERING, SPARSE, Talk, an_end, counted, lengths


def test_caches_in_turns(talk: Any, model_of: Any) -> None:
    """Batches of different sizes: each step is counted for its own batch, and bytes are those of the last one."""
    one = talk(20, 20)
    other = Talk(one.model, one._reference, one.handle, ragged(50, 50, 50), one.handle.new_cache())
    for _ in range(5):
        for it in (one, other):
            it.steps(1, masked=False)
            assert one.handle.stats.kv_bytes == it.cache.state.decoding.kv_reader()()
    assert (one.handle.stats.rows, one.handle.stats.steps) == (5 * (2 + 3), 10)
    assert one.handle.stats.full_tokens == 6 * sum(2 * (21 + n) + 3 * (51 + n) for n in range(5))
    assert lengths(one.cache) == [25, 25] and lengths(other.cache) == [55, 55, 55]


def test_handles_in_turn(model_of: Any) -> None:
    """One cache under three handles; each counts its own steps."""
    model, ids, new = model_of("llama"), tokens(200).view(2, 100), tokens(18).view(2, 9)
    cache, logits = None, []
    with torch.no_grad():
        for number, method in enumerate((COVERING, SPARSE, COVERING)):
            with deltakv.apply(model, method) as handle:
                if cache is None:
                    cache = handle.new_cache()
                    model(ids, past_key_values=cache)
                steps = new[:, 3 * number : 3 * number + 3].T[..., None]
                logits.append(torch.cat([model(token, past_key_values=cache).logits for token in steps], dim=1))
                assert (handle.stats.steps, handle.stats.rows) == (3, 6)
                assert handle.announce(cache)  # and left so
            with pytest.raises(deltakv.UnsupportedUseError):
                model(steps[0], past_key_values=cache)
        stock = model(torch.cat([ids, new], dim=1)).logits[:, 100:]
    assert lengths(cache) == [109, 109]
    assert_close(logits[0], stock[:, :3])
    assert not torch.allclose(logits[1], stock[:, 3:6], atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_threads(model_of: Any, kind: str) -> None:
    """Two `generate`s at once, of batches that differ in size and in where rows end, while a third thread looks at
    the statistics."""
    model, batches = model_of(kind), [ragged(60, 44), ragged(30, 41, 12, seed=1)]
    with deltakv.apply(model, SPARSE) as handle:
        ends = [an_end(model, batch)[0] for batch in batches]
        handle.stats.reset()
        alone = [greedy(model, batch, 30, eos_token_id=end) for batch, end in zip(batches, ends, strict=True)]
        want = counted(handle)[:5]
        handle.stats.reset()
        together: dict[int, Any] = {}
        done = threading.Event()

        def run(index: int) -> None:
            together[index] = greedy(model, batches[index], 30, eos_token_id=ends[index])

        def look() -> None:
            while not done.is_set():
                assert handle.stats.rows <= want[1]

        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        looking = threading.Thread(target=look)
        for thread in [*threads, looking]:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        looking.join()
        assert counted(handle)[:5] == want
    for index, expected in enumerate(alone):
        assert torch.equal(together[index].sequences, expected.sequences)
        assert torch.equal(together[index].logits, expected.logits)


@pytest.mark.parametrize("modes", [(False, True), (True, False)], ids=str)
def test_inference_mode_and_back(model_of: Any, modes: tuple[bool, bool]) -> None:
    """Tensors made in one mode are written in the other: the cache's, the statistics', the compiler's none."""
    model, batch = model_of("llama"), ragged(30, 18)
    with deltakv.apply(model, COVERING) as handle:
        cache, outs, mask, ids = handle.new_cache(), [], batch["attention_mask"], batch["input_ids"]
        for inference in (*modes, *modes):
            with torch.inference_mode() if inference else nullcontext():
                out = greedy(model, {"input_ids": ids, "attention_mask": mask}, 8, past_key_values=cache)
            outs.append(out.logits.clone())
            ids = out.sequences.clone()
            mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
        assert handle.stats.rows == 31 * 2
    stock = greedy(model, batch, 32)
    assert torch.equal(ids, stock.sequences)
    assert_close(torch.cat(outs), stock.logits)
