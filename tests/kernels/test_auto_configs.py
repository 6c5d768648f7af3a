"""Kernels run with a table's configs, and the Triton backend runs operations as a table names."""

import torch

import peftkern
from peftkern.kernels import common
from peftkern.ops import triton_backend, tuned
from peftkern.ops.lora_experts import lora_experts
from tests.kernels.racing import FakeClock, dispatcher, drawn, entry, ship, step
from tests.mixtures import mixture, numbers


def launches(monkeypatch):
    seen = {}
    real = common.Launch.run

    def run(self):
        seen.setdefault(self.kernel.fn.__name__, []).append(self.meta)
        real(self)

    monkeypatch.setattr(common.Launch, "run", run)
    return seen


def config(op, fields, M=12, N=0, K=0, **more):
    choice = "one_pass" if op == "grad_sb" else None
    return entry(op, choice, M=M, N=N, K=K, config=fields, **more)


def test_kernels_run_with_the_configs_of_a_table(monkeypatch, tmp_path):
    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        ship(tmp_path, [
            config("shrink", {"block_m": 16, "block_k": 32, "split_k": 1, "num_warps": 2}, K=40),
            config("expand", {"block_m": 16, "block_n": 32, "num_warps": 1}, N=24),
            config("grad_sb", {"block_m": 16, "block_n": 16, "num_warps": 1}, N=24),
            config("grad_a", {"block_m": 16, "block_k": 32, "num_warps": 1}, K=40),
            config("low_rank_grad_input", {"block_m": 16, "block_n": 64, "num_warps": 2}, K=40),
            config("shrink_expand", {"block_m": 16, "block_k": 64, "block_n": 16}, N=24, K=40),
            config("grad_xa", {"block_m": 16, "block_k": 32, "num_warps": 1}, K=40),
            config("gemm", {"block_m": 16, "block_n": 32, "block_k": 16}, N=24, K=40),
            config("gemm_grad_input", {"block_m": 32, "block_n": 32, "block_k": 16}, N=24, K=40),
            config("decode", {"block_n": 8, "block_k": 16, "num_warps": 1}, N=24, K=40),
            config("decode", {"block_n": 4, "block_k": 64, "num_warps": 1}, M=1, N=24, K=40),
            # too far from 12 rows: the kernel's own default knows better
            config("shrink", {"block_m": 128, "block_k": 128}, M=4096, K=48),
        ])  # fmt: skip
        seen = launches(monkeypatch)
        for product in triton_backend.PRODUCTS:
            monkeypatch.setattr(triton_backend, "product", product)
            with peftkern.use_backend("triton"):
                step(*drawn())
                x, w, A, B = drawn(grad=False)
                peftkern.lora_linear(x, w, None, A, B, 2.0)
                peftkern.lora_linear(x[:1], w, None, A, B, 2.0)
        assert {m["BLOCK_K"] for m in seen["_shrink_kernel"]} == {32}
        assert {m["num_warps"] for m in seen["_shrink_kernel"]} == {2}
        assert [m["BLOCK_N"] for m in seen["_expand_kernel"]] == [32, 64]  # expand, dX
        assert {m["BLOCK_N"] for m in seen["_grad_sb_kernel"]} == {16}
        assert {m["BLOCK_K"] for m in seen["_grad_a_kernel"]} == {32}
        assert [(m["BLOCK_K"], m["BLOCK_N"]) for m in seen["_shrink_expand_kernel"]] == [(64, 16)]
        assert {m["num_warps"] for m in seen["_grad_xa_kernel"]} == {1}
        assert [m["BLOCK_M"] for m in seen["_gemm_kernel"]] == [16, 32]
        assert {m["BLOCK_K"] for m in seen["_rows_kernel"]} == {16}
        assert {m["BLOCK_N"] for m in seen["_gemv_kernel"]} == {4}
        seen.clear()
        with peftkern.use_backend("triton"):
            step(*drawn(K=48))
        assert seen["_shrink_kernel"][0]["BLOCK_M"] != 128


def test_two_passes_over_dy_where_the_table_says_so(monkeypatch, tmp_path):
    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        ship(tmp_path, [entry("grad_sb", "two_pass", K=0)])
        seen = launches(monkeypatch)
        with peftkern.use_backend("triton"):
            step(*drawn())
        assert "_grad_sb_kernel" not in seen and len(seen["_grad_a_kernel"]) == 2


def test_a_config_that_a_kernel_refuses_is_ignored(monkeypatch, tmp_path, caplog):
    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        ship(tmp_path, [config("shrink", {"block_m": 17}, K=40)])
        with peftkern.use_backend("triton"):
            step(*drawn())
        assert "a config of a tuning table is ignored: ShrinkConfig.block_m is 17" in caplog.text


