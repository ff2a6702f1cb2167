"""Every key of a run, documented once, where it is defined.  No torch here: a login node reads it.

`Config` is built by `pipeline.config_loader.load_config` from YAML files and dotted overrides.  Checks that concern a
single key stand on the key (type and bounds), checks that tie keys of one section together in the section, and checks
that tie sections together (does the model divide by the layout?) are the rules of `pipeline.config_checks`, all of
which run whenever a `Config` is built.  So a `Config` that exists can be trained; what cannot be known before the
processes start is `Config.check_world_size`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe.config import MoEConfig
from pipeline.config_checks import check_combinations, find_violations
from qsparse_layers.config import QSparseConfig, StrictModel

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(StrictModel):
    """Base of this file's sections: as `StrictModel`, and numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class RunConfig(Section):
    """Where a run lives and what machine it takes."""

    name: str = Field("qsparse", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: its directory under `run.root` and its MLflow run name.  The same name resumes the run."""
    root: Path = Path("runs")
    """Folder that holds all run directories and the embedded MLflow store."""
    seed: int = Field(1234, ge=0, lt=2**62)
    """Seed of weight initialization and dropout; initial weights do not depend on the parallel layout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one; `cpu` runs megatron-core over gloo."""
    backend: Literal["auto", "local", "te"] = "auto"
    """Attention and fused Adam: `te` takes Transformer Engine's, `local` torch's; `auto`: te on a GPU that has it."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Linear layers: `triton` takes the fast kernels (GPU), `reference` plain PyTorch; `auto`: triton on a GPU."""
    cuda_graph: bool = False
    """Run forward and backward of a step as one CUDA graph: less time between kernels, a few percent more memory."""
    keep_bf16_weights: bool = False
    """Keep ternary weights in bf16, too, for the exact backward pass: 2 bytes per weight save a pass per microbatch.
    Needs `gradients: full`, Triton's kernels and bf16; no effect on the CPU, none on any result."""
    deterministic: bool = False
    """Only deterministic kernels; slower on GPUs, no effect on the CPU, which always is."""
    threads: PositiveInt = 1
    """Intra-op threads per process on the CPU."""


class ModelConfig(Section):
    """A GPT decoder: RoPE, RMSNorm, grouped-query attention, no biases."""

    num_layers: PositiveInt = 4
    """Transformer layers."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt = 768
    """Width of the FFN (of each of the two branches for gated activations)."""
    num_attention_heads: PositiveInt = 8
    """Query heads."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads (grouped-query attention); absent: as many as query heads."""
    head_dim: PositiveInt | None = None
    """Width of a head; absent: hidden_size / num_attention_heads."""
    activation: Literal["relu2_glu", "relu2", "swiglu"] = "relu2_glu"
    """FFN: squared-ReLU GLU (Q-Sparse eq. 11, BitNet 2B4T), squared ReLU without gate, or SwiGLU."""
    vocab_size: PositiveInt | None = None
    """Token ids of the model before padding; absent: taken from the dataset's tokenizer."""
    vocab_multiple: PositiveInt = 128
    """The embedding table is padded to a multiple of this, whatever the layout, so checkpoints reshard."""
    tie_embeddings: bool = False
    """Share the embedding table with the output layer."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; residual output projections use init_std / sqrt(2 num_layers)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on attention weights and residual branches."""
    qsparse: QSparseConfig = QSparseConfig()
    """Sparsity and quantization of the linear layers."""
    moe: MoEConfig | None = None
    """Mixture of experts; absent: dense FFNs."""

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def padded_vocab_size(self, vocab_size: int) -> int:
        """`vocab_size` rounded up to `vocab_multiple`."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple


class ParallelConfig(Section):
    """The layout: world size = tp * pp * cp * dp."""

    tp: PositiveInt = 1
    """Tensor parallel size."""
    pp: PositiveInt = 1
    """Pipeline parallel size."""
    vpp: PositiveInt = 1
    """Model chunks per pipeline rank (interleaved schedule if > 1)."""
    cp: PositiveInt = 1
    """Context parallel size (needs Transformer Engine's attention)."""
    ep: PositiveInt = 1
    """Expert parallel size."""
    etp: PositiveInt | None = None
    """Tensor parallel size inside experts; absent: as `tp`."""
    dp: PositiveInt | None = None
    """Data parallel size; absent: what the world size leaves over (1 when `qsparse train` starts the processes)."""
    sequence_parallel: bool = False
    """Shard norms and residual stream over the sequence inside the TP group."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the parameter all-gather with the forward pass (distributed optimizer only)."""
    ternary_param_gather: bool = False
    """Gather ternary weights after a step as 2-bit codes instead of bf16 values, an eighth of the bytes (distributed
    optimizer only; no effect on any result)."""

    @property
    def model_size(self) -> int:
        """Processes that hold one replica: tp * pp * cp."""
        return self.tp * self.pp * self.cp


class TrainingConfig(Section):
    """Batch, length and precision."""

    steps: PositiveInt = 200
    """Optimizer steps of the run."""
    global_batch_size: PositiveInt = 16
    """Sequences per optimizer step, over all replicas and microbatches."""
    micro_batch_size: PositiveInt = 4
    """Sequences per forward pass and replica; the rest is gradient accumulation."""
    seq_length: PositiveInt = 256
    """Tokens per sequence."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Compute type; bf16 keeps fp32 master weights and reduces gradients in fp32.  fp64 serves exactness tests and
    needs run.device=cpu; with `auto` on a machine that has a GPU, that is not noticed before the run starts."""
    recompute: Literal["none", "up_projection", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: the product of the FFN's gate and up projections
    (`up_projection`), core attention (`selective`) or whole layers (`full`)."""
    offload_layers: NonNegativeInt = 0
    """Layers, from the first, whose saved activations wait for the backward pass in the host's memory; fewer than
    `model.num_layers`.  Transformer Engine copies them while other layers compute."""
    eval_interval: NonNegativeInt = 100
    """Steps between held-out evaluations; 0: only at the end."""
    eval_sequences: PositiveInt = 64
    """Held-out sequences per evaluation (always the same ones)."""
    sample_tokens: NonNegativeInt = 64
    """Tokens of the sample generated at the end; 0: none."""


class OptimizerConfig(Section):
    """AdamW and its schedules."""

    lr: PositiveFloat = 1.5e-3
    """Peak learning rate (of the first stage)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Adam's moment decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norm gains and other vectors are exempt."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient-norm clip; 0: off."""
    schedule: Literal["two_stage", "cosine", "linear", "wsd", "constant"] = "two_stage"
    """`two_stage`: BitNet's (training tips to arXiv 2402.17764): linear decay whose peak drops to `stage2_lr` and
    weight decay to 0 at `stage2_start`; `wsd`: warm-up, stable, decay."""
    warmup_steps: NonNegativeInt = 20
    """Linear warm-up from 0 to the peak."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of cosine, linear and wsd."""
    stage2_start: float = Field(0.5, gt=0.0, lt=1.0)
    """`two_stage`: share of the steps after which stage 2 begins."""
    stage2_lr: PositiveFloat = 1e-3
    """`two_stage`: peak learning rate of stage 2."""
    wsd_decay_share: float = Field(0.2, gt=0.0, le=1.0)
    """`wsd`: share of the steps spent in the final decay."""


class SourceConfig(Section):
    """One dataset of a mixture."""

    path: str
    """Dataset folder, or an s3://, gs://, https:// or hf:// address of one."""
    weight: NonNegativeFloat = 1.0
    """Share of the samples, relative to the other sources; 0 for one that only a phase uses."""


class PhaseConfig(Section):
    """What changes from a step or token on; absent keys are as in the sections `data` and `training`."""

    from_step: NonNegativeInt | None = None
    """Optimizer step with which the phase begins."""
    from_tokens: NonNegativeInt | None = None
    """Tokens trained on after which it begins, instead of `from_step`; batch and length change at the next step."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Weights of `data.sources`, in their order."""
    seq_length: PositiveInt | None = None
    """Tokens per sequence; another length than before begins a new epoch of every source."""
    global_batch_size: PositiveInt | None = None
    """Sequences per optimizer step."""


class DataConfig(Section):
    """Which prepared datasets, in which order, how they are read."""

    path: str = "data/stdlib"
    """Dataset folder written by `qsparse data prepare`, or an s3://, gs://, https:// or hf:// address of one."""
    sources: tuple[SourceConfig, ...] = ()
    """Several datasets and their weights, instead of `path`."""
    phases: tuple[PhaseConfig, ...] = ()
    """Changes of weights, sequence length or batch size on the way, in order."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the sample order."""
    shuffle: Literal["auto", "windows", "chunks"] = "auto"
    """`windows`: random access; `chunks`: each chunk is read from front to back by one rank; `auto`: chunks above 2^27
    tokens per source."""
    interleave: PositiveInt | None = None
    """`chunks`: places of the corpus that a round of samples draws from; absent: the global batch size.  Resuming with
    another batch size needs the old value."""
    attention: Literal["full", "document"] = "full"
    """`full`: a token sees all before it in the sequence; `document`: only those of its document, counted from 0."""
    mask_eod_loss: bool = False
    """No loss where the input is EOD: what follows belongs to another document, or is padding of a packed dataset."""
    prefetch_threads: NonNegativeInt = 2
    """Threads that read ahead on each rank that reads; 0: read when a step needs it."""
    prefetch_batches: PositiveInt = 4
    """Steps read ahead at most."""
    bad_shard: Literal["fail", "skip"] = "fail"
    """A chunk that is damaged or cannot be read: end the run, or take other windows in its place and record it."""
    cache: str = "~/.cache/qsparse/data"
    """Folder for chunks of remote datasets; the ranks of a node share it."""
    cache_gigabytes: PositiveFloat = 50.0
    """Size of that folder; what was not used for longest goes first."""
    retries: NonNegativeInt = 5
    """Further attempts after a remote store failed, with waits of 0.5, 1, 2 ... seconds between them."""
    timeout_seconds: PositiveFloat = 60.0
    """Longest time for one request to a remote store."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The mixture; one source if `path` is all there is."""
        return self.sources or (SourceConfig(path=self.path),)


class CheckpointConfig(Section):
    """When to save, what to keep, what to start from."""

    interval: NonNegativeInt = 100
    """Steps between checkpoints; 0: only at the end and on a stop signal."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints at multiples of this step are kept for ever; 0: none."""
    load: Path | None = None
    """Checkpoint of another run to take the initial weights from (optimizer and data order start anew)."""
    upcycle: bool = False
    """`load` is a checkpoint of the same model without `model.moe`: every expert begins as a copy of its layer's FFN
    (sparse upcycling, arXiv 2212.05055)."""


class TrackingConfig(Section):
    """MLflow and the console."""

    mlflow: bool = True
    """Log to MLflow."""
    uri: str | None = None
    """Tracking URI; absent: $MLFLOW_TRACKING_URI, else an embedded SQLite store in `run.root`."""
    experiment: str = "qsparse"
    """MLflow experiment."""
    log_interval: PositiveInt = 10
    """Steps between step lines on the console and metric records."""
    parent: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Sweep that the run belongs to: MLflow shows it below a run of this name; `launch slurm --sweep` sets it."""
    system_metrics: bool = True
    """Log the use of CPU, memory, disk, network and GPUs of rank 0's machine with each record."""


class WatchdogConfig(Section):
    """When a run without progress is a hang (`pipeline.watchdog`)."""

    step_seconds: NonNegativeFloat = Field(300.0, lt=600)
    """Longest time for an optimizer step; 0: no watchdog.  Below the 600 s after which collectives give up."""
    other_seconds: PositiveFloat = Field(540.0, lt=600)
    """The same for the first step of a start (which compiles), an evaluation, a checkpoint and the end of the run."""


class ProfileConfig(Section):
    """What is recorded of some steps (`pipeline.profiling`), into the run's folder `profile`."""

    steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step to record; absent: none."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that record."""
    trace: bool = True
    """A trace of operators and kernels for Perfetto."""
    memory: Literal["off", "oom", "steps"] = "off"
    """History of GPU memory, written when it does not suffice (`oom`), also after `steps`; costs some time."""
    nsys: bool = False
    """Instead of a trace name ranges and mark the steps for `nsys profile --capture-range=cudaProfilerApi`."""

    @model_validator(mode="after")
    def _check_steps(self) -> "ProfileConfig":
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"profile.steps={list(self.steps)}: the first step comes after the last one")
        if self.memory == "steps" and self.steps is None:
            raise ValueError("profile.memory=steps needs profile.steps, the first and the last of them")
        return self


class Config(Section):
    """One run of `qsparse train`."""

    run: RunConfig = RunConfig()
    """Name, place, seed and device of the run."""
    model: ModelConfig = ModelConfig()
    """Shape of the transformer, its sparsity and quantization, its experts."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over processes; the losses do not depend on it."""
    training: TrainingConfig = TrainingConfig()
    """Length, batch, precision and evaluation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, learning rate and weight decay."""
    data: DataConfig = DataConfig()
    """The prepared dataset."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and what to start from."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go: MLflow, the console, how often."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """When a run without progress is a hang."""
    profile: ProfileConfig = ProfileConfig()
    """Recording some steps."""

    @property
    def local_world_size(self) -> int:
        """Processes that `qsparse train` starts: tp * pp * cp * dp, with dp = 1 where it is absent."""
        return self.parallel.model_size * (self.parallel.dp or 1)

    @model_validator(mode="after")
    def _check_combinations(self) -> "Config":
        check_combinations(self)
        return self

    def check_world_size(self, world_size: int) -> int:
        """Data-parallel size under `world_size` processes.

        Raises:
            ValueError: The layout, the batch or the experts do not divide; every reason is listed.
        """
        parallel = self.parallel
        grid = f"parallel.tp={parallel.tp} * parallel.pp={parallel.pp} * parallel.cp={parallel.cp}"
        dp, rest = divmod(world_size, parallel.model_size)
        if rest or dp == 0:
            raise ValueError(f"{world_size} processes are not a multiple of {grid} = {parallel.model_size}")
        if parallel.dp not in (None, dp):
            wanted = self.local_world_size
            raise ValueError(f"{grid} * parallel.dp={parallel.dp} takes {wanted} processes, there are {world_size}")
        resolved = self.model_copy(update={"parallel": parallel.model_copy(update={"dp": dp})})
        if violations := find_violations(resolved):
            reasons = "; ".join(violation.message for violation in violations)
            raise ValueError(f"{world_size} processes make parallel.dp={dp}: {reasons}")
        return dp
