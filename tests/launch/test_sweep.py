"""Sweeps: the product of the values, and names for it."""

import re

import pytest

from launch.sweep import Variant, variants


def test_no_sweep_is_one_run():
    assert variants([]) == [Variant("", ())]


def test_product_in_the_order_given():
    found = variants(["model.qsparse.sparsity=0.0,0.4", "run.seed=1,2"])
    assert [variant.overrides for variant in found] == [
        ("model.qsparse.sparsity=0.0", "run.seed=1"),
        ("model.qsparse.sparsity=0.0", "run.seed=2"),
        ("model.qsparse.sparsity=0.4", "run.seed=1"),
        ("model.qsparse.sparsity=0.4", "run.seed=2"),
    ]
    assert [variant.suffix for variant in found][1:3] == ["-sparsity-0.0-seed-2", "-sparsity-0.4-seed-1"]


def test_commas_inside_of_brackets_and_quotes_belong_to_a_value():
    found = variants(["optimizer.betas=[0.9, 0.95],[0.8,0.9]", "tracking.experiment='a,b',c"])
    assert [variant.overrides[0] for variant in found[::2]] == [
        "optimizer.betas=[0.9, 0.95]",
        "optimizer.betas=[0.8,0.9]",
    ]
    assert found[0].overrides[1] == "tracking.experiment='a,b'"
    assert found[0].suffix == "-betas-0.9-0.95-experiment-a-b"


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["run.seed"], "--sweep run.seed: KEY=VALUE,VALUE... is expected"),
        (["run.seed=1,,2"], "--sweep run.seed=1,,2: KEY=VALUE"),
        (["=1"], "--sweep =1"),
        (["run.name=a,b"], "--sweep run.name=a,b: runs of a sweep are named by what differs"),
        (["a.b=1", "a.b=2"], "--sweep a.b is given twice; put all values into one"),
        (["a.b=x y,x-y"], "--sweep makes two runs of the name ...-b-x-y"),
    ],
)
def test_mistakes(sweeps, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        variants(sweeps)