def test_the_triton_backend_takes_its_product_from_a_table_and_never_races(monkeypatch, tmp_path):
    with dispatcher(monkeypatch, tmp_path, FakeClock()) as clock:
        seen = launches(monkeypatch)
        times = {"torch": 1.0, "hybrid": 3.0, "fused": 2.0}
        tuned.book(-1).keep([entry("forward", "torch", times=times)])
        with peftkern.use_backend("triton"):
            step(*drawn())
            assert "_gemm_kernel" in seen and len(seen["_expand_kernel"]) == 1  # dX by the default
            x, w, A, B = drawn(grad=False)
            peftkern.lora_linear(x, w, None, A, B, 2.0)
            assert "_rows_kernel" in seen  # the default
            tuned.book(-1).keep([entry("infer", "hybrid", M=8)])  # the nearest bucket
            seen.clear()
            peftkern.lora_linear(x, w, None, A, B, 2.0)
            assert "_expand_kernel" in seen and "_rows_kernel" not in seen
        assert clock.races == 0


def test_a_decision_is_made_once_for_the_shapes_and_again_for_a_new_table(monkeypatch, tmp_path):
    asked, real = [], tuned.config
    monkeypatch.setattr(tuned, "config", lambda op, *a: asked.append(op) or real(op, *a))
    with dispatcher(monkeypatch, tmp_path, FakeClock()), peftkern.use_backend("triton"):
        seen = launches(monkeypatch)
        before = step(*drawn())
        assert sorted(asked) == ["expand", "grad_a", "grad_sb", "low_rank_grad_input", "shrink"]
        asked.clear()
        step(*drawn())
        assert asked == []
        step(*drawn(M=13))  # other facts
        assert len(asked) == 5
        seen.clear()
        tuned.book(-1).keep([
            config("shrink", {"block_m": 16, "block_k": 32, "split_k": 1, "num_warps": 2}, K=40),
        ])  # fmt: skip
        after = step(*drawn())
        assert [m["num_warps"] for m in seen["_shrink_kernel"]] == [2]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for product in triton_backend.PRODUCTS:  # a way that is asked for counts at once
            monkeypatch.setattr(triton_backend, "product", product)
            seen.clear()
            step(*drawn())
            assert ("_gemm_kernel" in seen) == (product == "fused")
            assert ("_shrink_expand_kernel" in seen) == (product == "joined")


def test_the_facts_of_decisions_are_bounded(monkeypatch, tmp_path):
    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        monkeypatch.setattr(tuned, "MOST_DECIDED", 5)
        x = torch.zeros(2, 2)
        made = [tuned.decided(x, (i,), lambda i=i: i) for i in range(20)]
        assert made == list(range(20)) and len(tuned.book(-1).decided) <= 5


def test_kernels_of_mixtures_run_with_the_configs_of_a_table(monkeypatch, tmp_path):
    T, K, inner, N, E, top = 12, 24, 20, 18, 5, 2
    made = mixture(p=0.3, dtype=torch.float32, sizes=(T, K, inner, N, E, top))

    def of(op, fields, n, k, what, r=4, mask=True):
        sizes = dict(N=n, K=k, r=r, experts=E, top=top)
        rows = "" if op == "experts_decode" else "16 "  # 24 pairs of 5 experts
        return config(op, fields, mask=mask, grads=rows + what, **sizes)

    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        step = {"num_stages": 2}
        ship(tmp_path, [
            of("experts_shrink", {"block_m": 16, **step}, 0, K, "gather", 3),
            of("experts_gemm", {"block_n": 32, **step}, 2 * inner, K, "gather", 3, False),
            of("experts_gate", {"block_k": 32, **step}, 0, inner, "halves", 2),
            of("experts_gemm", {"block_n": 64, **step}, N, inner, "rows", 2, False),
            of("experts_grad_sb", {"block_c": 32, **step}, N, 0, "gather", 2, False),
            of("experts_gemm_grad_input", {"block_n": 32, **step}, N, inner, "gather", 2),
            of("experts_gate_grad", {"block_k": 64, **step}, 0, inner, "halves", 3),
            of("experts_grad_a", {"block_c": 32, **step}, 0, K, "gather", 3),
            of("experts_gemm_grad_input", {"block_n": 64, **step}, 2 * inner, K, "rows", 3),
            of("experts_decode", {"up_n": 8, **step}, 2 * inner, K, "halves", 3, False),
        ])  # fmt: skip
        seen = launches(monkeypatch)
        with peftkern.use_backend("triton"):
            found = numbers(call, made)
            few = made._replace(**{
                part: getattr(made, part)._replace(factors=tuple(
                    f._replace(p=0.0) for f in getattr(made, part).factors
                )) for part in ("up", "down")
            })  # fmt: skip
            with torch.no_grad():
                call(few)
    assert all(t.isfinite().all() for t in found.values())
    tuned_ones = {
        "_experts_shrink_kernel": [{"BLOCK_M": 16}],
        "_experts_gemm_kernel": [{"BLOCK_N": n} for n in (32, 64, 32, 64)],
        "_experts_gate_kernel": [{"BLOCK_K": 32}],
        "_experts_grad_sb_kernel": [{"BLOCK_N": 32}],
        "_experts_gate_grad_kernel": [{"BLOCK_K": 64}],
        "_experts_grad_a_kernel": [{"BLOCK_K": 32}],
        "_experts_few_up_kernel": [{"BLOCK_N": 8}],
    }
    for kernel, wanted in tuned_ones.items():
        metas = [{**own, "num_stages": 2} for own in wanted]
        held = [{name: m[name] for name in own} for m, own in zip(seen[kernel], metas, strict=True)]
        assert held == metas, kernel


def call(m):
    return lora_experts(*m[:6])
