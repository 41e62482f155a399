"""Where torch runs a model, as far as a machine without a GPU can tell."""

import numpy as np
import pytest
from registered_models import X, network

from twinpath.errors import ConfigError
from twinpath.registry.device import TorchOptions, TorchRunner

pytestmark = pytest.mark.timeout(300)
ROWS = X[:64].astype(np.float32)


def test_auto_takes_what_there_is_and_answers_as_the_module_does():
    import torch

    module = network()
    runner = TorchRunner(module, TorchOptions())
    assert runner.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        expected = module.cpu()(torch.from_numpy(ROWS)).numpy()
    module.to(runner.device)
    np.testing.assert_allclose(runner.run(ROWS), expected, rtol=1e-4, atol=1e-5)
    assert runner.weights_bytes == sum(p.numel() * 4 for p in module.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_halves_the_weights_and_answers_in_float32(dtype: str):
    exact = TorchRunner(network(), TorchOptions(device="cpu")).run(ROWS)
    runner = TorchRunner(network(), TorchOptions(device="cpu", dtype=dtype))  # type: ignore[arg-type]
    found = runner.run(ROWS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, atol=0.05)
    assert not np.array_equal(found, exact)
    assert runner.weights_bytes == sum(p.numel() * 2 for p in network().parameters())


def test_answers_need_no_gradients_and_inputs_may_be_read_only():
    rows = ROWS.copy()
    rows.flags.writeable = False
    assert TorchRunner(network(), TorchOptions(device="cpu")).run(rows).shape == (64, 1)


def test_layers_that_differ_in_training_are_in_evaluation():
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5))
    runner = TorchRunner(module, TorchOptions(device="cpu"))
    np.testing.assert_array_equal(runner.run(ROWS), runner.run(ROWS))


def test_cuda_graphs_are_left_out_on_a_cpu():
    runner = TorchRunner(network(), TorchOptions(device="cpu", cuda_graphs=True))
    assert [runner.run(ROWS[:n]).shape for n in (1, 3, 64)] == [(1, 1), (3, 1), (64, 1)]


def test_a_gpu_that_is_not_there_is_said_when_it_is_asked_for():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="this process has none"):
        TorchRunner(network(), TorchOptions(device="cuda"))
