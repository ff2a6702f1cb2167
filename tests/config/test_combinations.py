"""Every rule that ties keys together: the message when it is broken, silence when it is kept."""

import pytest

from pipeline.config import Config, ModelConfig, ParallelConfig
from pipeline.config_layers import linear_layers
from pipeline.config_loader import ConfigError, load_config
from qsparse_layers.config import LayerRule, matching_rule

BLOCK = "model.qsparse={sparsity: 0.5, pattern: block}"
MOE = "model.moe={num_experts: 4}"
GATHER = "parallel={ternary_param_gather: true, distributed_optimizer: true}"
TERNARY = ["model.qsparse.weights=ternary", "training.precision=bf16"]

BROKEN = [
    (
        ["model.hidden_size=250"],
        "model.hidden_size=250 is not divisible by model.num_attention_heads=8: set model.head_dim to have "
        "heads of another width",
    ),
    (
        ["model.hidden_size=200"],
        "model.hidden_size=200 makes heads of 25 features: rotary embeddings need an even number",
    ),
    (["model.head_dim=33"], "model.head_dim=33 makes heads of 33 features: rotary embeddings need an even number"),
    (
        ["model.num_query_groups=3"],
        "model.num_attention_heads=8 is not divisible by model.num_query_groups=3: each group serves the same "
        "number of heads",
    ),
    (
        ["model.num_attention_heads=6", "model.hidden_size=252", "parallel.tp=4"],
        "model.num_attention_heads=6 is not divisible by parallel.tp=4: tensor parallel ranks share the heads evenly",
    ),
    (
        ["model.num_query_groups=2", "parallel.tp=4"],
        "model.num_query_groups=2 is not divisible by parallel.tp=4: each rank holds whole key/value heads",
    ),
    (
        ["model.ffn_hidden_size=770", "parallel.tp=4"],
        "model.ffn_hidden_size=770 is not divisible by parallel.tp=4: tensor parallel ranks share the FFN evenly",
    ),
    (
        ["model.vocab_multiple=1", "parallel.tp=2"],
        "model.vocab_multiple=1 is not divisible by parallel.tp=2: ranks share the padded embedding table evenly",
    ),
    (
        ["model.vocab_multiple=1", "model.vocab_size=101", "parallel.tp=2"],
        "model.vocab_size=101 padded to 101 (model.vocab_multiple=1) is not divisible by parallel.tp=2: ranks "
        "share the table evenly",
    ),
    (["parallel.vpp=2"], "parallel.vpp=2 needs parallel.pp > 1: chunks interleave over pipeline ranks"),
    (
        ["parallel.pp=2", "parallel.vpp=4"],
        "model.num_layers=4 is not divisible by parallel.pp=2 * parallel.vpp=4 = 8: every chunk has the same "
        "number of layers",
    ),
    (
        ["parallel.pp=2", "parallel.vpp=2", "training.global_batch_size=12"],
        "training.global_batch_size=12 / (training.micro_batch_size=4 * parallel.dp=1) makes 3 microbatches, but "
        "parallel.vpp=2 needs a multiple of parallel.pp=2",
    ),
    (
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel=true needs parallel.tp > 1: it shards over the TP group",
    ),
    (
        ["parallel.sequence_parallel=true", "parallel.tp=2", "training.seq_length=129"],
        "training.seq_length=129 is not divisible by parallel.tp=2: sequence parallel ranks share the tokens",
    ),
    (
        ["parallel={sequence_parallel: true, tp: 4, cp: 2}", "training.seq_length=132", "run.device=cuda"],
        "training.seq_length=132 is not divisible by parallel.tp=4 * parallel.cp=2: they share the tokens",
    ),
    (
        ["training.global_batch_size=18", "parallel.dp=2"],
        "training.global_batch_size=18 is not divisible by training.micro_batch_size=4 * parallel.dp=2 = 8",
    ),
    (
        ["training.global_batch_size=18"],
        "training.global_batch_size=18 is not divisible by training.micro_batch_size=4 * parallel.dp=1 = 4",
    ),
    (
        ["parallel.cp=2"],
        "parallel.cp=2 needs run.device=cuda, not auto: the attention for it is Transformer Engine's",
    ),
    (
        ["parallel.cp=2", "run.device=cuda", "training.seq_length=250"],
        "training.seq_length=250 is not divisible by 2 * parallel.cp=2: each rank takes two chunks",
    ),
    (
        ["parallel.overlap_param_gather=true"],
        "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true: without it there is "
        "nothing to gather",
    ),
    (
        ["training.offload_layers=4", "model.num_layers=4"],
        "training.offload_layers=4: the last of model.num_layers=4 stays on the GPU; set training.offload_layers=3 or "
        "less",
    ),
    (
        ["training.offload_layers=1", "training.recompute=full"],
        "training.offload_layers=1 does not work with training.recompute=full: set training.recompute=none or "
        "training.offload_layers=0",
    ),
    (
        [*TERNARY, "parallel.ternary_param_gather=true"],
        "parallel.ternary_param_gather=true needs parallel.distributed_optimizer=true: without it there is "
        "nothing to gather",
    ),
    (
        [*TERNARY, GATHER, "parallel.overlap_param_gather=true"],
        "parallel.ternary_param_gather=true does not work with parallel.overlap_param_gather=true: codes are "
        "gathered before the forward pass; set one of them false",
    ),
    (
        [GATHER],
        "parallel.ternary_param_gather=true needs model.qsparse.weights=ternary or a rule that sets it: no layer "
        "has ternary weights",
    ),
    (["parallel.ep=2"], "parallel.ep=2 needs model.moe: there are no experts"),
    (["parallel.etp=1"], "parallel.etp=1 needs model.moe: there are no experts"),
    ([MOE, "parallel.ep=3"], "model.moe.num_experts=4 is not divisible by parallel.ep=3"),
    (
        [MOE, "model.moe.ffn_hidden_size=99", "parallel={tp: 2, sequence_parallel: true}"],
        "model.moe.ffn_hidden_size=99 is not divisible by parallel.tp=2: ranks share each expert evenly",
    ),
    (
        [MOE, "parallel.etp=5"],
        "model.ffn_hidden_size=768 is not divisible by parallel.etp=5: ranks share each expert evenly",
    ),
    (
        [MOE, "parallel.tp=2"],
        "parallel.sequence_parallel=false with parallel.tp=2 and model.moe: each token must be routed once, "
        "set it true",
    ),
    (
        [MOE, "parallel={ep: 2, dp: 1}"],
        "parallel.ep=2 * parallel.etp=1 = 2 does not divide parallel.tp=1 * parallel.cp=1 * parallel.dp=1 = 1",
    ),
    (["optimizer.warmup_steps=200"], "optimizer.warmup_steps=200 must be smaller than training.steps=200"),
    (
        ["optimizer.warmup_steps=100"],
        "optimizer.warmup_steps=100 must end before optimizer.stage2_start=0.5 of training.steps=200",
    ),
    (
        ["optimizer.schedule=wsd", "optimizer.wsd_decay_share=0.95"],
        "optimizer.warmup_steps=20 and optimizer.wsd_decay_share=0.95 overlap in training.steps=200",
    ),
    (
        [*TERNARY, "run.keep_bf16_weights=true", "run.kernels=reference"],
        "run.keep_bf16_weights=true has no effect with run.kernels=reference: set run.kernels=auto or "
        "run.keep_bf16_weights=false",
    ),
    (
        [*TERNARY, "run.keep_bf16_weights=true", "training.precision=fp32"],
        "run.keep_bf16_weights=true has no effect with training.precision=fp32: set training.precision=bf16 or "
        "run.keep_bf16_weights=false",
    ),
    (
        [*TERNARY, "run.keep_bf16_weights=true", "model.qsparse={gradients: e4m3, activations: int8}"],
        "run.keep_bf16_weights=true has no effect: no layer has model.qsparse.weights=ternary and "
        "model.qsparse.gradients=full; set run.keep_bf16_weights=false",
    ),
    (["optimizer.min_lr=0.01"], "optimizer.min_lr=0.01 is larger than optimizer.lr=0.0015"),
    (
        ["model.qsparse.sparsity_warmup={start: 150, steps: 51}"],
        "model.qsparse.sparsity_warmup.start=150 + model.qsparse.sparsity_warmup.steps=51 = 201 is past "
        "training.steps=200: "
        "the ramp would not end",
    ),
    (
        ["training.precision=fp64", "run.device=cuda"],
        "training.precision=fp64 needs run.device=cpu, not cuda: it serves exactness tests",
    ),
    (
        ["model.qsparse.rules=[{match: 'decoder.layers.4.*'}]"],
        "model.qsparse.rules[0].match='decoder.layers.4.*' matches no layer; layers 0 to 3 look like "
        "decoder.layers.0.self_attention.linear_qkv, decoder.layers.0.self_attention.linear_proj, "
        "decoder.layers.0.mlp.linear_fc1, decoder.layers.0.mlp.linear_fc2",
    ),
    (
        ["model.qsparse.rules=[{match: '*.mlp.*'}, {match: '*.linear_fc1', sparsity: 0}]"],
        "model.qsparse.rules[1].match='*.linear_fc1' has no effect: earlier rules match all its layers, and "
        "the first match wins",
    ),
    (
        [BLOCK, "model.ffn_hidden_size=704", "parallel.tp=4"],
        "model.qsparse.block_size=32 does not divide the input of decoder.layers.0.mlp.linear_fc2: 176 "
        "features on each of "
        "parallel.tp=4 ranks (704 in all, from model.ffn_hidden_size)",
    ),
    (
        [BLOCK, "model.head_dim=30"],
        "model.qsparse.block_size=32 does not divide the input of "
        "decoder.layers.0.self_attention.linear_proj: 240 features "
        "(240 in all, from model.head_dim)",
    ),
    (
        [BLOCK, "model.qsparse.rules=[{match: '*.2.mlp.linear_fc1', block_size: 96, sparsity: 0.75}]"],
        "model.qsparse.rules[0].block_size=96 does not divide the input of decoder.layers.2.mlp.linear_fc1: "
        "256 features "
        "(256 in all, from model.hidden_size)",
    ),
    (
        [BLOCK, MOE, "model.moe.ffn_hidden_size=80", "model.moe.layer_frequency=2"],
        "model.qsparse.block_size=32 does not divide the input of "
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2: "
        "80 features (80 in all, from model.moe.ffn_hidden_size)",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BROKEN)
def test_broken_rule(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    (problem,) = error.value.problems
    assert problem.startswith("override ")
    assert problem.endswith(f": {message}")


KEPT = [
    ["parallel.tp=4", "model.num_query_groups=4", "parallel.sequence_parallel=true"],
    ["parallel={pp: 2, vpp: 2}", "training.global_batch_size=16"],
    ["parallel={cp: 2}", "run.device=cuda"],
    [MOE, "parallel={ep: 2, dp: 2}"],
    [MOE, "parallel={ep: 2, tp: 2, etp: 1, dp: 1, sequence_parallel: true}"],
    ["training.precision=fp64", "run.device=cpu"],
    ["model.hidden_size=250", "model.head_dim=32"],
    ["model.tie_embeddings=true", "parallel.pp=2"],
    ["optimizer={schedule: wsd, wsd_decay_share: 0.9, warmup_steps: 20}"],
    ["optimizer={schedule: cosine, warmup_steps: 199, min_lr: 1e-4}"],
    ["model.qsparse.sparsity_warmup={start: 100, steps: 100}"],
    [BLOCK, "model.head_dim=36"],
    [BLOCK, "parallel.tp=4"],
    [BLOCK, "model.ffn_hidden_size=700", "model.qsparse.rules=[{match: '*.linear_fc2', pattern: topk}]"],
    [BLOCK, "model.ffn_hidden_size=708", "model.qsparse.rules=[{match: '*.linear_fc2', block_size: 4}]"],
    ["model.qsparse.rules=[{match: 'decoder.layers.[03].*'}, {match: '*.linear_fc1', weights: ternary}]"],
    ["model.vocab_multiple=1", "model.vocab_size=100", "parallel.tp=2"],
    [GATHER, "model.qsparse.rules=[{match: '*.mlp.*', weights: ternary}]"],
    [*TERNARY, "run.keep_bf16_weights=true", "parallel={overlap_param_gather: true, distributed_optimizer: true}"],
    [*TERNARY, "run.keep_bf16_weights=true", MOE, "model.qsparse.rules=[{match: '*.mlp.*', weights: full}]"],
]


@pytest.mark.parametrize("overrides", KEPT)
def test_kept_rules(overrides):
    load_config(None, overrides)


def test_all_violations_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(
            None, ["parallel={tp: 3, vpp: 2, ep: 2}", "optimizer.warmup_steps=500", "model.ffn_hidden_size=700"]
        )
    assert [problem.split("': ")[1].split(" ")[0] for problem in error.value.problems] == [
        "model.num_attention_heads=8",
        "model.ffn_hidden_size=700",
        "model.vocab_multiple=128",
        "parallel.vpp=2",
        "parallel.ep=2",
        "optimizer.warmup_steps=500",
    ]


def test_direct_construction_is_checked_too():
    with pytest.raises(ValueError, match=r"parallel\.vpp=2 needs parallel\.pp > 1"):
        Config(parallel=ParallelConfig(vpp=2))


@pytest.mark.parametrize(
    ("parallel", "world_size", "dp"),
    [({}, 1, 1), ({}, 4, 4), ({"tp": 2, "pp": 2}, 8, 2), ({"tp": 2, "dp": 2}, 4, 2)],
)
def test_world_size_leaves_data_parallel_size(parallel, world_size, dp):
    assert Config(parallel=ParallelConfig(**parallel)).check_world_size(world_size) == dp


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        ({"tp": 2}, 3, "3 processes are not a multiple of parallel.tp=2 * parallel.pp=1 * parallel.cp=1 = 2"),
        ({"tp": 2}, 0, "0 processes are not a multiple of parallel.tp=2 * parallel.pp=1 * parallel.cp=1 = 2"),
        (
            {"tp": 2, "dp": 2},
            8,
            "parallel.tp=2 * parallel.pp=1 * parallel.cp=1 * parallel.dp=2 takes 4 processes, there are 8",
        ),
        (
            {},
            3,
            "3 processes make parallel.dp=3: training.global_batch_size=16 is not divisible by "
            "training.micro_batch_size=4 * parallel.dp=3 = 12",
        ),
        (
            {"pp": 2, "vpp": 2},
            8,
            "8 processes make parallel.dp=4: training.global_batch_size=16 / (training.micro_batch_size=4 * "
            "parallel.dp=4) "
            "makes 1 microbatches, but parallel.vpp=2 needs a multiple of parallel.pp=2",
        ),
    ],
)
def test_world_size_errors(parallel, world_size, message):
    with pytest.raises(ValueError) as error:
        Config(parallel=ParallelConfig(**parallel)).check_world_size(world_size)
    assert str(error.value) == message


