"""What a cache in host memory cannot do is refused by name; what fails leaves no wrong tokens behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltakv
from deltakv.integrations.hf import offload as setup
from deltakv.offload import memory
from deltakv.offload.lanes import InstantLane, Lanes
from hf.harness import assert_close, greedy, ragged, tokens
from offload.delays import FailingLane

FULL = deltakv.Full()
SMALL: dict[str, Any] = {"recompute": 0.5, "chunk_mib": 6 / 1024, "chunks": 3}


class TestConfig:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"recompute": 1.5}, "recompute=1.5 is neither 'auto' nor a share"),
            ({"recompute": "most"}, "recompute='most'"),
            ({"recompute": True}, "recompute=True"),
            ({"schedule": "flexgen"}, "schedule='flexgen' is not one of pipelined, serial"),
            ({"bits": 5}, "bits=5 is not one of 4, 8, 16"),
            ({"chunks": 1}, "chunks=1 must be a whole number of at least 2"),
            ({"chunk_mib": 0}, "chunk_mib=0 must be a number of MiB above 0"),
            ({"limit_mib": -1}, "limit_mib=-1"),
            ({"pinned": "yes"}, "pinned='yes' must be True or False"),
        ],
        ids=str,
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(deltakv.ConfigError, match=message):
            deltakv.Host(**options)

    @pytest.mark.parametrize("where", ["cpu", "disk", None, 3])
    def test_another_place(self, model_of: Any, where: Any) -> None:
        with pytest.raises(deltakv.ConfigError, match=r"is not 'device', 'host' or a deltakv\.Host"):
            deltakv.apply(model_of("opt"), FULL, kv_device=where)


class TestUse:
    def test_a_sparse_method(self, model_of: Any) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match=r"'delta' picks pages.*use deltakv\.Full\(\)"):
            deltakv.apply(model_of("opt"), deltakv.Delta(), kv_device="host")

    def test_forced_where_it_cannot_be(self, model_of: Any) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match=r"recompute=0\.5: .*not for 'gpt_oss'; use recompute="):
            deltakv.apply(model_of("gpt_oss"), FULL, kv_device=deltakv.Host(recompute=0.5))

    def test_evaluation_mode(self, model_of: Any) -> None:
        with (
            deltakv.apply(model_of("opt"), FULL, kv_device="host") as handle,
            pytest.raises(deltakv.UnsupportedUseError, match="evaluation mode reads K and V on the device"),
            handle.positions(),
        ):
            pass

    def test_caches_of_the_other_place(self, model_of: Any) -> None:
        model = model_of("opt")
        with deltakv.apply(model, FULL) as handle:
            on_device = handle.new_cache()
        with deltakv.apply(model, FULL, kv_device="host") as handle:
            in_host = handle.new_cache()
            with pytest.raises(deltakv.UnsupportedUseError, match="keeps K and V on the device, and kv_device='host'"):
                model(tokens(3)[None], past_key_values=on_device)
        with (
            deltakv.apply(model, FULL),
            pytest.raises(deltakv.UnsupportedUseError, match="keeps K and V in host memory, and kv_device='device'"),
        ):
            model(tokens(3)[None], past_key_values=in_host)

    def test_after_the_handle_was_removed(self, model_of: Any) -> None:
        model = model_of("opt")
        with deltakv.apply(model, FULL, kv_device="host"):
            cache = greedy(model, ragged(20), 4).past_key_values
        with pytest.raises(deltakv.UnsupportedUseError, match="no method is applied"):
            model(tokens(1)[None], past_key_values=cache)

    def test_a_layer_out_of_turn(self, model_of: Any) -> None:
        """What is on its way belongs to another layer: an error, not another layer's K and V."""
        model = model_of("opt")
        with deltakv.apply(model, FULL, kv_device=deltakv.Host(**SMALL)), torch.no_grad():
            cache = model(tokens(20)[None]).past_key_values
            layers = model.get_decoder().layers
            layers[1], layers[2] = layers[2], layers[1]
            try:
                with pytest.raises(deltakv.OffloadError, match="layer 2 asked for its cache out of turn"):
                    model(tokens(1)[None], past_key_values=cache)
            finally:
                layers[1], layers[2] = layers[2], layers[1]


def test_no_reason_is_lost(model_of: Any) -> None:
    """A handle says why nothing is recomputed."""
    for kind, words in {"opt": "runs on the CPU", "qwen2": "grouped-query attention", "gemma3": "not for"}.items():
        with deltakv.apply(model_of(kind), FULL, kv_device="host") as handle:
            assert words in handle.offload.reason
    with deltakv.apply(model_of("opt"), FULL, kv_device=deltakv.Host(recompute=0)) as handle:
        assert handle.offload.reason == "recompute=0 was asked for"


