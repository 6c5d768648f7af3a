"""gptqmodel's own layers: read bit for bit, fused, merged into and restored.

They run where gptqmodel is installed. Its requirements name a torch with CUDA and a numpy that
triton's interpreter cannot use, so `make test` does not install it:

    pip install --no-deps gptqmodel==7.7.0 pypcre logbar threadpoolctl device-smi tokenicer defuser
    python -m pytest tests/test_bases_gptqmodel.py
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops.bases import repack
from peftkern.ops.bases.formats import read
from tests.closeness import assert_as_good_as_torch
from tests.quantised_models import dense, llama

pytestmark = pytest.mark.skipif(
    find_spec("gptqmodel") is None, reason="gptqmodel is not installed (see the file's first lines)"
)
KINDS = [
    # (kind, bits, group size, act-order, symmetric, format of the zero points)
    *(("TorchLinear", bits, 32, False, False, 2) for bits in (2, 3, 4, 8)),
    ("TorchLinear", 4, 32, True, True, 2),
    ("TorchLinear", 4, 32, True, True, 1),
    ("TorchLinear", 4, -1, False, True, 1),
    ("AwqTorchLinear", 4, 32, False, False, 0),
    ("AwqTorchLinear", 8, 32, False, False, 0),
]


def layer(
    linear: nn.Linear, kind: str = "TorchLinear", bits: int = 4, size: int = 32,
    order: bool = False, sym: bool = False, zeros: int = 2,
) -> Any:  # fmt: skip
    """A layer of gptqmodel, packed by it from scales that its quantiser finds."""
    from types import SimpleNamespace

    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.quantizer import Quantizer
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    N, K = linear.weight.shape
    cls = {c.__name__: c for c in (TorchLinear, AwqTorchLinear)}[kind]
    made = cls(
        bits=bits, group_size=size, sym=sym, desc_act=order, in_features=K, out_features=N,
        bias=linear.bias is not None, register_buffers=True, pack_dtype=torch.int32,
    )  # fmt: skip
    groups = torch.arange(K) // (K if size == -1 else size)
    if order:
        groups = groups[torch.randperm(K, generator=torch.Generator().manual_seed(0))]
    quantizer = Quantizer(SimpleNamespace(bits=bits, sym=sym, mse=0.0))
    quantizer.configure(perchannel=True)
    found = []
    for group in range(int(groups.max()) + 1):
        quantizer.find_params(linear.weight.detach()[:, groups == group], weight=True)
        found.append((quantizer.scale.half().float(), quantizer.zero))
    scales, points = (torch.cat(t, 1) for t in zip(*found, strict=True))
    pack = getattr(made, "pack_original", made.pack)
    pack(linear, scales, points, g_idx=groups.int())
    for name, buffer in list(made._buffers.items()):  # packed in inference mode
        if buffer is not None:
            made._buffers[name] = buffer.detach().clone()
    made.optimized = True  # else torch.compile takes a minute, and is bound to the first layer
    made.post_init()
    if kind == "TorchLinear":
        made.qzero_format(2)  # as it has packed them
        if zeros == 1:
            convert_gptq_v2_to_v1_format_module(
                made, SimpleNamespace(bits=bits, pack_dtype=torch.int32)
            )
            assert made.qzero_format() == 1
    return made.requires_grad_(False)


def owners(module: Any) -> Tensor:
    """W [N, K] by the owner's own dequantisation, which takes zero points of the second format."""
    if hasattr(module, "dequantize_weight"):
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        twin = copy.deepcopy(module)
        if twin.qzero_format() == 1:
            convert_gptq_v1_to_v2_format_module(twin, bits=twin.bits, pack_dtype=torch.int32)
        w: Tensor = type(twin).dequantize_weight(twin).t()
        return w
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    found: Tensor = dequantize_gemm(
        qweight=module.qweight, qzeros=module.qzeros, scales=module.scales, bits=module.bits,
        group_size=module.group_size,
    )  # fmt: skip
    return found.t()