def test_experts_must_fit_the_world():
    config = load_config(None, [MOE, "parallel.ep=2"])
    assert config.check_world_size(4) == 4
    with pytest.raises(
        ValueError, match=r"1 processes make parallel\.dp=1: parallel\.ep=2 \* parallel\.etp=1 = 2 does not"
    ):
        config.check_world_size(1)


def test_layers_of_a_mixture_of_experts():
    model = ModelConfig(num_layers=2, head_dim=16, moe={"num_experts": 2, "layer_frequency": 2, "ffn_hidden_size": 96})
    parallel = ParallelConfig(tp=4, etp=2, sequence_parallel=True)
    assert [(layer.path, layer.num_features, layer.shards) for layer in linear_layers(model, parallel)] == [
        ("decoder.layers.0.self_attention.linear_qkv", 256, 1),
        ("decoder.layers.0.self_attention.linear_proj", 128, 4),
        ("decoder.layers.0.mlp.experts.local_experts.0.linear_fc1", 256, 1),
        ("decoder.layers.0.mlp.experts.local_experts.0.linear_fc2", 96, 2),
        ("decoder.layers.0.mlp.experts.local_experts.1.linear_fc1", 256, 1),
        ("decoder.layers.0.mlp.experts.local_experts.1.linear_fc2", 96, 2),
        ("decoder.layers.1.self_attention.linear_qkv", 256, 1),
        ("decoder.layers.1.self_attention.linear_proj", 128, 4),
        ("decoder.layers.1.mlp.linear_fc1", 256, 1),
        ("decoder.layers.1.mlp.linear_fc2", 768, 4),
    ]


def test_first_matching_rule():
    rules = [LayerRule(match="decoder.layers.1?.*"), LayerRule(match="*.linear_fc2"), LayerRule(match="*")]
    paths = ["decoder.layers.1.mlp.linear_fc2", "decoder.layers.12.mlp.linear_fc2", "decoder.layers.2.mlp.linear_fc1"]
    assert [matching_rule(rules, path) for path in paths] == [1, 0, 2]
    assert matching_rule(rules[:1], "x") is None
