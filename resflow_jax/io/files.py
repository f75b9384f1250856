"""`save` and `load`: a flow as one safetensors file, which can be read from any language.

The arrays are named by collection and path ("params.bijector.bijectors.0.shift"; see `io.variables`). The metadata are
strings:

    format           "resflow_jax"
    format_version   an integer, increased if earlier versions of this package cannot read the file
    version          version of this package
    config           for a flow of a config, such as `ResidualFlow` or `CouplingFlow`: its config as JSON
    structure        for another `Flow`: its layers and their arguments as JSON; see `io.structure`
    sha256           checksum of the arrays and of the other metadata; see `io.checksums`

A file whose checksum differs is damaged. Files without one are from earlier versions.
Nothing in a file is executed, and no name in it is imported. Files without a format version are from early development
versions; they can be read too (see `io.upgrades`). Files of version 1 have other names for some settings and arrays
(see `io.renames`).
"""

import json
from pathlib import Path
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from resflow_jax.functional.checks import check_path, check_type, error_text, names_text, shown
from resflow_jax.functional.trees import is_key
from resflow_jax.io.checksums import digest_of_arrays
from resflow_jax.io.config_json import config_from_json, config_to_json, parsed
from resflow_jax.io.renames import renamed_arguments, renamed_arrays
from resflow_jax.io.structure import UnknownClassError, build, describe, difference, number_of_layers
from resflow_jax.io.upgrades import is_old, upgraded
from resflow_jax.io.variables import OtherArraysError, Structure, flattened, split_variables
from resflow_jax.io.whole_files import whole_file
from resflow_jax.layers.lipschitz import deferred_norms
from resflow_jax.models.flow import Flow
from resflow_jax.models.least_arrays import abstract_flow, check_arrays
from resflow_jax.models.recipe import RecipeFlow
from resflow_jax.models.residual_flow import ResidualFlow, flow_from_config
from resflow_jax.models.resnet import ResNetClassifier

FORMAT = "resflow_jax"
FORMAT_VERSION = 2

_CHECKSUM = "sha256"
_SHARED = "; a file does not tell which layers share arrays"
_PARTS = ("bijector", "base", "head", "dequantizer")
_COMPOSED = "save rf.Flow(flow.bijector, flow.base, dequantizer=flow.dequantizer)"
_CLASSIFIER = "save rf.Classifier(flow.bijector, flow.head, flow.base)"
_REMEDY = "; rf.load(path, like=flow) takes the structure from your flow and only the arrays from the file"


def save(path: str | Path, flow: Flow) -> None:
    """Writes a flow to a file: all arrays in their dtypes, and the flow's config or structure.

    An existing file is replaced atomically, after all is written. The loaded flow gives the same outputs, bit for bit.
    No g is evaluated.

    Args:
      path: path of the file, usually with the suffix ".safetensors".
      flow: a `ResidualFlow`, or any `Flow` of layers. For a module of your own class, the file has its arrays and the
        name of the class; `load` then needs `like`.

    Raises:
      ValueError: if `flow` is not a `Flow`, has arrays of a dtype that safetensors files do not support or two of one
        name, or if parts of a flow of a config were replaced by parts with other classes, settings or arrays.
      OSError: if the file cannot be written; an existing file then stays as it was.

    Example:
      >>> flow = rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,)))
      >>> rf.save("flow.safetensors", flow)
      >>> x = jnp.ones((3, 2))
      >>> bool((rf.load("flow.safetensors").log_prob(x) == flow.log_prob(x)).all())
      True
    """
    check_path(path)
    check_type("flow", flow, Flow)
    arrays: dict[str, np.ndarray] = {}
    for path_of_array, array in flattened(split_variables(flow)):
        name = ".".join(path_of_array)
        if name in arrays:
            raise ValueError(f"flow: expected arrays of different names, got two of the name {name}")
        arrays[name] = _as_saved(name, array)
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "version": _version(), **_description(flow)}
    metadata[_CHECKSUM] = digest_of_arrays(arrays, metadata)
    with whole_file(path) as temporary:
        try:
            save_file(arrays, temporary, metadata=metadata)
        except SafetensorError as error:  # of the system, since the arrays have been checked
            raise OSError(f"path: could not write {path}: {error_text(error)}") from error


