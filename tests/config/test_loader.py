"""Merging, overrides and error messages of the loader."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import MoEConfig
from pipeline.config import Config, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from pipeline.config_loader import ConfigError, differences, dump_config, load_config
from qsparse_layers.config import LayerRule, QSparseConfig


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files into the current directory, so that messages hold short paths."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def problems(path, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert str(error.value).splitlines()[1:] == [f"  {problem}" for problem in error.value.problems]
    return list(error.value.problems)


def test_nothing_given_is_the_defaults():
    assert load_config(None) == Config()


def test_empty_file_is_the_defaults(write):
    assert load_config(write("a.yaml", "# nothing\n")) == Config()


def test_override_wins_over_file_and_file_over_default(write):
    path = write("a.yaml", "model:\n  num_layers: 8\n  hidden_size: 512\n")
    config = load_config(path, ["model.num_layers=12", "optimizer.betas=[0.8, 0.9]", "optimizer.lr=3e-4"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (12, 512, 8)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.optimizer.lr == 3e-4


def test_last_override_wins_and_null_unsets(write):
    path = write("a.yaml", "model: {num_query_groups: 4}\nparallel: {dp: 2}\n")
    config = load_config(path, ["parallel.dp=4", "parallel.dp=null", "model.num_query_groups="])
    assert config.parallel.dp is None
    assert config.model.num_query_groups is None


def test_override_of_a_section_merges_and_makes_absent_sections():
    config = load_config(
        None, ["model.moe.num_experts=4", "model.qsparse={sparsity: 0.3}", "model.qsparse.weights=ternary"]
    )
    assert config.model.moe == MoEConfig(num_experts=4)
    assert config.model.qsparse == QSparseConfig(sparsity=0.3, weights="ternary")


def test_defaults_are_merged_deeply_and_in_order(write):
    write("base.yaml", "model: {num_layers: 2, hidden_size: 128}\nrun: {seed: 1, name: base}\n")
    write(
        "sub/wide.yaml",
        "defaults: ../base.yaml\nmodel: {hidden_size: 512, qsparse: {rules: [{match: '*.linear_fc1'}]}}\n",
    )
    write("sub/named.yaml", "defaults: ../base.yaml\nrun: {name: named}\n")
    path = write("a.yaml", "defaults: [sub/wide.yaml, sub/named.yaml]\nmodel: {num_layers: 6, qsparse: {rules: []}}\n")
    config = load_config(path)
    # base.yaml counts once: named.yaml's inheritance of it does not undo wide.yaml's hidden_size.
    assert (config.model.num_layers, config.model.hidden_size, config.run.seed) == (6, 512, 1)
    assert config.run.name == "named"
    assert config.model.qsparse.rules == ()


def test_aliases_do_not_tie_keys_together(write):
    path = write("a.yaml", "model: {qsparse: {sparsity_warmup: &ramp {steps: 10}, quantization_warmup: *ramp}}\n")
    qsparse = load_config(path, ["model.qsparse.sparsity_warmup.steps=20"]).model.qsparse
    assert (qsparse.sparsity_warmup.steps, qsparse.quantization_warmup.steps) == (20, 10)


def test_every_error_at_once_with_its_place(write):
    write("base.yaml", "training:\n  steps: -1\n")
    path = write(
        "a.yaml",
        "defaults: base.yaml\nmodel:\n  hiden_size: 64\n  num_layers: two\n  lr: 3\n  qsparse:\n    rules:\n"
        "      - {match: '*', sparsty: 0.3}\n      - match: x\n        sparsity: 2.0\n"
        "optimizer:\n  betas: [1.0]\ndata:\ntracking:\n  experiment: 2026\n",
    )
    got = problems(
        path, ["parallel.tpp=3", "training.seq_length.x=5", "nonsense", "a..b=1", "model.moe={top_k: 9}", "run={"]
    )
    assert set(got) == {
        "override 'nonsense': expected section.key=value, e.g. model.num_layers=8",
        "override 'a..b=1': expected section.key=value, e.g. model.num_layers=8",
        "override 'run={': expected the node content, but found '<stream end>'",
        "base.yaml:2: training.steps: input should be greater than 0 (got -1)",
        "a.yaml:3: model.hiden_size: unknown key, did you mean 'model.hidden_size'?",
        "a.yaml:4: model.num_layers: input should be a valid integer, unable to parse string as an integer (got 'two')",
        "a.yaml:5: model.lr: unknown key, did you mean 'optimizer.lr'?",
        "a.yaml:8: model.qsparse.rules[0].sparsty: unknown key, did you mean 'model.qsparse.rules[0].sparsity'?",
        "a.yaml:10: model.qsparse.rules[1].sparsity: input should be less than 1 (got 2.0)",
        "a.yaml:12: optimizer.betas[0]: input should be less than 1 (got 1.0)",
        "a.yaml:12: optimizer.betas[1]: field required (got [1.0])",
        "a.yaml:13: data: expected a section with keys, got None",
        "a.yaml:15: tracking.experiment: expected text, got the number 2026: put it in quotes",
        "override 'parallel.tpp=3': parallel.tpp: unknown key, did you mean 'parallel.tp'?",
        "override 'training.seq_length.x=5': training.seq_length: input should be a valid integer (got {'x': 5})",
        "override 'model.moe={top_k: 9}': model.moe: top_k=9 is larger than num_experts=8",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: {}", "unknown key, did you mean 'model'?"),
        ("model: {moe: {experts: 4}}", "model.moe.experts: unknown key, did you mean 'model.moe.num_experts'?"),
        ("model: {qsparse: {sparsity_warmup: {step: 4}}}", "did you mean 'model.qsparse.sparsity_warmup.steps'?"),
        ("run: {steps: 4}", "run.steps: unknown key, did you mean 'training.steps' or"),
        ("checkpoint: {zzz: 1}", "checkpoint.zzz: unknown key; valid keys here: interval, keep_last, keep_every, load"),
        (
            "model: {activation: gelu}",
            "model.activation: input should be 'relu2_glu', 'relu2' or 'swiglu' (got 'gelu')",
        ),
        ("run: {name: a/b}", "run.name: string should match pattern"),
        ("optimizer: {lr: .inf}", "optimizer.lr: input should be a finite number (got inf)"),
        ("model: {qsparse: {rescale: l2}}", "model.qsparse: rescale=l2 needs sparsity > 0"),
        ("model: {qsparse: {sparsity: 0.3, pattern: block}}", "model.qsparse: pattern=block keeps N of block_size=32"),
        ("checkpoint: 7", "checkpoint: expected a section with keys, got 7"),
        ("model: {num_layers: true}", "model.num_layers: expected a number, got true"),
        ("optimizer: {lr: false}", "optimizer.lr: expected a number, got false"),
        ("profile: {steps: [true, 2]}", "profile.steps: expected a number, got [true, 2]"),
    ],
)
def test_messages(write, text, expected):
    (problem,) = problems(write("a.yaml", text + "\n"))
    assert problem.startswith("a.yaml:1: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ["a.yaml: cannot be read: No such file or directory"]),
        ({"a.yaml": "- 1\n"}, ["a.yaml:1: expected sections with keys, found list"]),
        ({"a.yaml": "run: 1\nrun: 2\n"}, ["a.yaml:2: duplicate key 'run' (first at line 1)"]),
        ({"a.yaml": "run: {}\ndefaults: b.yaml\n"}, ["a.yaml:2: defaults: b.yaml does not exist"]),
        (
            {"a.yaml": "defaults: 3\n"},
            ["a.yaml:1: defaults: expected a file or a list of files relative to this one, got 3"],
        ),
        (
            {"a.yaml": "defaults: d/b.yaml\n", "d/b.yaml": "\ndefaults: [../a.yaml]\n"},
            ["d/b.yaml:2: defaults: files inherit from each other: a.yaml -> d/b.yaml -> d/../a.yaml"],
        ),
        ({"a.yaml": "defaults: a.yaml\n"}, ["a.yaml:1: defaults: files inherit from each other: a.yaml -> a.yaml"]),
        (
            {"a.yaml": "defaults: [b.yaml, c.yaml]\n", "b.yaml": "x: [\n", "c.yaml": "run: {nam: x}\n"},
            [
                "b.yaml:2: expected the node content, but found '<stream end>'",
                "c.yaml:1: run.nam: unknown key, did you mean 'run.name'?",
            ],
        ),
    ],
)
def test_file_errors(write, files, expected):
    for name, text in files.items():
        write(name, text)
    assert problems("a.yaml") == expected


def test_text_that_is_not_utf8(write):
    write("a.yaml", "").write_bytes(b"run: {name: \xff}\n")
    assert problems("a.yaml") == ["a.yaml: cannot be read: not UTF-8 text"]


def test_combination_names_all_places(write):
    path = write("a.yaml", "model:\n  num_attention_heads: 6\n  hidden_size: 252\n")
    assert problems(path, ["parallel.tp=4"]) == [
        "a.yaml:2 and override 'parallel.tp=4': model.num_attention_heads=6 is not divisible by parallel.tp=4: "
        "tensor parallel ranks share the heads evenly"
    ]


def test_combinations_wait_until_the_keys_are_right(write):
    path = write("a.yaml", "model: {num_attention_heads: 6}\n")
    assert problems(path, ["x"]) == ["override 'x': expected section.key=value, e.g. model.num_layers=8"]


def test_replaced_value_loses_its_old_place(write):
    write("base.yaml", "model: {qsparse: {rules: [{match: '*.linear_fc1'}]}}\n")
    path = write("a.yaml", "defaults: base.yaml\nmodel:\n  qsparse:\n    rules:\n      - match: '*.fc1'\n")
    (problem,) = problems(path)
    assert problem.startswith("a.yaml:5: model.qsparse.rules[0].match='*.fc1' matches no layer")


def test_differences():
    config = load_config(None, ["model.moe.num_experts=4", "parallel.dp=2", "run.root=/tmp/x"])
    assert differences(config) == [
        ("run.root", "runs", "/tmp/x"),
        ("model.moe.num_experts", None, 4),
        ("model.moe.top_k", None, 2),
        ("model.moe.first_dense_layers", None, 0),
        ("model.moe.layer_frequency", None, 1),
        ("model.moe.dispatcher", None, "alltoall"),
        ("model.moe.dispatch", None, "codes"),
        ("model.moe.execution", None, "auto"),
        ("model.moe.scores", None, "softmax"),
        ("model.moe.balancing", None, "aux_loss"),
        ("model.moe.aux_loss_coeff", None, 0.01),
        ("model.moe.bias_update_rate", None, 0.001),
        ("model.moe.z_loss_coeff", None, 0.0),
        ("parallel.dp", None, 2),
    ]
    assert differences(Config(), config)[-1] == ("model.moe.z_loss_coeff", 0.0, None)
    assert differences(config, config) == []


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
rules = st.lists(
    st.builds(LayerRule, match=st.just("*"), weights=st.sampled_from(["full", "ternary", None])), max_size=1
)


@settings(max_examples=30, deadline=None)
@given(
    name=names,
    root=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1),
    seed=st.integers(0, 2**40),
    dropout=st.floats(0, 1, exclude_max=True),
    rules=rules,
    moe=st.none() | st.builds(MoEConfig, num_experts=st.just(4), aux_loss_coeff=st.floats(0, 1e6)),
    dp=st.sampled_from([None, 1, 2]),
)
def test_dumped_configuration_loads_back_equal(tmp_path_factory, name, root, seed, dropout, rules, moe, dp):
    config = Config(
        run=RunConfig(name=name, root=Path(root), seed=seed),
        model=ModelConfig(dropout=dropout, qsparse=QSparseConfig(rules=tuple(rules)), moe=moe),
        parallel=ParallelConfig(dp=dp),
        training=TrainingConfig(recompute="full"),
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
