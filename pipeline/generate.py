"""Generate text with a trained model: `qsparse generate RUN_DIR --prompt TEXT`.

It is meant for looking at a run, not for serving: one text at a time.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.run_entry import open_run, run_ranks

if TYPE_CHECKING:
    from pipeline.next_token import Predict


def generate(
    predict: "Predict",
    tokenizer: TextTokenizer,
    prompt: str,
    num_tokens: int,
    *,
    device: torch.device,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue `prompt` by `num_tokens` tokens; collective, the same text on every rank.

    Args:
        predict: the model.
        tokenizer: the dataset's.
        prompt: text to continue.
        num_tokens: tokens to add.
        device: the rank's.
        temperature: softmax temperature; 0 takes the most likely token.
        seed: of the draws.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        logits = predict(ids)[: tokenizer.vocab_size].double().cpu()
        token = _draw(logits, temperature, generator).to(device)
        dist.broadcast(token, 0)  # ranks may differ in the last bit of a logit
        ids.append(int(token))
    return tokenizer.decode(ids)


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature == 0.0:
        return logits.argmax()
    return torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator)[0]


def main() -> None:
    """Load the newest checkpoint of a run and print a continuation."""
    parser = argparse.ArgumentParser(prog="qsparse generate", description="Continue a prompt with a trained model.")
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the run's configuration")
    parser.add_argument("--prompt", default="def ", help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    options = parser.parse_intermixed_args()
    if options.tokens < 1:
        parser.error(f"--tokens {options.tokens}: at least 1 is expected")
    run_ranks(lambda: _continue(options))


def _continue(options: argparse.Namespace) -> None:
    with open_run(options.run_dir, options.overrides) as run:
        from pipeline.next_token import next_token  # megatron-core may be imported only now

        tokenizer = load_tokenizer(run.data.tokenizer_path)
        with next_token(run.learner, tokenizer.eod_id) as predict:
            begin = time.perf_counter()
            text = generate(
                *(predict, tokenizer, options.prompt, options.tokens),
                device=run.world.device,
                temperature=options.temperature,
                seed=options.seed,
            )
        if run.world.is_main:
            seconds = time.perf_counter() - begin
            print(text)
            print(f"{options.tokens} tokens in {seconds:.1f} s, {options.tokens / seconds:.0f} per s", file=sys.stderr)


if __name__ == "__main__":
    main()
