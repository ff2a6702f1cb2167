"""From configuration to model chunks: megatron-core's GPT with our linear layers, and weights that no layout changes.

The layer specification is built from megatron-core's public pieces around `QSparseMoESpecProvider`.  Embedding, output
layer and router do not come from it: they stay dense.

Initial weights are drawn per matrix from a generator seeded by (seed, path in the whole model), as the whole matrix,
of which each rank keeps its shard: TP, PP, EP and VPP give the same model bit for bit, which megatron-core's own
initialization does not.
"""

import hashlib
import importlib.util
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor
from torch.nn import Module

from kernels.dispatch import Kernels, kernels_for
from moe.experts import QSparseSequentialMLP
from moe.grouped import QSparseGroupedMLP
from moe.layer import RoutedLayer, configure_moe_layers
from moe.spec import QSparseMoESpecProvider, moe_spec
from pipeline.config import Config, ModelConfig
from pipeline.cpu_backend import uses_cpu
from pipeline.errors import UserError
from qsparse_layers.mlp import fuse_activations
from qsparse_layers.rules import ConfiguredLayer, configure_layers, global_paths
from qsparse_layers.schedules import Schedule

FIRST_WITH_FP8 = (8, 9)
"""Compute capability."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Model:
    """The chunks of the model that this rank holds (one, or `vpp` under the interleaved schedule)."""

    chunks: list[Module]
    config: TransformerConfig
    layers: list[ConfiguredLayer]
    """Q-Sparse linear layers of this rank."""
    schedule: Schedule
    """Warm-up state shared by all of them."""
    routed: list[RoutedLayer]
    """MoE layers of this rank."""


def build_model(config: Config, vocab_size: int) -> Model:
    """Build, configure and initialize this rank's model chunks; parallel state must be initialized.

    Args:
        config: the run.
        vocab_size: token ids of the dataset's tokenizer, before padding.

    Raises:
        UserError: the GPU cannot compute in the formats of the configuration.
    """
    _check_transformer_engine(config)
    kernels = _kernels(config)
    transformer = transformer_config(config)
    schedule = Schedule(config.model.qsparse)
    stages = range(config.parallel.vpp) if config.parallel.vpp > 1 else [None]
    chunks = [_build_chunk(config, transformer, vocab_size, stage) for stage in stages]
    layers = [layer for chunk in chunks for layer in _configure(chunk, config.model, schedule, kernels)]
    options = config.model.moe, config.model.qsparse
    routed = [layer for chunk in chunks for layer in configure_moe_layers(chunk, *options, schedule, kernels)]
    recompute = config.training.recompute == "up_projection"
    for chunk in chunks:
        if kernels.fused is not None or recompute:
            fuse_activations(chunk, recompute=recompute)
        initialize_weights(chunk, config)
    if config.training.precision == "bf16":
        chunks = [Float16Module(transformer, chunk) for chunk in chunks]
    return Model(chunks, transformer, layers, schedule, routed)


def unwrap(chunk: Module) -> GPTModel:
    """The GPT model inside data-parallel and precision wrappers."""
    inner: Any = chunk
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's configuration of the same model and layout."""
    model, parallel, training = config.model, config.parallel, config.training
    dtype = DTYPES[training.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        gated_linear_unit=model.activation != "relu2",
        activation_func=torch.nn.functional.silu if model.activation == "swiglu" else squared_relu,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp or parallel.tp,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=training.precision == "bf16",
        deterministic_mode=config.run.deterministic,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=uses_transformer_engine(config),
        moe_permute_fusion=_permutes_fused(config),
        cross_entropy_loss_fusion=uses_transformer_engine(config),
        cross_entropy_fusion_impl="te",
        batch_p2p_comm=parallel.vpp == 1,
        **_recompute_options(training.recompute),
        cpu_offloading=training.offload_layers > 0,
        cpu_offloading_num_layers=training.offload_layers,
        **_moe_options(model, training.precision),
    )


def _recompute_options(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _moe_options(model: ModelConfig, precision: str) -> dict[str, Any]:
    moe = model.moe
    if moe is None:
        return {}
    with_loss = moe.balancing in ("aux_loss", "seq_aux_loss") and moe.aux_loss_coeff > 0
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size or model.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_layer_freq": [int(moe.is_moe_layer(number)) for number in range(model.num_layers)],
        "moe_token_dispatcher_type": moe.dispatcher,
        "moe_router_score_function": moe.scores,
        "moe_router_load_balancing_type": moe.balancing if with_loss else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coeff if with_loss else 0.0,
        "moe_router_enable_expert_bias": moe.balancing == "bias",
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_router_dtype": "fp64" if precision == "fp64" else "fp32",
    }


def _build_chunk(config: Config, transformer: TransformerConfig, vocab_size: int, stage: int | None) -> GPTModel:
    where = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}
    logging.getLogger(GPTModel.__module__).addFilter(_is_for_users)
    return GPTModel(
        config=transformer,
        transformer_layer_spec=block_spec(transformer, config, stage),
        vocab_size=config.model.padded_vocab_size(config.model.vocab_size or vocab_size),
        max_sequence_length=config.training.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        parallel_output=True,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        vp_stage=stage,
    )


def _is_for_users(record: logging.LogRecord) -> bool:
    """Not megatron-core 0.19's advice to the authors of GPT models."""
    return "GPTModel IS DEPRECATED" not in record.getMessage()


def _kernels(config: Config) -> Kernels:
    try:
        return _chosen_kernels(config)
    except ValueError as error:
        raise UserError(str(error)) from error


