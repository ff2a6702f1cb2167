"""Cluster profiles: what they accept, and what they say of mistakes."""

import re
from pathlib import Path

import pytest

from launch.cluster import ClusterProfile, load_profile

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "configs/clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_our_profiles_load(path):
    assert load_profile(str(path), {}) != ClusterProfile()


def test_every_key_is_documented():
    page = (ROOT / "docs/launch.md").read_text()
    table = page[page.index("## Cluster profiles") :]
    documented = re.findall(r"^\| `(?:container\.)?(\w+)` \|", table, re.MULTILINE)
    container = ClusterProfile.model_fields["container"].annotation.__args__[0]
    keys = [name for name in ClusterProfile.model_fields if name != "container"] + list(container.model_fields)
    assert sorted(documented) == sorted(keys)


def test_options_replace_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("time: 1-12:00:00\naccount: a\n")
    profile = load_profile(str(path), {"time": "30", "partition": "p", "qos": None})
    assert (profile.time, profile.account, profile.partition, profile.qos) == ("30", "a", "p", None)


def test_a_name_is_found_in_the_folder_of_profiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/clusters").mkdir(parents=True)
    (tmp_path / "configs/clusters/mine.yaml").write_text("partition: p\n")
    assert load_profile("mine", {}).partition == "p"
    with pytest.raises(ValueError, match=re.escape("nor configs/clusters/mime.yaml is a file; there are mine")):
        load_profile("mime", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: gpu\n", "a.yaml:1: partion: unknown key, did you mean 'partition'?"),
        ("x: 1\n", "a.yaml:1: x: unknown key; valid keys: account, partition"),
        ("time: 12h\n", "a.yaml:1: time: string should match pattern"),
        ("\ngpus_per_node: -1\n", "a.yaml:2: gpus_per_node: input should be greater than or equal to 0 (got -1)"),
        (
            "container:\n  runtime: docker\n  image: a\n",
            "a.yaml:2: container.runtime: input should be 'pyxis' or 'apptainer' (got 'docker')",
        ),
        (
            "container:\n  runtime: pyxis\n  image: a\n  mount: []\n",
            "a.yaml:4: container.mount: unknown key, did you mean 'mounts'?",
        ),
        ("setup: ['a\nb\nrm']\n", "a.yaml"),
        ('setup: ["a\\nb"]\n', "a.yaml:1: setup: each entry is one line and not empty, got 'a\\nb'"),
        ("sbatch: [mail]\n", "sbatch.0: string should match pattern"),
        ("env: {a b: c}\n", "env.a b"),
        ("a: 1\na: 2\n", "a.yaml:2: duplicate key 'a'"),
        ("[1]\n", "a.yaml:1: expected keys, found list"),
        ('time: "5"\n', "time=5 is 300 s and signal_seconds=300: ranks would be asked to save as soon as they start"),
        ("time: 0-00:10:00\nsignal_seconds: 601\n", "time=0-00:10:00 is 600 s and signal_seconds=601"),
        ('time: "4:59"\n', "time=4:59 is 299 s"),
    ],
)
def test_mistakes_have_a_place(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    if message == "a.yaml":  # YAML folds the lines of a quoted text into one
        assert load_profile(str(path), {}).setup == ("a b rm",)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        load_profile(str(path), {})


def test_all_mistakes_are_told_at_once(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("partion: gpu\ntime: never\n")
    with pytest.raises(ValueError, match="2 errors in the cluster profile"):
        load_profile(str(path), {})
