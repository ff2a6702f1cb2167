"""The process of `qsparse bench generate`: one shape, its variants in turns.

    python -m pipeline.bench.generate_worker JOB_JSON RESULT_JSON      (with torchrun's environment variables)

Checked before anything is timed: a step with weights in two bits gives the bits of a step with int8 codes, whose
product is that of training.  Timed: each round reads the same beginning, then so many tokens, with every variant.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipeline.bench.kernels.timing import Rates, quartiles, synchronize
from pipeline.bench.train_categories import category
from pipeline.bench.train_variants import SHAPES as TRAINED
from pipeline.bench.train_variants import VARIANTS as TRAININGS
from pipeline.bench.train_variants import Shape
from pipeline.bench.train_worker import wait_for_sign
from pipeline.config import Config
from pipeline.run_entry import prepare_process

if TYPE_CHECKING:
    from pipeline.decoding import Decoder
    from pipeline.model import Model

VARIANTS = ("dense", "bitnet", "qsparse-bitnet")
SHAPES = {
    **{name: TRAINED[name] for name in ("tiny", "1.3b")},
    "7b": Shape(
        {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32},
        2048,
        1,
        vocab_size=32000,
    ),
}
CHECKED_STEPS = 4


class Job(NamedTuple):
    """What the process does."""

    shape: str
    """Key of `SHAPES`."""
    rows: Sequence[int]
    """Texts at once."""
    device: str
    rounds: int
    """Times that each variant is timed."""

    @property
    def steps(self) -> int:
        """Tokens timed in a round."""
        return SHAPES[self.shape].seq_length // 64 or 1

    @property
    def beginning(self) -> int:
        """Tokens of a text before them."""
        return SHAPES[self.shape].seq_length // 4

    def config(self, variant: str) -> Config:
        """The run whose model generates."""
        shape = SHAPES[self.shape]
        model = {**shape.model, "vocab_size": shape.vocab_size, "qsparse": TRAININGS[variant].qsparse}
        return Config.model_validate(
            {
                "run": {"device": self.device},
                "model": model,
                "training": {"seq_length": shape.seq_length, "precision": "bf16"},
                "tracking": {"mlflow": False},
            }
        )


def main(job: Job, output: Path) -> None:
    """Write the rows, and what is wrong."""
    prepare_process(job.config("dense"))
    from pipeline.world import parallel_world  # megatron-core may be imported only now

    wait_for_sign()
    with parallel_world(job.config("dense")), torch.no_grad():
        models = {variant: _model(job, variant) for variant in VARIANTS}
        wrong = [message for variant in VARIANTS for message in _wrong(job, variant, models[variant])]
        rows = [] if wrong else [row for count in job.rows for row in _rows(job, count, models)]
    output.write_text(json.dumps({"wrong": wrong, "rows": rows}), encoding="utf-8")


def _model(job: Job, variant: str) -> "Model":
    from pipeline.model import build_model

    return build_model(job.config(variant), SHAPES[job.shape].vocab_size)


def _wrong(job: Job, variant: str, model: "Model") -> Iterator[str]:
    """Whether packing the weights changes a logit."""
    from pipeline.decoding import decoding

    for count in job.rows:
        tokens, found = _tokens(job, count), []
        for pack in (True, False):
            with decoding(model, job.config(variant), num_rows=count, pack=pack) as decoder:
                decoder.start(tokens[:, : job.beginning])
                found.append([decoder.step(token).clone() for token in tokens[:, -CHECKED_STEPS:].unbind(1)])
        if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
            yield f"{job.shape} {variant}, {count} rows: logits of packed weights differ"


def _tokens(job: Job, count: int) -> Tensor:
    generator = torch.Generator(job.device).manual_seed(0)
    size = (count, job.beginning + job.steps)
    return torch.randint(SHAPES[job.shape].vocab_size, size, generator=generator, device=job.device)


def _rows(job: Job, count: int, models: "dict[str, Model]") -> list[dict[str, str]]:
    from pipeline.decoding import decoding

    tokens = _tokens(job, count)
    samples: dict[str, list[float]] = {variant: [] for variant in models}
    products: dict[str, float] = {}
    with ExitStack() as stack:
        decoders = {
            variant: stack.enter_context(decoding(model, job.config(variant), num_rows=count))
            for variant, model in models.items()
        }
        for round_ in range(job.rounds + 1):
            for variant, decoder in decoders.items():
                decoder.start(tokens[:, : job.beginning])
                seconds = _timed(job, decoder, tokens)
                if round_:  # the first one compiles and captures
                    samples[variant].append(1e3 * seconds / job.steps)
        for variant, decoder in decoders.items():
            products[variant] = _products_ms(job, decoder, tokens)
    base = statistics.median(samples["dense"])
    rate = Rates(job.device, 8192 if job.device == "cuda" else 256).bytes_per_us
    found = []
    for variant, milliseconds in samples.items():
        low, median, high = quartiles(milliseconds)
        found.append(
            {
                "shape": job.shape,
                "rows": str(count),
                "variant": variant,
                "ms": f"{median:.3f}",
                "q25_ms": f"{low:.3f}",
                "q75_ms": f"{high:.3f}",
                "tokens_per_s": f"{1e3 * count / median:.1f}",
                "products_ms": f"{products[variant]:.3f}",
                "floor_ms": f"{_bytes_read(job, variant, models[variant], count) / rate / 1e3:.3f}",
                "speedup": f"{base / median:.3f}",
            }
        )
    return found


def _timed(job: Job, decoder: "Decoder", tokens: Tensor) -> float:
    """Seconds that the tokens after the beginning take."""
    synchronize()
    begin = time.perf_counter()
    for token in tokens[:, job.beginning :].unbind(1):
        decoder.step(token)
    synchronize()
    return time.perf_counter() - begin


def _products_ms(job: Job, decoder: "Decoder", tokens: Tensor) -> float:
    """Milliseconds of one step in matrix products."""
    decoder.start(tokens[:, : job.beginning])
    synchronize()
    on_gpu = job.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        decoder.step(tokens[:, -1])
        synchronize()
    events: Any = profiler.events()
    spent = [event.device_time if on_gpu else event.self_cpu_time_total for event in events if _is_product(event.name)]
    return sum(spent) / 1e3


def _is_product(name: str) -> bool:
    return category(name) == "GEMM"


def _bytes_read(job: Job, variant: str, model: "Model", count: int) -> float:
    """Bytes that a step has to read: weights of layers and output, keys and values.

    Of one row the weights of zero activations are left out; several rows leave out few of them together.
    """
    from pipeline.model import unwrap

    layout = TRAININGS[variant].qsparse
    shape, (chunk,) = SHAPES[job.shape], model.chunks
    linear = sum(layer.module.weight.numel() for layer in model.layers)
    kept = 1.0 - (layout.get("sparsity", 0.0) if count == 1 else 0.0)
    per_weight = 0.25 * kept if layout.get("weights") == "ternary" else 2.0
    memory = 4 * shape.model["num_layers"] * shape.model["hidden_size"] * count * (job.beginning + job.steps // 2)
    return per_weight * linear + 2 * unwrap(chunk).output_layer.weight.numel() + memory


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