def numbers(module: Any, dtype: torch.dtype = torch.float16) -> Tensor:
    found = read(module)
    assert not isinstance(found, str), found
    return found.packed.dense(dtype)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_owners_dequantisation_bit_for_bit(kind: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    made = layer(linear, *kind)
    W = numbers(made)
    assert torch.equal(W, owners(made))
    error = (W.float() - linear.weight).norm() / linear.weight.norm()
    if kind[:2] != ("AwqTorchLinear", 8):  # whose packing lets codes over 255 begin anew at 0
        assert error < {2: 0.5, 3: 0.2, 4: 0.12, 8: 0.006}[kind[1]]  # the zero points are right


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_merged_weight_is_packed_by_the_owner_and_restored(kind: Any) -> None:
    torch.manual_seed(0)
    made = layer(nn.Linear(128, 64), *kind)
    W = numbers(made, torch.float32)
    held = {name: t.clone() for name, t in made._buffers.items() if t is not None}
    before, error = repack.write(made, W)
    assert error == 0.0  # a weight that did not change keeps its codes
    assert all(torch.equal(getattr(made, name), t) for name, t in held.items())
    before.put(made)
    config: Any = dict(r=4, target_modules=["0"], init_lora_weights=False, lora_alpha=2)
    model: Any = peftkern.get_peft_model(nn.Sequential(made), peftkern.LoraConfig(**config))
    inner, x = model.base_model.model[0], torch.randn(5, 128)
    want, y = W + inner.get_delta_weight("default"), model(x)
    with pytest.warns(peftkern.PeftWarning, match="into 1 quantised weights"):
        model.merge_adapter(safe_merge=True)
    merged = numbers(made, torch.float32)
    assert torch.equal(merged.half(), owners(made))
    fresh = nn.Linear(128, 64)
    fresh.weight.data.copy_(want)
    anew = numbers(layer(fresh, *kind), torch.float32)  # what the owner makes of the sum
    assert (merged - want).norm() <= 1.001 * (anew - want).norm()
    assert inner.merge_error == pytest.approx(((merged - want).norm() / want.norm()).item(), 1e-3)
    model.unmerge_adapter()
    assert all(torch.equal(getattr(made, name), t) for name, t in held.items())
    assert torch.equal(model(x), y)
    out = model.merge_and_unload(dequantize=torch.float32)
    torch.testing.assert_close(out[0].weight, want)


@pytest.mark.parametrize("kind", [KINDS[4], KINDS[7]], ids=str)
def test_a_model_of_them_is_fused_and_trains_as_by_their_own_forward(kind: Any) -> None:
    base = llama(lambda m: layer(m, *kind))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    more: Any = dict(r=4, target_modules=names, init_lora_weights=False)
    ours = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    rows = peftkern.explain(ours)
    assert len(rows) == 14 and all(row.fused for row in rows), rows
    theirs = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    exact: Any = peftkern.get_peft_model(dense(base), peftkern.LoraConfig(**more)).double()
    held = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    for model in (theirs, exact):
        assert not model.load_state_dict(held, strict=False).unexpected_keys
    for module in theirs.modules():  # a hook, and the layer is called
        if hasattr(module, "qweight"):
            module.register_forward_hook(lambda *_: None)
    assert not any(row.fused for row in peftkern.explain(theirs))
    from tests.quantised_models import step

    x = torch.randint(0, 64, (2, 9))
    got, owner, right = step(ours, x), step(theirs, x), step(exact, x)
    assert got.keys() == owner.keys() and len(got) == 29
    if kind[0] == "TorchLinear":
        assert_as_good_as_torch(got, owner, right)
    else:  # products in float16 on both sides
        for name, t in got.items():
            assert (t - owner[name]).norm() < 0.03 * owner[name].norm(), name


def test_a_model_that_transformers_loaded_as_gptq_is_merged() -> None:
    base = llama(lambda m: layer(m, *KINDS[4]))
    base.quantization_method = "gptq"  # for which HF PEFT refuses
    more: Any = dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model: Any = peftkern.get_peft_model(base, peftkern.LoraConfig(**more)).train()
    x = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        before = model(input_ids=x).logits
        with pytest.warns(peftkern.PeftWarning, match="into 4 quantised weights"):
            model.merge_adapter()
        assert not torch.equal(model(input_ids=x).logits, before)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=x).logits, before)


def test_what_a_scale_cannot_hold_is_refused_and_nothing_changes() -> None:
    made = layer(nn.Linear(128, 64), "TorchLinear")
    held = {name: t.clone() for name, t in made._buffers.items() if t is not None}
    with pytest.raises(ValueError, match="not finite"):
        repack.write(made, torch.full((64, 128), float("inf")))
    assert all(torch.equal(getattr(made, name), t) for name, t in held.items())