def load(path: str | Path, *, like: Flow | None = None) -> Flow:
    """Reads a flow that `save` wrote, with the dtypes of the file (float64 becomes float32 unless JAX enables it).

    It runs no power iteration and draws no random parameters.

    Args:
      path: path of the file.
      like: a flow with the same structure, which is not changed. It is needed for flows with classes of other packages,
        such as the module of `ResidualBlock(module, lipschitz=)`, and for flows that use a layer twice. The structure
        is then that of `like`, and the arrays are those of the file. None takes the structure from the file.

    Returns:
      A `ResidualFlow`, another `Flow`, or a flow of the class of `like`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, not of this package, or of a newer format; if it names a class of another
        package and there is no `like`; if its arrays do not fit the structure; or if `like` differs from the structure
        in the file. The message names the file and the problem.

    Example:
      >>> flow = rf.Flow(rf.Chain([rf.ActNorm((2,)), rf.Permutation((1, 0))]), rf.StandardNormal((2,)))
      >>> rf.save("flow.safetensors", flow)
      >>> type(rf.load("flow.safetensors").bijector).__name__
      'Chain'
    """
    if like is not None:
        check_type("like", like, Flow)
    check_path(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a file of safetensors, got {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a file of safetensors, could not read it: {error_text(error)}") from error
    try:
        _check_format(metadata)
        _check_undamaged(arrays, metadata)
        structure = _structure(metadata, len(arrays)) if like is None else _structure_of(like, metadata)
        return _filled(structure, arrays)
    except UnknownClassError as error:
        raise ValueError(f"{path}: {error_text(error)}{_REMEDY}") from error
    except OtherArraysError as error:
        remedy = _SHARED + _REMEDY if like is None and "structure" in metadata else ""
        raise ValueError(f"{path}: {error_text(error)}{remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error_text(error)}") from error


def _description(flow: Flow) -> dict[str, str]:
    """The config or the structure of a flow, as metadata."""
    if isinstance(flow, ResidualFlow | RecipeFlow | ResNetClassifier) and _is_of_package(flow):
        _check_is_of_config(flow)
    if _is_of_config(flow):
        return {"config": config_to_json(flow.config)}
    return {"structure": json.dumps(describe(flow), allow_nan=False)}


def _is_of_config(flow: Flow) -> bool:
    """Whether the config describes the flow completely. It does not for a user's subclass."""
    return isinstance(flow, ResidualFlow | RecipeFlow) and _is_of_package(flow)


def _is_of_package(flow: Flow) -> bool:
    return type(flow).__module__.startswith(f"{FORMAT}.")


def _check_is_of_config(flow: Flow) -> None:
    """Raises ValueError if parts of a flow were replaced or set anew, so that its config does not describe them."""
    leaves = Structure.of(flow).leaves
    expected = abstract_flow(flow.config, len(leaves))
    remedy = _CLASSIFIER if isinstance(flow, ResNetClassifier) else _COMPOSED
    for what in _PARTS:
        found, wanted = (_modules(getattr(f, what, None)) for f in (flow, expected))
        text = f"flow: expected the {what} that its config describes, got one with"
        if [type(module) for module in found] != [type(module) for module in wanted]:
            raise ValueError(f"{text} other parts; {remedy}")
        for module, like in zip(found, wanted, strict=True):
            own, given = _settings(module), _settings(like)
            if unlike := [name for name in {**own, **given} if name not in own or not _same(own, given, name)]:
                raise ValueError(f"{text} another {unlike[0]} of {type(module).__name__}; {remedy}")
    found, wanted = ({path: leaf.shape for path, leaf in of.items()} for of in (leaves, Structure.of(expected).leaves))
    if found != wanted:
        unlike = names_text(sorted("/".join(path) for path in found.keys() ^ wanted.keys()) or ["shapes"])
        raise ValueError(f"flow: expected the arrays that its config describes, got others: {unlike}; {remedy}")


def _modules(part: Any) -> list[nnx.Module]:
    """A part of a flow and all modules in it; none for None."""
    return [] if part is None else [module for _, module in nnx.iter_modules(part)]


def _settings(module: nnx.Module) -> dict[str, Any]:
    """The attributes of a module that are neither arrays nor modules, nor dtypes, which arrays have themselves."""
    kinds = nnx.Module | nnx.Variable | jax.Array | jax.ShapeDtypeStruct | np.dtype
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: value for name, value in public.items() if name != "reversible" and not isinstance(value, kinds)}


def _same(own: dict[str, Any], given: dict[str, Any], name: str) -> bool:
    """Whether two modules have the same setting. Functions that a constructor makes anew are taken for the same."""
    values = own[name], given.get(name)
    if any(isinstance(value, FunctionType) for value in values):
        return True
    return bool(np.array_equal(*values)) if isinstance(values[0], np.ndarray) else values[0] == values[1]


def _check_format(metadata: dict[str, str]) -> None:
    """Raises ValueError unless this version of the package can read a file with these metadata."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r} in the metadata, got {shown(metadata.get('format'))}")
    text = metadata.get("format_version", "0")
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"format_version: expected an integer, got {shown(text)}")
    if int(text) > FORMAT_VERSION:
        raise ValueError(
            f"format_version: expected at most {FORMAT_VERSION}, which version {_version()} of resflow_jax reads, got "
            f"{text}, written by version {names_text([metadata.get('version', 'None')])}"
        )


def _check_undamaged(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Raises ValueError if the arrays or the metadata are not those that were saved; files without a checksum pass."""
    rest = {name: text for name, text in metadata.items() if name != _CHECKSUM}
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != digest_of_arrays(arrays, rest):
        raise ValueError(
            "expected the arrays and metadata that were saved, got others: their SHA-256 differs from that in the "
            "metadata. The file is damaged, or was changed by another program"
        )


def _structure(metadata: dict[str, str], arrays: int) -> Structure:
    """The structure of the flow that the metadata describe, in a file with this number of arrays."""
    if "config" in metadata:
        config = config_from_json(metadata["config"])
        check_arrays(config, arrays)
        with deferred_norms():
            return Structure.made_by(lambda: flow_from_config(config, rngs=nnx.Rngs(0)))
    description = _parsed(metadata)
    if description is None:
        names = shown(sorted(metadata))
        raise ValueError(f"expected the config or the structure of a flow in the metadata, got {names}")
    if (layers := number_of_layers(description)) > (most := 8 * arrays + 1000):
        raise ValueError(f"structure: expected at most {most} layers for {arrays} arrays, got {layers}")

    def make() -> Flow:
        with deferred_norms():
            flow = build(description, nnx.Rngs(0))
        check_type("structure", flow, Flow)
        return flow

    try:
        return Structure.made_by(make)
    except RecursionError as error:
        raise ValueError("structure: expected layers nested as deep as Python can call, got more") from error
    except OverflowError as error:
        raise ValueError(f"structure: expected arrays of sizes within 64 bits, got others: {error}") from error


def _structure_of(like: Flow, metadata: dict[str, str]) -> Structure:
    """The structure of the flow `like`; ValueError if it differs from the metadata."""
    kind = "config" if _is_of_config(like) else "structure"
    said = metadata.get(kind)
    if said is None:
        raise ValueError(
            f"like: expected a flow like that of the file, got {type(like).__name__}, for which the "
            f"metadata have no {kind}"
        )
    if kind == "config":
        of_file = json.loads(config_to_json(config_from_json(said)))
        unlike = difference(of_file, json.loads(config_to_json(like.config)))
    else:
        unlike = difference(_parsed(metadata), describe(like))
    if unlike is not None:
        raise ValueError(f"like: expected a flow like that of the file, got another: {unlike}")
    return Structure.of(like)


def _parsed(metadata: dict[str, str]) -> Any:
    """The structure in the metadata, or None."""
    try:
        return renamed_arguments(parsed(metadata["structure"])) if "structure" in metadata else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"structure: expected JSON, got {shown(metadata['structure'])}: {error}") from error