def _chosen_kernels(config: Config) -> Kernels:
    if uses_cpu(config.run.device):
        return kernels_for("cpu", config.run.kernels)
    qsparse, capability = config.model.qsparse, torch.cuda.get_device_capability()
    uses_fp8 = "e4m3" in (qsparse.gradients, *(rule.gradients for rule in qsparse.rules))
    if uses_fp8 and uses_triton(config) and capability < FIRST_WITH_FP8:
        raise UserError(
            f"model.qsparse.gradients=e4m3 needs a GPU with FP8 (compute capability 8.9 or higher), this is a "
            f"{torch.cuda.get_device_name()} ({'.'.join(map(str, capability))}): use model.qsparse.gradients=full"
        )
    return kernels_for("cuda", config.run.kernels, keep_bf16_weights=config.run.keep_bf16_weights)


def _check_transformer_engine(config: Config) -> None:
    """Refuse what only Transformer Engine does, where `run.backend=auto` did not find it."""
    needed = {
        f"training.offload_layers={config.training.offload_layers}": (config.training.offload_layers > 0, "0"),
        "run.cuda_graph=true with model.moe": (config.run.cuda_graph and config.model.moe is not None, "false"),
    }
    for what, (is_wanted, instead) in needed.items():
        if is_wanted and not uses_transformer_engine(config):
            key = what.split("=")[0]
            raise UserError(
                f"{what} needs Transformer Engine on a GPU, which is not here: install it or set {key}={instead}"
            )


def _permutes_fused(config: Config) -> bool:
    """Transformer Engine's permutation wants the number of rows beforehand, which all-gather does not know."""
    moe = config.model.moe
    return moe is not None and moe.dispatcher != "allgather" and uses_transformer_engine(config)


def uses_triton(config: Config) -> bool:
    """Whether linear layers compute with Triton's kernels: on a GPU, unless the reference is asked for."""
    return not uses_cpu(config.run.device) and config.run.kernels != "reference"


def uses_transformer_engine(config: Config) -> bool:
    """Whether attention is Transformer Engine's; `run.backend=auto` takes it on a GPU where it is installed."""
    if config.run.backend == "auto":
        return not uses_cpu(config.run.device) and importlib.util.find_spec("transformer_engine") is not None
    return config.run.backend == "te"


def _base_backend(config: Config) -> BackendSpecProvider:
    if not uses_transformer_engine(config):
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def block_spec(transformer: TransformerConfig, config: Config, stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one chunk; given as block submodules so that the final norm is ours, too."""
    model = config.model
    provider = QSparseMoESpecProvider(_base_backend(config), _experts_class(config))
    norm = provider.layer_norm(rms_norm=True)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
        ),
    )

    dense_mlp = get_mlp_module_spec_for_backend(backend=provider, num_experts=None, moe_grouped_gemm=False)

    def layer(num_experts: int | None) -> ModuleSpec:
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=norm,
                mlp=moe_spec(provider, num_experts) if num_experts else dense_mlp,
                mlp_bda=get_bias_dropout_add,
            ),
        )

    dense, sparse = layer(None), layer(model.moe.num_experts) if model.moe else None
    first = get_transformer_layer_offset(transformer, vp_stage=stage)
    numbers = range(first, first + get_num_layers_to_build(transformer, vp_stage=stage))
    specs = [sparse if sparse and model.moe and model.moe.is_moe_layer(number) else dense for number in numbers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _experts_class(config: Config) -> type[QSparseSequentialMLP]:
    choice = config.model.moe.execution if config.model.moe else "auto"
    if choice == "auto":
        choice = "sequential" if uses_cpu(config.run.device) else "grouped"
    return QSparseGroupedMLP if choice == "grouped" else QSparseSequentialMLP


def _configure(chunk: GPTModel, model: ModelConfig, schedule: Schedule, kernels: Kernels) -> list[ConfiguredLayer]:
    return configure_layers(
        chunk,
        model.qsparse,
        schedule,
        kernels,
        queries_per_group=model.num_attention_heads // model.query_groups,
        head_dim=model.head_size,
        gated=model.activation != "relu2",
    )


@torch.no_grad()
def initialize_weights(chunk: GPTModel, config: Config) -> None:
    """Normal(0, init_std) matrices, residual output projections divided by sqrt(2 num_layers), unit gains."""
    output_std = config.model.init_std / math.sqrt(2 * config.model.num_layers)
    for path, module in global_paths(chunk):
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        is_residual_output = path.endswith(("linear_proj", "linear_fc2"))
        weight.copy_(_draw(path, module, weight, output_std if is_residual_output else config.model.init_std, config))


def _draw(path: str, module: Module, weight: Tensor, std: float, config: Config) -> Tensor:
    """This rank's shard of the matrix that belongs to `path`, float64."""
    if path == "output_layer" and config.model.tie_embeddings:
        path = "embedding.word_embeddings"
    digest = hashlib.blake2b(f"{config.run.seed}/{path}".encode(), digest_size=8).digest()
    generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def whole(rows: int, columns: int) -> Tensor:
        # float64: torch's vectorized float32 normals differ between instruction sets by 1e-7, enough to flip codes
        size = (rows, columns)
        return torch.normal(0.0, std, size, generator=generator, device=weight.device, dtype=torch.float64)

    if path.endswith("router"):
        return whole(*weight.shape)
    group = getattr(module, "tp_group", None)
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    if path.endswith(("linear_proj", "linear_fc2")):  # sharded over input features
        columns = weight.shape[1]
        return whole(weight.shape[0], columns * size)[:, rank * columns : (rank + 1) * columns]
    halves = 2 if path.endswith("linear_fc1") and config.model.activation != "relu2" else 1  # gate and up
    rows = weight.shape[0] // halves
    parts = [whole(rows * size, weight.shape[1])[rank * rows : (rank + 1) * rows] for _ in range(halves)]
    return torch.cat(parts)
