"""What cannot work is refused by name: the error's class, what was wrong, and what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import deltakv
from hf.harness import SMALL, decode, failing_layer, greedy, left_padded, ragged, tokens

METHOD = deltakv.Delta(**SMALL)
COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


class TestModels:
    """Refused when `apply` is called, with nothing changed."""

    def check(self, model: Any, *words: str) -> None:
        before = (model.config._attn_implementation, sorted(model.__dict__))
        with pytest.raises(deltakv.UnsupportedModelError) as caught:
            deltakv.apply(model, METHOD)
        for word in words:
            assert word in str(caught.value)
        assert (model.config._attn_implementation, sorted(model.__dict__)) == before

    def test_multi_head_latent_attention(self) -> None:
        config = transformers.DeepseekV3Config(
            **COMMON,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        )
        self.check(transformers.AutoModelForCausalLM.from_config(config), "deepseek_v3", "MLA")

    def test_logit_soft_capping(self) -> None:
        config = transformers.Gemma2Config(**COMMON, head_dim=16)
        self.check(transformers.AutoModelForCausalLM.from_config(config), "gemma2", "soft-capping")

    def test_alibi(self) -> None:
        model = transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=2)
        )
        self.check(model, "bloom", "ALiBi")

    def test_encoder_decoder(self) -> None:
        config = transformers.T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
        self.check(transformers.T5ForConditionalGeneration(config), "t5", "encoder-decoder")

    def test_linear_attention_hybrid(self) -> None:
        config = transformers.Qwen3NextConfig(
            **COMMON,
            head_dim=16,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=2,
            num_experts_per_tok=1,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        )
        self.check(transformers.AutoModelForCausalLM.from_config(config), "qwen3_next", "linear_attention")

    def test_state_space_model(self) -> None:
        config = transformers.MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, state_size=4)
        self.check(transformers.MambaForCausalLM(config), "mamba")

    def test_every_layer_has_a_window(self) -> None:
        config = transformers.MistralConfig(**COMMON, sliding_window=16, max_position_embeddings=256)
        self.check(transformers.MistralForCausalLM(config), "mistral", "sliding window", "16 tokens")

    def test_not_on_the_list(self) -> None:
        config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2)
        self.check(transformers.GPT2LMHeadModel(config), "gpt2", "llama")

    def test_vision_language_wrapper(self) -> None:
        """Only its text model is covered, so the composite is refused, and by the name that its config has."""
        config = transformers.Gemma3Config(
            text_config={**COMMON, "head_dim": 16},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
        )
        self.check(transformers.Gemma3ForConditionalGeneration(config), "gemma3")

    def test_not_a_transformers_model(self) -> None:
        with pytest.raises(deltakv.UnsupportedModelError, match="Linear is not a transformers model"):
            deltakv.apply(nn.Linear(2, 2), METHOD)

    def test_a_window_that_nothing_outgrows_is_full_attention(self) -> None:
        """Mistral-like configs whose window is as long as the context are covered, as full attention."""
        config = transformers.MistralConfig(**COMMON, sliding_window=256, max_position_embeddings=256)
        model = transformers.MistralForCausalLM(config).eval()
        model.generation_config.eos_token_id = None
        batch = {"input_ids": tokens(20).remainder(32)[None]}
        stock = greedy(model, batch, 4)
        with deltakv.apply(model, METHOD) as handle:
            assert handle.planned_layers == [0, 1, 2, 3]
            torch.testing.assert_close(greedy(model, batch, 4).logits, stock.logits, atol=1e-4, rtol=0)


class TestMethods:
    def test_not_a_method(self, model_of: Any) -> None:
        with pytest.raises(deltakv.ConfigError, match=r"'delta' is not a method; give deltakv\.Delta"):
            deltakv.apply(model_of("llama"), "delta")

    def test_class_in_place_of_an_instance(self, model_of: Any) -> None:
        with pytest.raises(deltakv.ConfigError, match="is not a method"):
            deltakv.apply(model_of("llama"), deltakv.Delta)

    def test_unregistered_config(self, model_of: Any) -> None:
        class Own(deltakv.Method):
            algorithm = "own"

        with pytest.raises(deltakv.ConfigError, match="is not a method; allowed are Full, Delta"):
            deltakv.apply(model_of("llama"), Own())

    def test_plan_for_another_depth(self, model_of: Any) -> None:
        with pytest.raises(deltakv.PlanError, match="is for 5 layers, but the model has 6 layers"):
            deltakv.apply(model_of("llama"), deltakv.Delta(**SMALL, plan="FSRRS"))

    def test_plan_counts_layers_without_a_window(self, model_of: Any) -> None:
        with pytest.raises(deltakv.PlanError, match="is for 8 layers, but the model has 4 layers"):
            deltakv.apply(model_of("gpt_oss"), deltakv.Delta(**SMALL, plan="FSRRSRRR"))

    def test_nested_apply(self, model_of: Any) -> None:
        model, batch = model_of("llama"), ragged(80)
        with deltakv.apply(model, METHOD) as handle:
            with pytest.raises(deltakv.UnsupportedUseError, match="already applied to this model; remove it first"):
                deltakv.apply(model, deltakv.Full())
            greedy(model, batch, 4)
            assert handle.stats.sparse_rows == 3, "the refused one must not disturb the first"
        with deltakv.apply(model, deltakv.Full()):
            pass


class TestGenerate:
    @pytest.fixture
    def model(self, model_of: Any) -> Any:
        model = model_of("llama")
        with deltakv.apply(model, METHOD):
            yield model

    def test_dynamic_cache(self, model: Any) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match=r"DynamicCache.*paged cache.*handle\.new_cache\(\)"):
            model.generate(
                **ragged(10), past_key_values=transformers.DynamicCache(config=model.config), max_new_tokens=2
            )

    @pytest.mark.parametrize("name", ["static", "dynamic", "quantized", "offloaded"])
    def test_cache_implementation(self, model: Any, name: str) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match=f"cache_implementation='{name}'"):
            model.generate(**ragged(10), cache_implementation=name, max_new_tokens=2)

    def test_output_attentions(self, model: Any) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match="output_attentions=True"):
            model.generate(**ragged(10), output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)

    def test_use_cache_false(self, model: Any) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match="use_cache=False"):
            model.generate(**ragged(10), use_cache=False, max_new_tokens=2)

    def test_continuous_batching(self, model: Any) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match="continuous batching"):
            model.generate_batch([[3, 4, 5]])
        with pytest.raises(deltakv.UnsupportedUseError, match="continuous batching"):
            model.init_continuous_batching()
        with (
            pytest.raises(deltakv.UnsupportedUseError, match="continuous batching"),
            model.continuous_batching_context_manager(),
        ):
            pass


class TestForward:
    @pytest.fixture
    def handle(self, model_of: Any) -> Any:
        with deltakv.apply(model_of("llama"), METHOD) as handle:
            yield handle

    def test_dynamic_cache(self, handle: Any) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match="DynamicCache"):
            handle.model(tokens(5)[None], past_key_values=transformers.DynamicCache(config=handle.model.config))

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_output_attentions(self, handle: Any, use_cache: bool) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match="output_attentions=True"):
            handle.model(tokens(5)[None], output_attentions=True, use_cache=use_cache)

    def test_output_attentions_by_config(self, tiny_model: Any) -> None:
        model = tiny_model("llama")
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with deltakv.apply(model, METHOD), pytest.raises(deltakv.UnsupportedUseError, match="output_attentions"):
            model(tokens(5)[None])

    def test_no_inputs(self, handle: Any) -> None:
        with pytest.raises(deltakv.UnsupportedUseError, match="without input_ids or inputs_embeds"):
            handle.model(use_cache=True)

    def test_gradient_through_the_cache(self, handle: Any) -> None:
        loss = handle.model(tokens(20)[None], labels=tokens(20)[None]).loss
        with pytest.raises(deltakv.UnsupportedUseError, match=r"no gradient.*use_cache=False"):
            loss.backward()

    def test_dropout(self, tiny_model: Any) -> None:
        model = tiny_model("llama")
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        with (
            deltakv.apply(model.train(), METHOD),
            pytest.raises(deltakv.UnsupportedUseError, match=r"dropout.*model\.eval\(\)"),
        ):
            model(tokens(5)[None])


class TestCaches:
    def test_after_the_handle_was_removed(self, model_of: Any) -> None:
        model = model_of("llama")
        with deltakv.apply(model, METHOD):
            cache = greedy(model, ragged(20), 4).past_key_values
        with pytest.raises(deltakv.UnsupportedUseError, match="belongs to deltakv, and no method is applied"):
            model(tokens(1)[None], past_key_values=cache)
        with pytest.raises(deltakv.UnsupportedUseError, match="belongs to deltakv, and no method is applied"):
            model.generate(**ragged(30), past_key_values=cache, max_new_tokens=2)
        with deltakv.apply(model, METHOD), torch.no_grad():
            assert cache.get_seq_length() == 23
            model(tokens(1)[None], past_key_values=cache)
            assert cache.get_seq_length() == 24

    def test_after_a_forward_that_failed_and_the_handle_was_removed(self, model_of: Any) -> None:
        """The step that never ended must not make a removed method's cache look alive."""
        model = model_of("llama")
        with deltakv.apply(model, METHOD):
            cache = model(tokens(20)[None]).past_key_values
            with failing_layer(model), pytest.raises(RuntimeError, match="in the middle"):
                model(tokens(1)[None], past_key_values=cache)
        with pytest.raises(deltakv.UnsupportedUseError, match="no method is applied"):
            model(tokens(1)[None], past_key_values=cache)

    def test_in_a_model_without_a_method(self, model_of: Any) -> None:
        model, other = model_of("llama"), model_of("qwen2")
        with deltakv.apply(model, METHOD) as handle:
            cache = handle.new_cache()
            with pytest.raises(deltakv.UnsupportedUseError, match="no method is applied"):
                other(tokens(5)[None], past_key_values=cache)

    def test_another_page_size(self, model_of: Any) -> None:
        model = model_of("llama")
        with deltakv.apply(model, deltakv.Full(page_size=32)):
            cache = greedy(model, ragged(20), 2).past_key_values
        with deltakv.apply(model, METHOD):
            with pytest.raises(deltakv.UnsupportedUseError, match=r"pages of 32 tokens.*needs pages of 16"):
                model(tokens(1)[None], past_key_values=cache)
            with pytest.raises(deltakv.UnsupportedUseError, match=r"pages of 32 tokens.*needs pages of 16"):
                model.generate(**ragged(30), past_key_values=cache, max_new_tokens=2)

    def test_another_model_s_layers(self, model_of: Any) -> None:
        model, other = model_of("llama"), model_of("gemma3")
        with deltakv.apply(other, METHOD) as handle:
            cache = handle.new_cache()
        with deltakv.apply(model, METHOD), pytest.raises(deltakv.UnsupportedUseError, match="8 layers"):
            model(tokens(1)[None], past_key_values=cache)

    def test_another_batch_size(self, model_of: Any) -> None:
        model = model_of("llama")
        with deltakv.apply(model, METHOD):
            cache = model(tokens(20).view(2, 10)).past_key_values
            with pytest.raises(deltakv.UnsupportedUseError, match="holds 2 rows, but this forward has 3"):
                model(tokens(3).view(3, 1), past_key_values=cache)


