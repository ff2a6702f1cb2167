"""Speed of the decode products on a GPU, against dense bf16 and against the bytes that have to travel.

    python benchmarks/kernels_decode.py --sweep configs.json             best configuration per product and shape
    python benchmarks/kernels_decode.py --configs configs.json --csv decode.csv
    python benchmarks/kernels_decode.py --csv decode.csv --figure decode.png    (the figure alone needs no GPU)

Nothing is timed before every product has agreed with the reference on the shapes to be timed.  A time is the median of
CUDA graph replays, variants interleaved, divided by the calls in the graph; each call reads the next of several copies
of the weight, 256 MB together, so that no weight is found in the second-level cache (50 MB).  The floor is what the
unavoidable bytes take at the speed of a copy measured in the same run: the weights of the union of the tokens'
nonzero features.  Launches are inside: `listed+compact` counts the prologue that makes the list, the others do not.

Shapes: T tokens, D input features, O output features.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SHAPES = ((14336, 4096), (4096, 14336))
TOKENS = (1, 2, 4, 8, 16)
SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.8, 0.9)
ROTATION_BYTES = 256 * 2**20
DENSE = "dense bf16"
FIELDS = ("device", "torch", "triton", "D", "O", "T", "sparsity", "product", "us", "floor_us", "dense_us", "config")
GEMV_SHAPES = (  # block_rows, block_columns, tiles, num_warps
    (64, 128, 1, 4), (64, 64, 1, 4), (64, 64, 1, 2), (128, 128, 1, 8), (128, 64, 1, 4), (128, 64, 1, 8),
    (128, 32, 1, 4), (128, 32, 1, 2), (64, 128, 2, 8), (64, 64, 2, 4), (32, 128, 2, 4), (32, 256, 1, 4),
)  # fmt: skip
DOT_SHAPES = (  # block_outputs, block_words, num_warps, num_stages
    (64, 32, 4, 4), (64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 3),
)  # fmt: skip
FLOAT_SHAPES = ((16, 512, 2, 4), (16, 512, 8, 4), (32, 512, 4, 8), (32, 256, 4, 4), (16, 1024, 4, 8), (16, 256, 8, 2))


@dataclass
class Problem:
    """Operands of one (D, O, T, sparsity), weights in enough copies to defeat the second-level cache."""

    D: int
    O: int  # noqa: E741
    T: int
    sparsity: float
    codes: Any
    scales: dict[str, Any]
    weights: dict[str, list[Any]]

    @property
    def capacity(self) -> int:
        """K of top-K."""
        return int((1 - self.sparsity) * self.D)

    def weight_bytes(self, bytes_per_weight: float) -> float:
        """Bytes of the weights of all features that some token needs."""
        return float((self.codes != 0).any(0).sum()) * self.O * bytes_per_weight


def make_weights(D: int, O: int) -> dict[str, list[Any]]:  # noqa: E741
    """Rotating copies: packed in both layouts, bf16 [O, D] and bf16 [D, O]."""
    import torch

    from kernels.packing import pack_ternary

    ternary_OD = torch.randint(-1, 2, (O, D), dtype=torch.int8, device="cuda")
    dense_OD = torch.randn(O, D, dtype=torch.bfloat16, device="cuda")
    weights: dict[str, list[Any]] = {"ternary": [ternary_OD]}
    for layout in ("column", "row"):
        packed = pack_ternary(ternary_OD, layout=layout)
        copies = -(-ROTATION_BYTES // packed.num_bytes)
        weights[layout] = [type(packed)(packed.words.clone(), layout, O, D) for _ in range(copies)]
    copies = -(-ROTATION_BYTES // (2 * D * O))
    weights["dense"] = [dense_OD.clone() for _ in range(copies)]
    weights["dense_t"] = [dense_OD.t().contiguous() for _ in range(copies)]
    return weights


def make_problem(D: int, O: int, T: int, sparsity: float, weights: dict[str, list[Any]]) -> Problem:  # noqa: E741
    """Random codes without zeros of which exactly K per token are kept."""
    import torch

    from kernels import reference

    codes_TD = torch.randint(1, 128, (T, D), dtype=torch.int8, device="cuda")
    codes_TD *= torch.randint(0, 2, (T, D), dtype=torch.int8, device="cuda") * 2 - 1
    mask_TD = reference.topk_mask(torch.rand(T, D, device="cuda"), int((1 - sparsity) * D))
    scales = {"x_scale_T1": torch.rand(T, 1, device="cuda"), "weight_scale_O": torch.rand(O, device="cuda")}
    return Problem(D, O, T, sparsity, reference.apply_mask(codes_TD, mask_TD), scales, weights)


def products(problem: Problem, configs: dict[str, dict[str, Any]]) -> dict[str, list[Callable[[], Any]]]:
    """For each product, one call per copy of its weight.

    Args:
        problem: operands.
        configs: options per product from a sweep; products without an entry take their default.
    """
    import torch

    from kernels import decode as d

    codes, scales, weights = problem.codes, problem.scales, problem.weights
    floats = codes.bfloat16()
    listed, float_listed = (d.compact_nonzero(x, problem.capacity) for x in (codes, floats))
    padded = weights["column"][0].words_per_row * 16
    workspace = d.Workspace.allocate("cuda", num_sums=problem.T * padded, num_arrivals=problem.T * 4096)

    def gemv(name: str, x: Callable[[], Any], features: Any = "nonzero") -> list[Callable[[], Any]]:
        config = _config(d.GemvConfig, configs.get(name))
        options = {**scales, "features": features, "config": config, "workspace": workspace}
        return [partial(_with, d.ternary_gemv, x, w, options) for w in weights["column"]]

    def float_gemv(name: str, x: Any, features: Any = "nonzero") -> list[Callable[[], Any]]:
        config = _config(d.GemvConfig, configs.get(name))
        options = {"features": features, "config": config, "workspace": workspace}
        return [partial(d.float_gemv, x, w, **options) for w in weights["dense_t"]]

    dot_options = {**scales, "config": _config(d.DotConfig, configs.get("dot")), "workspace": workspace}
    return {
        DENSE: [partial(torch.nn.functional.linear, floats, w) for w in weights["dense"]],
        "gemv nonzero": gemv("gemv nonzero", lambda: codes),
        "gemv listed": gemv("gemv listed", lambda: listed),
        "gemv listed+compact": gemv("gemv listed", lambda: d.compact_nonzero(codes, problem.capacity)),
        "gemv all": gemv("gemv all", lambda: codes, "all"),
        "dot": [partial(d.ternary_dot, codes, w, **dot_options) for w in weights["row"]],
        "bf16 nonzero": float_gemv("bf16 nonzero", floats),
        "bf16 listed": float_gemv("bf16 listed", float_listed),
    }


def _with(product: Any, make_x: Callable[[], Any], weight: Any, options: dict[str, Any]) -> Any:
    return product(make_x(), weight, **options)


def _config(kind: Any, options: dict[str, Any] | None) -> Any:
    return None if options is None else kind(**options)


def require_correct(problem: Problem, calls: dict[str, list[Callable[[], Any]]]) -> None:
    """Refuse to time a product that disagrees with its reference.

    Raises:
        SystemExit: naming the product and the problem.
    """
    for name, variants in calls.items():
        if name != DENSE and not _agrees(problem, variants[0](), floats=name.startswith("bf16")):
            where = f"D={problem.D} O={problem.O} T={problem.T} sparsity={problem.sparsity}"
            raise SystemExit(f"{name} disagrees with the reference at {where}: no speed is reported")


def _agrees(problem: Problem, found: Any, *, floats: bool) -> bool:
    """Bit equality for codes; for floats the error bound of n float32 additions and one rounding to bf16."""
    import torch

    from kernels import reference

    if not floats:
        weight = problem.weights["ternary"][0]
        return found.equal(reference.linear(problem.codes, weight, **problem.scales, dtype=torch.bfloat16))
    x, weight = problem.codes.double(), problem.weights["dense_t"][0].double()
    exact, magnitude = x @ weight, x.abs() @ weight.abs()
    bound = problem.D * 2**-23 * magnitude + 2**-8 * exact.abs()
    return bool(((found.double() - exact).abs() <= bound).all())


def times(calls: dict[str, list[Callable[[], Any]]], *, replays: int = 9, least_calls: int = 32) -> dict[str, float]:
    """Median microseconds per call of each variant, their graph replays interleaved."""
    import torch

    graphs = {}
    for name, variants in calls.items():
        repeats = -(-least_calls // len(variants))
        for call in variants[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in variants:
                    call()
        graphs[name] = (graph, repeats * len(variants))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(replays + 1):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1000 / count)
    return {name: statistics.median(values[1:]) for name, values in samples.items()}  # the first replay warms up


def copy_bytes_per_us() -> float:
    """Bytes read and written per microsecond by a copy of 512 MB."""
    import torch

    source = torch.empty(2**29, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / times({"copy": [lambda: target.copy_(source)]}, least_calls=8)["copy"]


def candidates(product: str, num_rows: int, T: int, O: int) -> Iterator[dict[str, Any]]:  # noqa: E741
    """Configurations to try; `rows` is chosen so that programs fill whole waves of the multiprocessors."""
    import torch

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    if product == "dot":
        names = ("block_outputs", "block_words", "num_warps", "num_stages")
        for shape in DOT_SHAPES:
            for splits in (1, 2, 4, 8):
                yield {**dict(zip(names, shape, strict=True)), "splits": splits}
        return
    floats = product.startswith("bf16")
    for shape in FLOAT_SHAPES if floats else GEMV_SHAPES:
        options = dict(zip(("block_rows", "block_columns", "tiles", "num_warps"), shape, strict=True))
        yield options
        held = options["block_rows"] * options["tiles"]
        columns = T * -(-O // (options["block_columns"] * (1 if floats else 16)))
        for waves in (1, 2, 3, 4):
            rows = -(-num_rows // max(1, processors * waves // columns))
            if 0.7 * held <= rows < held:
                yield {**options, "rows": rows}


def sweep(path: Path, tokens: tuple[int, ...]) -> None:
    """Time every candidate at half sparsity, print the three best per product, write the best as JSON."""
    best: list[dict[str, Any]] = []
    print("|   T |     D |     O | product      |    us | configuration |\n|---|---|---|---|---|---|")
    for D, O in SHAPES:  # noqa: E741
        weights = make_weights(D, O)
        for T in tokens:
            problem = make_problem(D, O, T, 0.5, weights)
            require_correct(problem, products(problem, {}))
            for product in ("gemv nonzero", "gemv listed", "gemv all", "dot", "bf16 nonzero", "bf16 listed"):
                if T > 4 and product != "dot":
                    continue
                num_rows = problem.capacity if product.endswith("listed") else D
                tried = {}
                for options in candidates(product, num_rows, T, O):
                    calls = products(problem, {product: options})[product]
                    require_correct(problem, {product: calls})
                    tried[json.dumps(options)] = times({product: calls}, replays=3)[product]
                ranked = sorted(tried.items(), key=lambda item: item[1])
                for options_text, us in ranked[:3]:
                    print(f"| {T:3} | {D:5} | {O:5} | {product:12} | {us:5.2f} | {options_text} |", flush=True)
                best.append({"product": product, "D": D, "O": O, "T": T, "config": json.loads(ranked[0][0])})
    path.write_text(json.dumps(best, indent=1) + "\n")


def chosen(best: list[dict[str, Any]], D: int, O: int, T: int) -> dict[str, dict[str, Any]]:  # noqa: E741
    """Per product, the swept configuration of this shape with the nearest number of tokens."""
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(best, key=lambda entry: -abs(entry["T"] - T)):
        if (entry["D"], entry["O"]) == (D, O):
            found[entry["product"]] = entry["config"]
    return found


def measure(best: list[dict[str, Any]], tokens: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One row per product and problem."""
    import torch
    import triton

    speed = copy_bytes_per_us()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(f"{about}; copy {speed / 1e6:.2f} TB/s")
    for D, O in SHAPES:  # noqa: E741
        weights = make_weights(D, O)
        for T in tokens:
            for sparsity in SPARSITIES:
                problem, configs = make_problem(D, O, T, sparsity, weights), chosen(best, D, O, T)
                calls = products(problem, configs)
                require_correct(problem, calls)
                found = times(calls)
                for product, us in found.items():
                    per_weight = 2.0 if "bf16" in product else 0.25
                    dense = product in (DENSE, "dot", "gemv all")
                    num_bytes = D * O * per_weight if dense else problem.weight_bytes(per_weight)
                    yield {
                        **about, "D": D, "O": O, "T": T, "sparsity": sparsity, "product": product, "us": us,
                        "floor_us": num_bytes / speed, "dense_us": found[DENSE],
                        "config": json.dumps(configs.get(product.removesuffix("+compact"), {})),
                    }  # fmt: skip


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Break-even map: speed-up of the fastest ternary product over dense bf16, over sparsity and tokens."""
    from matplotlib.figure import Figure

    shapes = sorted({(int(row["D"]), int(row["O"])) for row in rows}, reverse=True)
    figure = Figure(figsize=(6 * len(shapes), 4), layout="constrained")
    for axes, (D, O) in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):  # noqa: E741
        here = [row for row in rows if (int(row["D"]), int(row["O"])) == (D, O) and "bf16" not in row["product"]]
        here = [row for row in here if row["product"] != "gemv listed"]  # its list is made outside of the time
        tokens = sorted({int(row["T"]) for row in here})
        sparsities = sorted({float(row["sparsity"]) for row in here})
        grid: list[list[float]] = []
        for y, T in enumerate(tokens):
            grid.append([])
            for x, sparsity in enumerate(sparsities):
                cell = [row for row in here if int(row["T"]) == T and float(row["sparsity"]) == sparsity]
                fastest = min(cell, key=lambda row: float(row["us"]))
                gain = float(fastest["dense_us"]) / float(fastest["us"])
                grid[-1].append(gain)
                axes.text(x, y, f"{gain:.1f}x\n{fastest['product']}", ha="center", va="center", fontsize=6)
        image = axes.imshow(grid, origin="lower", aspect="auto", cmap="RdYlGn", vmin=0, vmax=10)
        axes.set_xticks(range(len(sparsities)), [f"{sparsity:.0%}" for sparsity in sparsities])
        axes.set_yticks(range(len(tokens)), [str(T) for T in tokens])
        axes.set(xlabel="zero activations", ylabel="tokens", title=f"{D} -> {O}, {here[0]['device']}")
        figure.colorbar(image, ax=axes, label="speed-up over dense bf16")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, metavar="JSON", help="try configurations, write the best ones")
    parser.add_argument("--configs", type=Path, metavar="JSON", help="use the configurations of a sweep")
    parser.add_argument("--csv", type=Path, help="results: written, or read if --figure is given")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the break-even map of --csv")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    if arguments.figure:
        if not arguments.csv:
            parser.error("--figure draws the file given by --csv")
        draw(list(csv.DictReader(arguments.csv.open())), arguments.figure)
        return
    import torch

    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA GPU; --figure with --csv does not")
    if arguments.sweep:
        sweep(arguments.sweep, tuple(arguments.tokens))
        return
    best = json.loads(arguments.configs.read_text()) if arguments.configs else []
    rows = []
    for row in measure(best, tuple(arguments.tokens)):
        rows.append(row)
        print(
            f"D={row['D']:5} O={row['O']:5} T={row['T']:2} sparsity={row['sparsity']:.1f} {row['product']:20}"
            f" {row['us']:7.2f} us  floor {row['floor_us']:6.2f}  {row['dense_us'] / row['us']:5.2f}x dense",
            flush=True,
        )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