def _filled(structure: Structure, arrays: dict[str, np.ndarray]) -> Flow:
    """The flow with the arrays of a file, by their names."""
    paths = {".".join(path): path for path in structure.leaves}  # a name may have a point itself
    by_path = {paths.get(name, tuple(name.split("."))): array for name, array in arrays.items()}
    if is_old(path[1:] for path in by_path):
        by_path = upgraded(structure.leaves, by_path)
    by_path = renamed_arrays(structure.leaves, by_path)
    loaded = {}
    for path, leaf in structure.leaves.items():
        if path in by_path:
            loaded[path] = _as_loaded(by_path.pop(path), leaf)
    return structure.filled({**loaded, **by_path})


def _as_saved(name: str, array: jax.Array) -> np.ndarray:
    """Converts an array for safetensors: to C order, and a PRNG key to its data."""
    if is_key(array):
        array = jax.random.key_data(array)
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"flow: expected arrays of a dtype among {', '.join(_DTYPES)}; got {array.dtype} of {name}")
    return np.array(array, order="C")


def _as_loaded(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> Any:
    """Converts an array back to the form before `_as_saved`."""
    if not is_key(leaf):
        return array
    return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))


_DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "bool"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
)


def _version() -> str:
    import resflow_jax

    return resflow_jax.__version__