class TestMasks:
    """Raised before any layer runs, so the cache stays usable."""

    @pytest.fixture
    def model(self, model_of: Any) -> Any:
        model = model_of("llama")
        with deltakv.apply(model, METHOD), torch.no_grad():
            yield model

    def test_hole_in_a_prompt(self, model: Any) -> None:
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]])
        with pytest.raises(deltakv.MaskError, match="hole among the new tokens of row 1"):
            model(tokens(10).view(2, 5), attention_mask=mask)
        with pytest.raises(deltakv.MaskError, match="hole among the new tokens of row 1"):
            model.generate(tokens(10).view(2, 5), attention_mask=mask, max_new_tokens=2)

    def test_hole_in_stored_tokens(self, model: Any) -> None:
        cache = model(tokens(10)[None]).past_key_values
        mask = torch.ones(1, 11, dtype=torch.long)
        mask[0, 4] = 0
        with pytest.raises(deltakv.MaskError, match="hole in row 0: it hides stored tokens that others follow"):
            model(tokens(1)[None], attention_mask=mask, past_key_values=cache)
        self.check_usable(model, cache)

    def test_beginning_hidden_later(self, model: Any) -> None:
        cache = model(tokens(10)[None]).past_key_values
        mask = torch.ones(1, 11, dtype=torch.long)
        mask[0, :3] = 0
        with pytest.raises(deltakv.MaskError, match="hole in row 0"):
            model(tokens(1)[None], attention_mask=mask, past_key_values=cache)
        self.check_usable(model, cache)

    def test_shorter_than_the_cache(self, model: Any) -> None:
        cache = model(tokens(10)[None]).past_key_values
        with pytest.raises(deltakv.MaskError, match=r"shape \[1, 1\], but the cache holds 10 columns and 1 are new"):
            model(tokens(1)[None], attention_mask=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        self.check_usable(model, cache)

    def test_longer_than_the_cache(self, model: Any) -> None:
        with pytest.raises(deltakv.MaskError, match=r"must be \[1, 5\] and cover all turns"):
            model(tokens(5)[None], attention_mask=torch.ones(1, 7, dtype=torch.long))

    def test_four_dimensions(self, model: Any) -> None:
        with pytest.raises(deltakv.MaskError, match="4 dimensions; only a 2-D mask of padding"):
            model(tokens(5)[None], attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))

    def test_shows_what_was_padding(self, model: Any) -> None:
        batch = ragged(10, 6)
        cache = model(**batch).past_key_values
        with pytest.raises(deltakv.MaskError, match="shows tokens of row 1 that were padding when they were stored"):
            model(tokens(2).view(2, 1), attention_mask=torch.ones(2, 11, dtype=torch.long), past_key_values=cache)

    def test_left_out_after_padding(self, model: Any) -> None:
        cache = model(**ragged(10, 6)).past_key_values
        with pytest.raises(deltakv.MaskError, match="no attention_mask was given, but earlier turns"):
            model(tokens(2).view(2, 1), past_key_values=cache)

    def test_shows_again_what_was_dropped(self, model: Any) -> None:
        """Tokens that a mask has dropped from a row's end are gone."""
        cache = model(tokens(20).view(2, 10)).past_key_values
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[0, 8:10] = 0
        model(tokens(2).view(2, 1), attention_mask=mask, past_key_values=cache)
        with pytest.raises(deltakv.MaskError, match="shows tokens of row 0 that were padding"):
            model(tokens(2).view(2, 1), attention_mask=torch.ones(2, 12, dtype=torch.long), past_key_values=cache)

    def check_usable(self, model: Any, cache: Any) -> None:
        row = torch.cat([tokens(10), tokens(1, seed=4)])
        ours = model(row[None, 10:], past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(ours, model(row[None]).logits[0, -1], atol=1e-4, rtol=0)


def test_an_empty_row_of_padding_alone(model_of: Any) -> None:
    """A row without any token: its neighbours do not notice, and its own output is finite nonsense at worst."""
    model, rows = model_of("llama"), [tokens(80), tokens(0)]
    with deltakv.apply(model, METHOD):
        alone, _ = decode(model, left_padded(rows[:1]), tokens(3)[None])
        batch = left_padded(rows)
        together, _ = decode(model, batch, torch.stack([tokens(3), tokens(3)]))
    torch.testing.assert_close(together[0], alone[0], atol=1e-4, rtol=0)
    assert together.isfinite().all()