class TestFailures:
    """Each leaves the cache as it was before the forward: tried again, it gives the right logits."""

    def check(self, model: Any, cache: Any, row: torch.Tensor) -> None:
        ours = model(row[:, cache.get_seq_length() :], past_key_values=cache).logits
        assert_close(ours[:, -1], model(row, use_cache=False).logits[:, -1])

    @pytest.mark.parametrize("lane", ["load", "store"])
    @pytest.mark.parametrize("at", [1, 5, 40])
    def test_a_copy(self, model_of: Any, monkeypatch: pytest.MonkeyPatch, lane: str, at: int) -> None:
        model, row = model_of("llama_mha"), tokens(70)[None]
        failing = FailingLane(10**9)

        def make(_: torch.device, overlap: bool) -> Lanes:
            lanes = {"load": InstantLane(), "store": InstantLane(), "compute": InstantLane(), lane: failing}
            return Lanes(**lanes)

        rows = setup.HostRows
        monkeypatch.setattr(setup, "HostRows", lambda *args: rows(*args, make_lanes=make))
        with deltakv.apply(model, FULL, kv_device=deltakv.Host(**SMALL)), torch.no_grad():
            cache = model(row[:, :40]).past_key_values
            failing.left = at
            with pytest.raises(deltakv.OffloadError, match="bus is on fire"):
                for token in row[0, 40:60]:
                    model(token[None, None], past_key_values=cache)
            assert 40 <= cache.get_seq_length() < 60
            self.check(model, cache, row)

    def test_out_of_host_memory_at_once(self, model_of: Any) -> None:
        model = model_of("opt")
        with (
            deltakv.apply(model, FULL, kv_device=deltakv.Host(limit_mib=0.5)) as handle,
            pytest.raises(deltakv.OffloadError, match=r"of 2 x 500 tokens in 6 layers needs .* limit_mib allows"),
        ):
            model(tokens(1000).view(2, 500))
        assert handle.cache is None or handle.cache.host_rows.host_bytes == 0, "nothing is taken before it is known"

    def test_out_of_host_memory_later(self, model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "LEAST_SLAB_BYTES", 1 << 10)
        model, row = model_of("opt"), tokens(400)[None]
        with deltakv.apply(model, FULL, kv_device=deltakv.Host(**SMALL, limit_mib=1.5)), torch.no_grad():
            cache = model(row[:, :100]).past_key_values
            with pytest.raises(deltakv.OffloadError, match="out of host memory"):
                for start in range(100, 400, 50):
                    model(row[:, start : start + 50], past_key_values=cache)
            seen = cache.get_seq_length()
            assert 100 <= seen < 400
            cache.crop(-20)
            self.check(model, cache, row[:, :seen])

    def test_the_host_is_full(self, model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
        model = model_of("opt")
        with (
            deltakv.apply(model, FULL, kv_device="host"),
            pytest.raises(deltakv.OffloadError, match="the host has free"),
        ):
            model.generate(**ragged(20), max_new_tokens=4)

    @pytest.mark.parametrize("mib", [1e8, 1e30])
    def test_chunks_that_do_not_fit(self, model_of: Any, mib: float) -> None:
        """Whether torch cannot have them or cannot count them; a forward is refused before anything is stored."""
        model, ids = model_of("opt"), tokens(40)[None]
        with (
            torch.no_grad(),
            deltakv.apply(model, FULL, kv_device=deltakv.Host(recompute=0.0, chunk_mib=mib)) as handle,
        ):
            cache = handle.new_cache(max_length=50)
            with pytest.raises(
                deltakv.OffloadError, match=r"chunks of .* GiB do not fit on cpu .*; use smaller or fewer"
            ):
                model(ids, past_key_values=cache)

    def test_pinning_refused(self, model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a GPU machine whose driver says no."""
        make = memory.HostMemory

        def pinning(**options: Any) -> Any:
            return make(**{**options, "pinned": True})

        def refuse(*args: Any, **options: Any) -> Any:
            if options.get("pin_memory"):
                raise RuntimeError("CUDA error: OS call failed")
            return empty(*args, **options)

        empty = torch.empty
        monkeypatch.setattr("deltakv.offload.rows.HostMemory", pinning)
        monkeypatch.setattr(torch, "empty", refuse)
        model = model_of("opt")
        with (
            deltakv.apply(model, FULL, kv_device="host"),
            pytest.raises(deltakv.OffloadError, match=r"refuses to page-lock .* \(CUDA error: OS call failed\)"),
        ):
            model(tokens(20)[None])
