"""A tiny model saved as a folder, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from command_line import LIMIT, Result, Run, save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 6 layers, 4 query and 2 KV heads of 16, limit `LIMIT`. It never ends by itself."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=LIMIT, initializer_range=0.14,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return str(save_model(tmp_path_factory.mktemp("model"), config))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`run("generate", "hello", ...)`: the command line in this process, and what it printed."""
    from deltakv.cli import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much on a busy machine

    def invoke(*args: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(list(args))
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    with torch.inference_mode(False), torch.enable_grad():
        yield invoke
    torch.set_num_threads(threads)
