"""Methods that evict: pages really leave the pool, and everything else goes on as if they had only been left unread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltakv
from deltakv.cache.rows import GONE
from hf.harness import assert_close, decode, greedy, left_padded, positions, ragged, recorded_picks, tokens
from hf.test_methods import EVICTING, oracle, small


def steps(model: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(token.view(1, 1), past_key_values=cache).logits[0] for token in ids])


def held(cache: Any, layer: int) -> list[int]:
    """Pages of each row that hold tokens."""
    kv = cache.layered.by_layer[layer]
    return [sum(page != GONE for page in row.pages[: -(-row.length // 16)]) for row in kv.rows]


def holes(cache: Any) -> dict[int, set[int]]:
    """By layer, the pages that the first row has given up."""
    layers = cache.layered.by_layer
    return {layer: {at for at, page in enumerate(layers[layer].rows[0].pages) if page == GONE} for layer in layers}


@pytest.mark.parametrize("name", EVICTING)
def test_memory_follows_what_is_kept(model_of: Any, name: str) -> None:
    """Layers that evict hold their budget and what has come since; the pools shrink too, and `generate` tells."""
    model, method = model_of("llama"), small(name, "llama", plan="SSSSSF")
    row = tokens(700, seed=3)
    with deltakv.apply(model, method) as handle, torch.no_grad():
        cache = model(row[None, :600]).past_key_values
        before, reserved = cache.kv_bytes, cache.layered.reserved_bytes
        assert before == 6 * 38 * 16 * 2 * 2 * 16 * 4  # layers, pages, tokens, K and V, heads, dim, bytes
        most = 4 + -(-method.lag // 16)
        for step, token in enumerate(row[600:]):
            model(token.view(1, 1), past_key_values=cache)
            assert handle.stats.kv_bytes == cache.kv_bytes
            if step + 1 == method.lag:  # not when a row next outgrows its place
                assert cache.layered.reserved_bytes < reserved / 2
            if step >= method.lag:
                assert all(held(cache, layer)[0] <= most for layer in range(5))
                for layer in range(5):
                    kv = cache.layered.by_layer[layer]
                    used = [page for page in kv.rows[0].pages if page != GONE]
                    assert len(set(used)) == len(used) == kv._allocator.n_used
        assert held(cache, 5) == [44]
        assert cache.kv_bytes == sum(held(cache, layer)[0] for layer in range(6)) * 16 * 2 * 2 * 16 * 4
        assert cache.kv_bytes < before / 3
        handle.stats.reset()
        greedy(model, ragged(300, 200), 40)
        assert handle.stats.kv_bytes < 500 * 6 * 2 * 2 * 16 * 4 / 2


@pytest.mark.parametrize("name", EVICTING)
def test_as_on_a_cache_that_gives_nothing_up(model_of: Any, name: str) -> None:
    """Long enough for pools to be laid out anew around the holes, several times; rows of very different lengths."""
    model, method = model_of("llama"), small(name, "llama")
    batch, new = ragged(150, 20, 70), torch.stack([tokens(260, seed=50 + index) for index in range(3)])
    with deltakv.apply(model, method):
        unread, kept = decode(model, batch, new, deltakv.PagedCache([None] * 6, 16))
        gone, cache = decode(model, batch, new)
    assert_close(gone, unread)
    assert cache.kv_bytes < kept.kv_bytes / 2
    lives = [row for layer in (1, 2, 3) for row in cache.layered.by_layer[layer].rows]
    assert all(GONE in row.pages for row in lives)


@pytest.mark.parametrize("chunk", [30, 13])
@pytest.mark.parametrize("name", EVICTING)
def test_a_second_turn_reads_what_is_left(model_of: Any, name: str, chunk: int) -> None:
    """A prompt onto pages that are partly gone, at once or in chunks, is the oracle's under a mask of them."""
    model, row, method = model_of("llama"), tokens(190, seed=4), small(name, "llama", plan="SSSSSS")
    with deltakv.apply(model, method) as handle, torch.no_grad():
        handle.stats.record_picks = True
        cache = model(row[None, :100]).past_key_values
        first = steps(model, row[100:150], cache)
        picks = recorded_picks(handle)
        left = {
            layer: [p for p, at in enumerate(cache.layered.by_layer[layer].rows[0].pages) if at != GONE]
            for layer in picks
        }
        turn = torch.cat([model(part[None], past_key_values=cache).logits[0] for part in row[150:180].split(chunk)])
        handle.stats.picks.clear()
        last = steps(model, row[180:], cache)
        for layer, pages in recorded_picks(handle).items():
            assert set(range(10)) - set(left[layer]), "nothing was gone"
            picks[layer] += [[p for p in range(at // 16 + 1) if p in left[layer] or p > 9] for at in range(150, 180)]
            picks[layer] += pages
    run = oracle(model, name, method)(row, 100, picks)
    assert_close(torch.cat([first, turn, last]), run.logits[100:])


@pytest.mark.parametrize("name", EVICTING)
def test_going_back(model_of: Any, name: str) -> None:
    """Within the recent tokens; what is gone stays gone. Further back is refused, and changes nothing."""
    model, row = model_of("llama"), tokens(200, seed=5)
    with deltakv.apply(model, small(name, "llama", recent=32)) as handle, torch.no_grad():
        cache = model(row[None, :100]).past_key_values
        steps(model, row[100:180], cache)
        bytes_then = cache.kv_bytes
        with pytest.raises(deltakv.UnsupportedUseError, match="cannot go back to 70 tokens"):
            cache.crop(-110)
        assert cache.get_seq_length() == 180
        assert cache.kv_bytes == bytes_then
        cache.crop(-10)
        assert cache.get_seq_length() == 170
        gone = holes(cache)
        handle.stats.record_picks = True
        assert torch.isfinite(steps(model, row[170:], cache)).all()
        assert all(gone[layer] and not gone[layer] & set(pages[0]) for layer, pages in recorded_picks(handle).items())
        assert held(cache, 1)[0] <= 5
        cache.reset()
        again = torch.cat(
            [model(row[None, :100], past_key_values=cache).logits[0, -1:], steps(model, row[100:], cache)]
        )
        fresh = model(row[None, :100])
        assert_close(again, torch.cat([fresh.logits[0, -1:], steps(model, row[100:], fresh.past_key_values)]))


@pytest.mark.parametrize("plan", ["FSRRSR", "WFFFFW"])
def test_its_cache_is_not_for_steps_that_share_pages(model_of: Any, plan: str) -> None:
    """Layers have tables of their own there. Refused before anything runs, also where nothing has gone yet."""
    model, row = model_of("llama"), tokens(130, seed=5)
    with torch.no_grad():
        with deltakv.apply(model, small("h2o", "llama")):
            cache = model(row[None, :100]).past_key_values
        with deltakv.apply(model, deltakv.Delta(budget=64, recent=16, min_context=0, plan=plan)) as handle:
            with pytest.raises(deltakv.UnsupportedUseError, match="layers have pages of their own, and layer"):
                model(row[None, 100:101], past_key_values=cache)
            with handle.positions():  # a position lists its pages by number, not by where a layer has them
                parts = [model(part[None], past_key_values=cache).logits for part in row[100:].split([1, 29])]
            again = model(row[None, :100]).past_key_values
            with handle.positions():
                assert_close(torch.cat(parts, dim=1), model(row[None, 100:], past_key_values=again).logits)
        with deltakv.apply(model, deltakv.Full()):
            assert model(row[None, 100:101], past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("name", EVICTING)
def test_going_back_before_the_holes(model_of: Any, name: str) -> None:
    """Then nothing is missing, and new tokens lie where pages had gone."""
    model, row, other = model_of("llama"), tokens(180, seed=5), tokens(90, seed=6)
    with deltakv.apply(model, small(name, "llama", plan="SSSSSS", sinks=16)), torch.no_grad():
        cache = model(row[None, :100]).past_key_values
        steps(model, row[100:], cache)
        assert all(min(gone) < 10 for gone in holes(cache).values())
        cache.crop(-164)
        assert not any(holes(cache).values())
        fresh = model(row[None, :16]).past_key_values
        assert_close(steps(model, other, cache), steps(model, other, fresh))


@pytest.mark.parametrize("method", [deltakv.Full(), deltakv.Delta(), "h2o:plan=FSSSSS"], ids=str)
def test_a_cache_with_holes_serves_nobody_who_would_read_them(model_of: Any, method: Any) -> None:
    from deltakv.methods import parse

    model, row = model_of("llama"), tokens(200, seed=6)
    evicting = small("h2o", "llama", plan="SSSSSS")
    with deltakv.apply(model, evicting) as handle, torch.no_grad():
        cache = model(row[None, :100]).past_key_values
        steps(model, row[100:150], cache)
        with handle.positions(), pytest.raises(deltakv.UnsupportedUseError, match="has given up pages, and layer 0"):
            model(row[None, 150:], past_key_values=cache)
        steps(model, row[150:160], cache)
    with (
        deltakv.apply(model, parse(method) if isinstance(method, str) else method),
        torch.no_grad(),
        pytest.raises(deltakv.UnsupportedUseError, match="has given up pages, and layer 0"),
    ):
        model(row[None, 160:161], past_key_values=cache)
    gone = holes(cache)
    with deltakv.apply(model, evicting) as handle:  # another of a method that evicts in these layers can go on
        handle.stats.record_picks = True
        assert torch.isfinite(steps(model, row[160:], cache)).all()
    assert all(gone[layer] and not gone[layer] & set(pages[0]) for layer, pages in recorded_picks(handle).items())


def test_evaluation_gives_nothing_up(model_of: Any) -> None:
    """As decoded, over several chunks, while the pages stay until a decode step."""
    model, method, row = model_of("llama"), small("h2o", "llama"), tokens(180, seed=7)
    with deltakv.apply(model, method) as handle, torch.no_grad():
        decoded = steps(model, row[100:], model(row[None, :100]).past_key_values)
        cache = model(row[None, :100]).past_key_values
        with handle.positions():
            parts = [model(part[None], past_key_values=cache).logits[0] for part in row[100:170].split([30, 1, 39])]
        assert held(cache, 1) == [11]
        rest = steps(model, row[170:], cache)
    assert held(cache, 1)[0] <= 5
    assert_close(torch.cat([*parts, rest]), decoded)


def test_windowed_layers_stay_as_they_are(model_of: Any) -> None:
    model = model_of("gemma3")
    batch, new = ragged(120, 60), torch.stack([tokens(60, seed=80 + index) for index in range(2)])
    windows = [None if kind == "full_attention" else 32 for kind in model.config.layer_types]
    with deltakv.apply(model, small("a2sf", "gemma3")):
        unread, _ = decode(model, batch, new, deltakv.PagedCache(windows, 16))
        gone, cache = decode(model, batch, new)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 61, dtype=torch.long)], dim=1)
        at = positions(mask)[:, -1:]
        with torch.no_grad():
            model(tokens(2)[:, None], attention_mask=mask, position_ids=at, past_key_values=cache)
    assert_close(gone, unread)
    assert sorted(cache.layered.by_layer) == [at for at, window in enumerate(windows) if window is None]


def test_left_padding_and_a_row_alone(model_of: Any) -> None:
    model, method = model_of("opt"), small("lazyeviction", "opt")
    rows, new = [tokens(n, seed=n) for n in (150, 33)], torch.stack([tokens(50, seed=index) for index in range(2)])
    with deltakv.apply(model, method):
        together, _ = decode(model, left_padded(rows), new)
        for index, row in enumerate(rows):
            alone, _ = decode(model, left_padded([row]), new[index : index + 1])
            assert_close(together[index], alone[0])
