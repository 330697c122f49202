"""A bundle answers the same on any number of devices."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.errors import InputError
from runtime.executor import Timings
from runtime.programs import choose_devices
from tests.keye_jax.golden_prompts import CASES
from tests.runtime.test_executor import generate, golden_prompt


@pytest.mark.slow
def test_golden_tokens_on_several_devices(golden: dict[str, np.ndarray], golden_bundle: Path) -> None:
    """Exported for the mesh, weights restored into it, all prompts as one batch of unequal rows. (The other preset:
    `test_processes.py`.)"""
    devices = 4
    engine = Engine(Bundle.open(golden_bundle), devices=devices)
    rows = generate(engine.executor(), [golden_prompt(golden, case) for case in CASES])
    for case, row in zip(CASES, rows, strict=True):
        assert row == golden[f"{case}/fp8_on/decode_tokens"].tolist(), case
    assert engine.executor().programs.mesh.size == devices


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match=rf"--devices 99 must be from 1 to {len(jax.devices())}"):
        choose_devices(99)


def test_a_cpu_is_one_device_unless_told() -> None:
    assert len(choose_devices(None)) == 1


@pytest.mark.parametrize("devices", [2, 8])
def test_vision_rows_of_several_devices_are_in_the_order_of_the_prompt(
    golden: dict[str, np.ndarray], golden_bundle: Path, golden_engine: Engine, devices: int
) -> None:
    """Images and frames of several sizes, one after the other: more of them than devices, and fewer."""
    spread = Engine(Bundle.open(golden_bundle), devices=devices).executor()
    for case in CASES:
        prompt: Any = golden_prompt(golden, case)
        expected = golden_engine.executor()._encode(prompt, Timings())
        rows = spread._encode(prompt, Timings())
        assert (rows is None) == (expected is None), case
        if rows is not None and expected is not None:
            # Another place in a pack rounds sums in another order, on one device as well.
            np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=case)
