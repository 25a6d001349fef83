"""The GPU backend's parts on CPU tensors, each called in a process of its own by test_gpu_backend.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

PAGE, WIDTH, HEADS, KV_HEADS, DIM = 16, 24, 4, 2, 32
ROLES = "WFSRWRSRW"
OPTIONS = {"budget": 64, "recent": 16, "sinks": 16, "min_context": 96}


def make_layout() -> Any:
    from deltakv.config import Delta
    from deltakv.integrations.vllm.layout import Layout
    from deltakv.integrations.vllm.settings import Settings

    settings = Settings(Delta(**OPTIONS, plan=ROLES))
    layout = Layout.of(settings, settings.method.layer_plan(len(ROLES)), range(len(ROLES)))
    return layout.named({index: f"layers.{index}" for index in range(len(ROLES))})


def make_batch(lengths: list[int], seed: int) -> dict[str, Any]:
    """Rows on pages in any order; entries behind a row's end, and slots behind its last token, are poison."""
    generator = torch.Generator().manual_seed(seed)
    layers, pages = len(ROLES), WIDTH * len(lengths) + 1
    table = (torch.randperm(pages - 1, generator=generator) + 1).int().view(len(lengths), WIDTH)
    kv = torch.randn((layers, pages, PAGE, KV_HEADS, 2 * DIM), generator=generator)
    for row, length in enumerate(lengths):
        used = -(-length // PAGE)
        if length % PAGE:
            kv[:, table[row, used - 1], length % PAGE :] = float("nan")
        kv[:, table[row, used:].long()] = float("nan")
        table[row, used:] = torch.iinfo(torch.int32).max
    q = torch.randn((layers, len(lengths), HEADS, DIM), generator=generator) * 3
    return {"q": q, "kv": kv, "table": table, "lens": torch.tensor(lengths, dtype=torch.int32)}


def run(layout: Any, q: Tensor, kv: Tensor, table: Tensor, lens: Tensor, prompts: Tensor) -> Tensor:
    """All layers of a step, as the backend runs them. Returns [layers, rows, heads, dim]."""
    from deltakv.integrations.vllm.gpu_step import DecodeStep
    from deltakv.methods import selector

    step = DecodeStep(layout, selector(layout.settings.method), table, lens, prompts)
    outputs = []
    for index in range(len(ROLES)):
        k_cache, v_cache = kv[index].split(DIM, dim=-1)
        out = torch.full_like(q[index], float("nan"))
        step.attend(f"layers.{index}", lambda _: step, q[index], k_cache, v_cache, DIM**-0.5, None, out)
        outputs.append(out)
    return torch.stack(outputs)


def expected(q: Tensor, kv: Tensor, table: Tensor, lens: Tensor, prompts: Tensor) -> Tensor:
    """The same in plain loops, which share nothing with the ops."""
    outputs = torch.zeros_like(q)
    for row, length in enumerate(lens.tolist()):
        if not length:
            continue
        pages = -(-length // PAGE)
        kept = window = list(range(length))
        if length > OPTIONS["min_context"] and pages > OPTIONS["budget"] // PAGE:
            window = kept[: OPTIONS["sinks"]] + kept[(pages - (OPTIONS["budget"] - OPTIONS["sinks"]) // PAGE) * PAGE :]
        for index, role in enumerate(ROLES):
            stored = kv[index][table[row, :pages].long()].flatten(0, 1)[:length].repeat_interleave(2, 1)
            tokens = kept if role == "R" else window if role == "W" else list(range(length))
            tokens = list(range(length)) if prompts[row] else tokens
            keys, values = stored[tokens].split(DIM, dim=-1)
            weights = torch.softmax(torch.einsum("hd,thd->ht", q[index, row], keys) * DIM**-0.5, -1)
            outputs[index, row] = torch.einsum("ht,thd->hd", weights, values)
            if role == "S":
                kept = list(range(length))
                if length > OPTIONS["min_context"] and pages > OPTIONS["budget"] // PAGE:
                    worth = torch.zeros(pages * PAGE)
                    worth[:length] = weights.amax(0)
                    worth = worth.view(pages, PAGE).sum(1)
                    free = sorted(range(1, pages - 1), key=lambda page: -float(worth[page]))
                    chosen = sorted({0, pages - 1, *free[: OPTIONS["budget"] // PAGE - 2]})
                    kept = [token for page in chosen for token in range(page * PAGE, page * PAGE + PAGE)]
                    kept = [token for token in kept if token < length]
    return outputs


def replayed() -> None:
    """A step is traced without values, as a graph captures it, and run on others: rows of any length beside each
    other, padding, rows that cross `min_context`, and last tokens of prompts."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from deltakv.integrations.vllm import gpu_step

    gpu_step.across_ranks = lambda _: None  # no group of ranks here
    layout = make_layout()
    first = make_batch([1] * 8, seed=0)
    none = torch.zeros(8, dtype=torch.bool)
    graph = make_fx(lambda *tensors: run(layout, *tensors), tracing_mode="fake")(*first.values(), none)
    for seed, lengths, prompts in (
        (1, [1, 15, 16, 95, 96, 97, 112, 384], []),
        (2, [300, 0, 17, 0, 383, 353, 0, 0], []),
        (3, [0] * 8, []),
        (4, [380, 200, 129, 64, 384, 1, 0, 0], [0, 3, 4]),
    ):
        batch, marked = make_batch(lengths, seed), none.clone()
        marked[prompts] = True
        got, want = graph(*batch.values(), marked), expected(*batch.values(), marked)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        if seed == 1:  # the rows are such that a pick shows, and a window
            far = got - expected(*batch.values(), torch.ones(8, dtype=torch.bool))
            for layer in (ROLES.index("R"), ROLES.index("W")):
                assert far[layer, -1].abs().max() > 0.01 > far[layer, :5].abs().max()
    print("as expected")


def common(query_lens: list[int], seq_lens: list[int], prefilling: list[bool], tokens: int | None = None) -> Any:
    """vLLM's metadata of such a batch."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    tokens = tokens or int(starts[-1])
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts.clone(), seq_lens=lens, num_reqs=len(query_lens),
        num_actual_tokens=tokens, max_query_len=max(query_lens), max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(len(query_lens) * 3, dtype=torch.int32).view(-1, 3),
        slot_mapping=torch.arange(tokens), is_prefilling=torch.tensor(prefilling),
        seq_lens_cpu_upper_bound=lens.clone(),
    )  # fmt: skip


def split() -> None:
    """Which rows have one token, which of them read a prompt, and what is left behind them."""
    from deltakv.errors import UnsupportedUseError
    from deltakv.integrations.vllm.gpu_batch import behind, last_of_prompts, one_token_rows

    padded = common([1, 1, 1, 0], [70, 9, 30, 0], [False, True, False], tokens=4)
    assert one_token_rows(padded) == 4
    assert last_of_prompts(padded, 4).tolist() == [False, True, False, False]

    mixed = common([1, 1, 5, 7], [40, 33, 5, 90], [False, True, True, True])
    assert one_token_rows(mixed) == 2
    rest = behind(mixed, 2)
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == [0, 5, 12]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len) == (2, 12, 7)
    assert rest.seq_lens.tolist() == rest.seq_lens_cpu_upper_bound.tolist() == [5, 90]
    assert rest.block_table_tensor.tolist() == [[6, 7, 8], [9, 10, 11]] and rest.slot_mapping.tolist()[0] == 2
    assert rest.is_prefilling.tolist() == [True, True]

    assert one_token_rows(common([4, 2], [4, 2], [True, True])) == 0
    assert one_token_rows(common([4, 1], [4, 1], [True, True])) == 0  # a prompt of one token: nothing to leave out
    for question in (
        lambda: one_token_rows(common([4, 1], [4, 50], [True, False])),
        lambda: last_of_prompts(mixed.replace(is_prefilling=None), 2),
    ):
        try:
            question()
        except UnsupportedUseError:
            continue
        raise AssertionError("not refused")
    print("as expected")


def marked() -> None:
    """Which rows read a prompt is told in place, at an address that a graph may have captured, and taken back."""
    from deltakv.integrations.vllm.gpu import SparseGPUBuilder

    builder = SparseGPUBuilder.__new__(SparseGPUBuilder)
    builder._prompts, builder._any_prompts = torch.zeros(6, dtype=torch.bool), False
    address = builder._prompts.data_ptr()
    for step, want in (([1, 0, 1], [0, 2]), ([0, 0, 0, 0], []), ([0, 1, 0, 0, 1, 1], [1, 4, 5]), ([1, 0], [0])):
        builder._mark(torch.tensor(step, dtype=torch.bool))
        assert builder._prompts.nonzero().flatten().tolist() == want, (step, want)
    assert builder._prompts.data_ptr() == address
    print("as expected")


def beside() -> None:
    """Settings with another backend than CUSTOM, where vLLM would never ask deltakv."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from deltakv.errors import UnsupportedUseError
    from deltakv.integrations.vllm.beside import watch

    seen: list[Any] = []
    platform = SimpleNamespace(check_and_update_config=seen.append)
    watch(platform)
    once = platform.check_and_update_config
    watch(platform)
    assert platform.check_and_update_config is once, "wrapped twice"

    def config(additional: Any, backend: Any) -> Any:
        attention = SimpleNamespace(backend=backend, backend_per_kind=None)
        return SimpleNamespace(additional_config=additional, attention_config=attention)

    for passes in (config({}, None), config({"deltakv": {}}, AttentionBackendEnum.CUSTOM), config(None, None)):
        platform.check_and_update_config(passes)
        assert seen.pop() is passes
    for backend in (None, AttentionBackendEnum.FLASH_ATTN):
        try:
            platform.check_and_update_config(config({"deltakv": {}}, backend))
        except UnsupportedUseError as error:
            assert "is not CUSTOM for all layers" in str(error) and not seen
        else:
            raise AssertionError(backend)
    print("as expected")


def platforms() -> None:
    """What CUSTOM is, and what is said, on other platforms and versions."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from deltakv.integrations.vllm import plugin, refused

    kind = type(current_platform)
    kind.is_cpu = lambda _: False  # type: ignore[method-assign]
    for gpu, version, name, said in (
        (True, "0.26.0", "SparseGPUBackend", None),
        (True, "0.27.1", "SparseGPUBackend", None),
        (True, "0.32.0", "RefusedBackend", "not checked on vLLM 0.32.0 on a GPU; checked are 0.26"),
        (False, "0.27.1", "RefusedBackend", "on NVIDIA GPUs and on the CPU, and this platform is"),
        (False, "0.31.0", "RefusedBackend", "not checked on vLLM 0.31.0; checked are"),
    ):
        kind.is_cuda = lambda _, gpu=gpu: gpu  # type: ignore[method-assign]
        vllm.__version__ = version
        plugin.register()
        assert AttentionBackendEnum.CUSTOM.get_path().endswith(f".{name}"), (version, gpu)
        assert not AttentionBackendEnum.FLASH_ATTN.is_overridden() and not AttentionBackendEnum.CPU_ATTN.is_overridden()
        why = refused.refusal()
        assert why is None if said is None else said in str(why), why
        for question in ("validate_configuration", "get_name", "get_impl_cls") if said else ():
            try:
                getattr(AttentionBackendEnum.CUSTOM.get_class(), question)()
            except ValueError as error:
                assert str(error) == why
            else:
                raise AssertionError(question)
    print("as expected")


def backend() -> None:
    """What vLLM asks of the class, where its parent's answer is not the right one."""
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from deltakv.integrations.vllm import gpu
    from deltakv.integrations.vllm.gpu import SparseGPUBackend, SparseGPUBuilder

    assert AttentionBackendEnum[SparseGPUBackend.get_name()] is AttentionBackendEnum.CUSTOM
    assert SparseGPUBackend.get_builder_cls() is SparseGPUBuilder
    support = SparseGPUBuilder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert SparseGPUBuilder.reorder_batch_threshold == 1 and not SparseGPUBuilder.supports_update_block_table
    assert not SparseGPUBuilder.use_cascade_attention(None, 4096)
    sizes = [SparseGPUBackend.supports_head_size(size) for size in (64, 128, 256, 257, 512)]
    assert sizes == [True, True, True, False, False] and not SparseGPUBackend.supports_mm_prefix()
    _one_group_of_both_kinds(gpu)
    gpu.importlib.util.find_spec = lambda _: None
    try:
        SparseGPUBackend.get_impl_cls()
    except ValueError as error:
        assert "install triton" in str(error)
    else:
        raise AssertionError("not refused")
    print("as expected")


def _one_group_of_both_kinds(gpu: Any) -> None:
    """One metadata cannot serve a layer that is in the plan and one that is not."""
    from deltakv.errors import UnsupportedModelError

    layout = SimpleNamespace(roles={"layers.1": None})
    parent = patch.object(gpu.SparseGPUBuilder.__mro__[1], "__init__", lambda *_: None)
    with parent, patch.multiple(gpu, check=lambda *_: layout, loaded_layout=lambda *_: layout):
        try:
            gpu.SparseGPUBuilder(None, ["layers.0", "layers.1"], None, torch.device("cpu"))
        except UnsupportedModelError as error:
            assert "one metadata for layers.1" in str(error) and "leave deltakv out" in str(error)
        else:
            raise AssertionError("not refused")


def figures() -> None:
    """Counts are those of the method, row by row; they are shown at once, or once in a while."""
    import json
    import os
    import tempfile
    from pathlib import Path

    from deltakv.config import Delta
    from deltakv.integrations.vllm import figures as module
    from deltakv.plan import Role

    folder = Path(tempfile.mkdtemp())
    os.environ["DELTAKV_FIGURES"] = str(folder)
    now = [100.0]
    module.time = SimpleNamespace(monotonic=lambda: now[0])
    method = Delta(**OPTIONS)
    roles = [Role(letter) for letter in ROLES]
    steps = ([1, 96, 97, 5000], [64, 65, 112, 113, 2 * 5000], [], [300])
    for seconds in (0.0, 1.0):
        counted = module.Figures("worker", method, roles, True, seconds)
        want = dict.fromkeys(module.Counts.__dataclass_fields__, 0)
        shown = []
        for step in steps:
            counted.step(torch.tensor(step).numpy())
            for length in step:
                left_out = -(-length // PAGE) - method.kept_pages(length)
                want["decode_rows"] += 1
                want["sparse_rows"] += left_out > 0
                want["picks"] += (left_out > 0) * ROLES.count("S")
                want["attended_tokens"] += length * len(ROLES) - left_out * PAGE * (ROLES.count("R") + ROLES.count("W"))
                want["full_tokens"] += length * len(ROLES)
            shown.append(json.loads((folder / "worker.json").read_text())["decode_rows"])
            now[0] += 0.6
        assert vars(counted.counts) == want
        assert shown == ([4, 9, 9, 10] if seconds == 0 else [4, 4, 4, 10]), shown
    print("as expected")


def ranks() -> None:
    """On a GPU vLLM's NCCL communicator is asked for the largest of each token; where it is off, that is refused. Each
    rank does a share of the rows, whatever their number, and all get the pages of all."""
    from deltakv.errors import UnsupportedUseError
    from deltakv.integrations.vllm import ranks as module

    largest = torch.distributed.ReduceOp.MAX

    def pages_of(tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (-1, 16)).sum(-1)

    class Rank:
        """One of two, as NCCL has them: it knows what the others give."""

        def __init__(self, rank: int, given: list[Tensor]) -> None:
            self.rank, self.largest = rank, torch.stack(given).amax(0)

        def share(self, whole: Tensor, rank: int, rows: int) -> Tensor:
            whole = torch.nn.functional.pad(whole, (0, 0, 0, 2 * rows - len(whole)))
            return whole[rank * rows : (rank + 1) * rows]

        def reduce_scatter(self, mine: Tensor, tokens: Tensor, op: Any) -> None:
            assert op == largest and tokens.is_contiguous() and len(tokens) == 2 * len(mine)
            mine.copy_(self.share(self.largest, self.rank, len(mine)))

        def all_gather(self, everyones: Tensor, pages: Tensor) -> None:
            torch.testing.assert_close(pages, pages_of(self.share(self.largest, self.rank, len(pages))))
            for rank in range(2):
                everyones[rank * len(pages) :][: len(pages)] = pages_of(self.share(self.largest, rank, len(pages)))

    for rows in (1, 2, 5, 8):
        given = list(torch.randn((2, rows, 64)))
        want = pages_of(torch.maximum(*given))
        for rank in range(2):
            got = module.in_shares(Rank(rank, given), 2, given[rank].clone(), pages_of)
            torch.testing.assert_close(got, want)

    nccl = SimpleNamespace(disabled=False)
    module.get_tp_group = lambda: SimpleNamespace(
        world_size=2, device_communicator=SimpleNamespace(pynccl_comm=nccl)
    )  # fmt: skip
    module.in_shares = lambda *asked: asked
    scores = SimpleNamespace(is_cuda=True)
    assert module.pages_over_ranks(scores, pages_of) == (nccl, 2, scores, pages_of)
    nccl.disabled = True
    try:
        module.pages_over_ranks(scores, pages_of)
    except UnsupportedUseError as error:
        assert 'tp_selection="local"' in str(error)
    else:
        raise AssertionError("not refused")
    print("as expected")
