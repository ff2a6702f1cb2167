"""What a GPU cannot do is said with the way out; GPUs are not needed to say it."""

from collections.abc import Callable

import pytest
import torch

from pipeline.config_loader import load_config
from pipeline.device_memory import explained, remedies
from pipeline.errors import DeviceMemoryError, UserError
from pipeline.exit_codes import ExitCode
from pipeline.model import build_model
from pipeline.run_entry import run_ranks

QUANTIZED = ["model.qsparse.weights=ternary", "model.qsparse.activations=int8"]


def test_8_bit_gradients_need_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    for key in ("model.qsparse.gradients=e4m3", "model.qsparse.rules=[{match: '*', gradients: e4m3}]"):
        config = load_config(None, ["run.device=cuda", *QUANTIZED, key])
        with pytest.raises(
            UserError, match=r"8.9 or higher.*A100-SXM4-80GB \(8\.0\): use model.qsparse.gradients=full"
        ):
            build_model(config, 256)


def memory_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_memory_that_does_not_suffice_ends_with_its_code_and_remedies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 70 * 2**30)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 80 * 2**30))
    config = load_config(None, [*QUANTIZED, "training.global_batch_size=8", "training.micro_batch_size=8"])

    def work() -> None:
        with explained(config, 3, "in step 12"):
            memory_error()

    with pytest.raises(SystemExit) as end:
        run_ranks(work)
    assert end.value.code == ExitCode.OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert (
        "error: rank 3 is out of GPU memory in step 12: 70.0 of 80.0 GiB were in tensors. Less take a smaller" in said
    )
    assert "training.micro_batch_size (8), training.recompute=up_projection, training.recompute=full" in said


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], lambda found: "training.recompute=up_projection" not in found),
        (["training.recompute=full", *QUANTIZED], lambda found: not any("recompute" in one for one in found)),
        (
            [*QUANTIZED, "training.precision=bf16", "run.keep_bf16_weights=true"],
            lambda found: "run.keep_bf16_weights=false" in found,
        ),
        ([*QUANTIZED, "model.moe={num_experts: 4}"], lambda found: "training.recompute=up_projection" not in found),
    ],
)
def test_remedies_are_ones_that_the_run_can_take(overrides: list[str], wanted: Callable[[list[str]], bool]) -> None:
    assert wanted(remedies(load_config(None, overrides)))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), explained(load_config(None, []), 0, "in step 1"):
        _ = 1 / 0
    assert issubclass(DeviceMemoryError, MemoryError)
