"""Rife equals an independent transcription, and what holds for every weight holds for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rife_reference import between, random_rife, shapes
from torch.utils.flop_counter import FlopCounterMode

from lightx2v.cost.run_time import RIFE_FLOPS
from lightx2v.models.rife import Rife, warp


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> Rife:
    rife = Rife().to(dtype)
    rife.load_state_dict(random_rife(seed, dtype))
    return rife.eval()


def pictures(height: int, width: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((3, height, width)), rng.random((3, height, width))


@torch.no_grad()
def made(rife: Rife, first: np.ndarray, second: np.ndarray, time: float) -> np.ndarray:
    dtype = next(rife.parameters()).dtype
    a, b = (torch.from_numpy(image)[None].to(dtype) for image in (first, second))
    return rife(a, b, rife.features(a), rife.features(b), time)[0].numpy()


def test_the_names_and_shapes_are_those_of_the_file() -> None:
    assert {name: tuple(slot.shape) for name, slot in Rife().state_dict().items()} == shapes()
    assert 5.5e6 < sum(slot.numel() for slot in Rife().parameters()) < 6e6  # 22 MiB of float32


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "time"), [(64, 128, 0.5), (192, 64, 1 / 3), (64, 64, 0.9)])
def test_a_frame_equals_the_transcription(height: int, width: int, time: float) -> None:
    first, second = pictures(height, width)
    expected = between(random_rife(0, torch.float64), first, second, time)
    assert np.abs(made(network(), first, second, time) - expected).max() < 1e-10
    single = made(network(dtype=torch.float32), first, second, time)
    assert np.abs(single - expected).max() < 1e-3
    assert np.abs(expected - first).mean() > 0.05 and np.abs(expected - second).mean() > 0.05


@pytest.mark.slow
def test_the_time_matters_and_every_weight_does() -> None:
    first, second = pictures(64, 64)
    early, late = (made(network(), first, second, time) for time in (0.25, 0.75))
    assert np.abs(early - late).max() > 1e-3
    rife = network()
    image = torch.from_numpy(first)[None], torch.from_numpy(second)[None]
    rife(*image, *map(rife.features, image), 0.5).square().sum().backward()
    still = [name for name, slot in rife.named_parameters() if slot.grad is None or not slot.grad.any()]
    assert not still


@pytest.mark.slow
def test_two_pictures_of_one_colour_give_that_colour() -> None:
    """Whatever the flow and the mask are: every looked-up pixel has it."""
    plain = np.empty((3, 64, 64))
    plain[:] = np.array([0.2, 0.5, 0.9])[:, None, None]
    assert np.abs(made(network(), plain, plain, 0.3) - plain).max() < 1e-12


def test_a_warp_of_whole_pixels_moves_the_picture_and_keeps_the_edge() -> None:
    x = torch.arange(12.0, dtype=torch.float64).reshape(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    assert torch.equal(warp(x, flow), x)
    flow[:, 0] = 1  # each pixel shows its right neighbour
    assert torch.allclose(warp(x, flow)[0, 0], torch.tensor([[1.0, 2, 3, 3], [5, 6, 7, 7], [9, 10, 11, 11]]).double())
    flow[:, 0], flow[:, 1] = 0.5, -1  # half to the right, one up
    expected = torch.tensor([[0.5, 1.5, 2.5, 3], [0.5, 1.5, 2.5, 3], [4.5, 5.5, 6.5, 7]]).double()
    assert torch.allclose(warp(x, flow)[0, 0], expected)


@torch.no_grad()
def test_a_frame_takes_the_operations_that_the_estimate_counts() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        rife, first, second = Rife(), torch.empty(1, 3, 128, 192), torch.empty(1, 3, 128, 192)
        known = torch.empty(1, 4, 128, 192)
        rife(first, second, known, rife.features(second), 0.5)
    assert counter.get_total_flops() / (128 * 192) == pytest.approx(RIFE_FLOPS, rel=2e-3)
