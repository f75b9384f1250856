"""Random documents and files: each is read, or refused by an error that names the file; and the command that tries."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import resflow_jax as rf
from experiments.studies import fuzz
from experiments.studies.parts.fuzzing import Reader, Target, random_inputs, readers
from resflow_jax.io.config_json import config_from_json, config_to_json

DOCUMENTS = [
    rf.VectorFlowConfig(3, 2, (4,), data=rf.VectorTransform((0.0,) * 3, (1.0,) * 3)),
    rf.ImageFlowConfig((8, 8, 1), (1, 1), 4, norms=rf.Norms("2f2f")),
]
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 2, 2**31, 2**63, 10**30, 1e308]))
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["inf", "lipswish", "Norms"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def documents(draw):
    """A document of a config, of any version, with some of its values replaced or removed."""
    document = json.loads(config_to_json(draw(st.sampled_from(DOCUMENTS))))
    document["format_version"] = draw(st.sampled_from([0, 1, 2, 2, 2, 3, True, None]))
    for _ in range(draw(st.integers(1, 3))):
        node = document
        while True:
            key = draw(st.sampled_from(sorted(node)))
            if not (isinstance(node[key], dict) and node[key]) or draw(st.booleans()):
                break
            node = node[key]
        if draw(st.booleans()):
            node[key] = draw(VALUES)
        else:
            del node[key]
        if not document:
            break
    return document


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(documents())
def test_documents_of_configs(document):
    """What is read is a config that can be written and read again."""
    try:
        config = config_from_json(json.dumps(document))
    except ValueError as error:
        assert len(str(error)) < 5000
    else:
        assert config_from_json(config_to_json(config)) == config


READERS = readers()
SEEDS = {name: reader.seeds() for name, reader in READERS.items()}


@pytest.mark.parametrize("name", READERS)
def test_files(name, tmp_path):
    """Bytes inserted, replaced and removed, by hypothesis."""
    target = Target(READERS[name], tmp_path, tmp_path, guided=False)
    edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)

    @settings(max_examples=40, derandomize=True, deadline=None, database=None)
    @given(st.sampled_from(SEEDS[name]), edits)
    def check(data, edits):
        for place, length, new in edits:
            at = place % (len(data) + 1)
            data = data[:at] + new + data[at + length :]
        target(data)
        assert not target.faults

    check()
    assert target.inputs >= 40


def test_faults_are_found(tmp_path):
    """Each kind of fault once, with its first input; a right answer is none."""

    def read(path):
        data = path.read_bytes()
        if data == b"1":
            raise KeyError("x")
        raise ValueError(f"{path}: no" if data == b"2" else "no")

    target = Target(Reader("x", read, lambda data: data, lambda: []), tmp_path, tmp_path, guided=False)
    for data in (b"1", b"2", b"1", b"3"):
        target(data)
    assert target.inputs == 4 and len(target.faults) == 2
    first, second = target.faults
    assert first.startswith("KeyError: ") and second.startswith("ValueError without the name of the file")
    with open(target.faults[second], "rb") as file:
        assert file.read() == b"3"


def test_random_inputs():
    """Whole files first, then others; the same seed gives the same."""
    found = [data for data, _ in zip(random_inputs([b"abc" * 9], 1), range(20), strict=False)]
    assert found[0] == b"abc" * 9 and len(set(found)) > 15
    assert found == [data for data, _ in zip(random_inputs([b"abc" * 9], 1), range(20), strict=False)]


def test_the_command(tmp_path, capsys):
    """A line for each reader; without atheris it says that the inputs are random."""
    found = fuzz.run(fuzz.FuzzConfig(seconds=0.2, readers=("npy",), workdir=tmp_path / "out"))
    assert found == json.loads((tmp_path / "out" / "fuzz.json").read_text())
    assert found["npy"]["inputs"] > 0 and not found["npy"]["faults"]
    assert "inputs, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.0}, "seconds: expected a positive number"),
        ({"readers": ()}, "readers: expected at least one"),
        ({"readers": ("zip",)}, "readers: expected one of torch, pickle"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        fuzz.FuzzConfig(**options)
