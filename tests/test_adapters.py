"""The algebra of LoRA: against its parts, LyCORIS' own code, and convolutions done by torch one after the other."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lora_convert.converters.adapters import Lora

OUT, IN, RANK = 6, 5, 3
KERNELS = [(), (1, 1), (3, 3), (1, 3)]
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def stored(kernel: tuple[int, ...], *, tucker: bool = False, rank: int = RANK, dtype: type = np.float64) -> dict:
    """Random tensors as trainers store them."""
    random = np.random.default_rng(rank + 10 * len(kernel) + 100 * sum(kernel))
    ones = (1,) * len(kernel)
    shapes = {"down": (rank, IN, *kernel), "up": (OUT, rank, *ones)}
    if tucker:
        shapes |= {"down": (rank + 1, IN, *ones), "mid": (rank, rank + 1, *kernel)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def cases() -> list:
    return [
        pytest.param(kernel, tucker, dtype, id=f"{kernel}-{'tucker' if tucker else 'plain'}-{np.dtype(dtype).name}")
        for kernel in KERNELS
        for tucker in ([False, True] if kernel else [False])
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("kernel", "tucker", "dtype"), cases())
def test_delta_is_the_sum_over_the_ranks(kernel, tucker, dtype):
    tensors = stored(kernel, tucker=tucker, dtype=dtype)
    delta = Lora.from_tensors(tensors, -0.75, kernel).deltas()["weight"]
    wide = {name: values.astype(np.float64) for name, values in tensors.items()}
    expected = np.zeros((OUT, IN, *kernel))
    for i in range(RANK):
        inner = wide["down"][i]
        if tucker:
            inner = sum(wide["down"][j] * wide["mid"][i, j].reshape(1, *kernel) for j in range(wide["down"].shape[0]))
        expected += -0.75 * wide["up"][:, i].reshape(OUT, 1, *(1,) * len(kernel)) * inner
    assert delta.dtype == np.float64
    assert delta.shape == expected.shape
    np.testing.assert_allclose(delta, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "tucker", "dtype"), cases())
def test_to_lora_and_rows_keep_the_delta(kernel, tucker, dtype):
    adapter = Lora.from_tensors(stored(kernel, tucker=tucker, dtype=dtype), 0.3, kernel)
    delta = adapter.deltas()["weight"]
    plain = adapter.to_lora()
    assert plain.mid is None
    assert plain.to_lora() is plain
    assert (plain is adapter) == (not tucker)
    np.testing.assert_array_equal(plain.deltas()["weight"], delta)
    for start, stop in ((0, OUT), (0, 2), (2, 5), (5, 6)):
        for part in (adapter.rows(start, stop), adapter.rows(start, stop).to_lora(), plain.rows(start, stop)):
            np.testing.assert_allclose(part.deltas()["weight"], delta[start:stop], rtol=1e-13)


@pytest.mark.parametrize("shape", [(), (1, 1)])
@pytest.mark.parametrize("kernel", [(), (1, 1)])
def test_matrices_and_1x1_kernels_are_the_same(shape, kernel):
    tensors = stored(())
    spelt = {name: values.reshape(*values.shape, *shape) for name, values in tensors.items()}
    delta = Lora.from_tensors(spelt, 1.0, kernel).deltas()["weight"]
    assert delta.shape == (OUT, IN, *kernel)
    np.testing.assert_array_equal(delta.reshape(OUT, IN), Lora.from_tensors(tensors, 1.0, ()).deltas()["weight"])


def test_a_flattened_kernel_is_the_same():
    tensors = stored((3, 3))
    flat = tensors | {"down": tensors["down"].reshape(RANK, -1)}
    first, second = (Lora.from_tensors(spelt, 1.0, (3, 3)).deltas()["weight"] for spelt in (tensors, flat))
    assert first.shape == (OUT, IN, 3, 3)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tucker", [False, True])
def test_rank_0_changes_nothing(kernel, tucker):
    tensors = stored(kernel, rank=0)
    if tucker:
        tensors["mid"] = np.zeros((0, 0, *(kernel or (1, 1))))
        tensors["down"] = np.zeros((0, IN, 1, 1))
    adapter = Lora.from_tensors(tensors, 2.0, kernel)
    for each in (adapter, adapter.to_lora(), adapter.rows(0, OUT)):
        delta = each.deltas()["weight"]
        assert delta.shape == (OUT, IN, *kernel)
        assert not delta.any()


def test_a_scale_of_zero_changes_nothing():
    assert not Lora.from_tensors(stored(()), 0.0, ()).deltas()["weight"].any()


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_delta_is_lycoris(kernel, tucker):
    pytest.importorskip("lycoris")
    torch = pytest.importorskip("torch")
    from lycoris.functional.locon import diff_weight
    from lycoris.modules.locon import LoConModule

    base = torch.nn.Conv2d(IN, OUT, kernel) if kernel else torch.nn.Linear(IN, OUT)
    module = LoConModule("name", base, lora_dim=RANK, alpha=2.0, use_tucker=tucker).double()
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    state = {name: value.detach().numpy() for name, value in module.custom_state_dict().items()}
    scale = float(state.pop("alpha")) / RANK
    tensors = {name.removeprefix("lora_").removesuffix(".weight"): values for name, values in state.items()}
    assert ("mid" in tensors) == (tucker and kernel not in ((), (1, 1)))
    delta = Lora.from_tensors(tensors, scale, kernel).deltas()["weight"]
    np.testing.assert_allclose(delta, module.get_diff_weight()[0].detach().numpy(), rtol=1e-6, atol=1e-12)
    factors = [None if values is None else torch.tensor(values) for values in map(tensors.get, ("down", "up", "mid"))]
    expected = diff_weight(*factors, gamma=scale, backend="torch").numpy()
    np.testing.assert_allclose(delta, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"stride": 2, "padding": 1}], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3)])
def test_delta_does_what_the_convolutions_do_in_turn(kernel, options, tucker):
    torch = pytest.importorskip("torch")
    from torch.nn.functional import conv2d

    tensors = stored(kernel, tucker=tucker)
    down, up, mid = (None if name not in tensors else torch.tensor(tensors[name]) for name in ("down", "up", "mid"))
    image = torch.tensor(np.random.default_rng(1).standard_normal((2, IN, 8, 9)))
    inner = conv2d(conv2d(image, down), mid, **options) if tucker else conv2d(image, down, **options)
    delta = torch.tensor(Lora.from_tensors(tensors, 1.5, kernel).deltas()["weight"])
    torch.testing.assert_close(conv2d(image, delta, **options), 1.5 * conv2d(inner, up))
