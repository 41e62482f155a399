"""Where torch runs a model on a GPU: answers, precision, CUDA graphs."""

import threading

import numpy as np
import pytest
from registered_models import X, network

from twinpath.nodes.llm_memory import card_bytes
from twinpath.registry.device import TorchOptions, TorchRunner

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(card_bytes() is None, reason="needs a GPU"),
]
ROWS = X[:300].astype(np.float32)


def exact(n: int = len(ROWS)) -> np.ndarray:
    return TorchRunner(network(), TorchOptions(device="cpu")).run(ROWS[:n])


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"compile": True}])
def test_the_gpu_answers_as_the_cpu(options: dict[str, bool]):
    runner = TorchRunner(network(), TorchOptions(device="cuda", **options))
    assert runner.device.type == "cuda"
    for _ in range(5):
        for n in (1, 3, 64, 300):
            np.testing.assert_allclose(runner.run(ROWS[:n]), exact(n), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_in_float32(dtype: str):
    options = TorchOptions(device="cuda", dtype=dtype, cuda_graphs=True)  # type: ignore[arg-type]
    runner = TorchRunner(network(), options)
    for _ in range(5):
        found = runner.run(ROWS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, exact(), atol=0.05)


def test_a_captured_graph_answers_the_rows_that_it_is_given():
    runner = TorchRunner(network(), TorchOptions(device="cuda", cuda_graphs=True))
    wanted = exact()
    for start in range(0, 290, 5):
        found = runner.run(ROWS[start : start + 7])
        np.testing.assert_allclose(found, wanted[start : start + 7], rtol=1e-3, atol=1e-4)


def test_answers_of_threads_are_not_mixed():
    """Replicas run one batch at a time in a thread, and not always in the same one."""
    runner = TorchRunner(network(), TorchOptions(device="cuda", cuda_graphs=True))
    wanted, lock, wrong = exact(), threading.Lock(), []

    def ask(seed: int) -> None:
        source = np.random.default_rng(seed)
        for _ in range(200):
            start = int(source.integers(0, 280))
            with lock:
                found = runner.run(ROWS[start : start + 16])
            if not np.allclose(found, wanted[start : start + 16], rtol=1e-3, atol=1e-4):
                wrong.append(start)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
