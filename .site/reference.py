"""The pages of the reference: every public name of the library, by topic.

`TOPICS` has the names of `resflow_jax.__all__`, each once; `MODULES` those of the public modules. A test compares them
with the library, so that a new public name has to find its place here.
"""

import inspect
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin

if TYPE_CHECKING:
    from docutils.nodes import Element

LIBRARY = "resflow_jax"


class Topic(NamedTuple):
    """One page: its title, a sentence, and names between spaces."""

    title: str
    text: str
    names: str


TOPICS = {
    "flows": Topic(
        "Flows",
        "A flow is a bijector and a base. ``ResidualFlow`` makes one from a config; ``Flow`` takes any parts.",
        (
            "Flow ResidualFlow ImageFlowConfig VectorFlowConfig ImageTransform VectorTransform Padding BetweenBlocks "
            "Norms DenseTail DenseNetBlocks Scales"
        ),
    ),
    "fitting": Topic(
        "Fitting and evaluation",
        "A density of given examples in one call, and the likelihood of others.",
        (
            "fit FitResult FitProgress History FitDivergedError evaluate_bits_per_dim Estimate anomaly_score Anomaly "
            "Typicality use_cpu_flags"
        ),
    ),
    "bijectors": Topic(
        "Bijectors",
        "Invertible layers, and their compositions.",
        (
            "Bijector Chain Invert MultiScale ResidualBlock MonotoneBlock ImplicitBlock ResidualStack make_reversible "
            "ActNorm Affine InvertibleLinear Normalization MovingBatchNorm MovingCentering Logit Bounded Exp Softplus "
            "Spline Squeeze Flatten Reshape Permutation ChannelPadding Constant"
        ),
    ),
    "couplings": Topic(
        "Coupling, autoregressive and continuous flows",
        "Layers without a Lipschitz bound, the networks inside, and flows of the papers from their configs.",
        (
            "Coupling AdditiveCoupling AffineCoupling SplineCoupling MixtureCoupling MLPConditioner CNNConditioner "
            "ResNetConditioner MaskedAutoregressive ContinuousBlock VelocityField CouplingFlow CouplingFlowConfig "
            "CouplingScales AutoregressiveFlow AutoregressiveFlowConfig ContinuousFlow ContinuousFlowConfig "
            "VariationalDequantization Dequantization"
        ),
    ),
    "contractions": Topic(
        "Contractions",
        "Networks g with a Lipschitz constant below 1, and the layers that they are made of.",
        (
            "Contraction LipschitzMLP LipschitzCNN DenseNet LipschitzDense LipschitzConv NormState ACTIVATIONS "
            "Activation check_contraction ContractionCheck"
        ),
    ),
    "bases": Topic(
        "Bases",
        "Distributions of z.",
        "Base StandardNormal DiagonalNormal MixtureOfNormals",
    ),
    "classifiers": Topic(
        "Classifiers",
        "Flows that also give classes, the residual networks that they are compared with, and certified radii.",
        (
            "Classifier ResNetClassifier ClassifierConfig PooledHead ZeroPadding UnconstrainedBlock StridedBlock "
            "certified_radius"
        ),
    ),
    "estimators": Topic(
        "Estimators",
        "How the log-determinant of a residual block is found, and the laws of the lengths of a roulette.",
        (
            "Estimator Exact Truncated Roulette CustomEstimator Diagnostics LengthLaw Defensive Geometric Poisson "
            "Fitted fit_lengths"
        ),
    ),
    "inverse": Topic(
        "The inverse",
        "Solvers of x + g(x) = y, and what they report.",
        "Solver Anderson Broyden FixedPoint InverseStatus InverseError",
    ),
    "certificates": Topic(
        "Certificates and norms",
        "Upper bounds on Lipschitz constants, and the norms of linear maps.",
        (
            "certify Certificate BlockCertificate LayerCertificate spectral_norm_bound induced_norm_bound "
            "gram_iteration_bound spectral_norm power_iteration best_start PowerIteration PowerIterationStatus "
            "ConvMap DenseMap"
        ),
    ),
    "functional": Topic(
        "Pure functions",
        "Residual blocks of any function of parameters and a batch; no module of Flax is needed.",
        "residual residual_inverse monotone monotone_inverse batch_axes",
    ),
    "files": Topic(
        "Files",
        "Flows in files, of this library and of the PyTorch implementation.",
        "save load save_torch_checkpoint load_torch_checkpoint",
    ),
}

MODULES = {
    "training": Topic(
        "Training",
        "One pure training step, its state, and the devices on which it runs.",
        (
            "Trainer TrainState Placement make_mesh jit_train_step shard_map_train_step pmap_train_step replicate "
            "unreplicate fit_estimator"
        ),
    ),
    "plot": Topic(
        "Pictures", "", "samples density curves image_grid box_around density_on_grid grid_midpoints as_shown"
    ),
    "interop.distrax": Topic("interop.distrax", "", "bijector FlowBijector base"),
    "interop.numpyro": Topic("interop.numpyro", "", "FlowDistribution FlowTransform flow_module base"),
    "interop.flowjax": Topic("interop.flowjax", "", "FlowBijection ResidualBijection contractive"),
    "interop.stateless": Topic("interop.stateless", "", "stateless Stateless methods_of"),
}


def write(folder: Path) -> None:
    """Writes one page a topic and one a module."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, topic in TOPICS.items():
        (folder / f"{name}.rst").write_text(page(LIBRARY, topic))
    for name, topic in MODULES.items():
        (folder / f"{name}.rst").write_text(page(f"{LIBRARY}.{name}", topic))


def page(module: str, topic: Topic) -> str:
    """A page in reST: a table of the names, then the docstring of each."""
    head = [topic.title, "=" * len(topic.title), "", f".. currentmodule:: {module}", ""]
    head += [topic.text] if topic.text else [f".. automodule:: {module}"]
    values = {name: getattr(import_module(module), name) for name in topic.names.split()}
    objects = [name for name, value in values.items() if callable(value) and not _is_union(value)]
    table = ["", ".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in objects), ""]
    return "\n".join([*head, *table, *(line for item in values.items() for line in entry(*item))])


def entry(name: str, value: Any) -> list[str]:
    """The directive that documents one name."""
    if inspect.isclass(value):
        public = import_module(LIBRARY).__all__
        options = ["   :members:", f"   :inherited-members: {', '.join(_documented_elsewhere(value, public))}"]
        options += ["   :show-inheritance:"] * any(base.__name__ in public for base in value.__bases__)
        return [f".. autoclass:: {name}", *options, ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: {name}", ""]
    if _is_union(value):
        text = f"Any of {', '.join(f':py:obj:`{part.__name__}`' for part in get_args(value))}."
    else:
        text = f"A dict with the keys {', '.join(f'``{key}``' for key in value)}."
    return [f".. py:data:: {name}", "", f"   {text}", ""]


def _documented_elsewhere(cls: type, public: list[str]) -> list[str]:
    """Bases whose members the entry of a class leaves out: public ones, which have their own, and other libraries'."""
    own = (base for base in cls.__mro__[1:] if base.__module__.startswith(LIBRARY) and base.__name__ != "Module")
    private = {base for base in own if base.__name__ not in public}
    return [base.__name__ for base in cls.__mro__[1:] if base not in private]


def _is_union(value: Any) -> bool:
    return isinstance(value, UnionType) or get_origin(value) is Union


def resolve(app: Any, env: Any, node: "Element", contnode: "Element") -> "Element | None":
    """For the event missing-reference: a name by the module that defines it, or alone, is that of its page."""
    if node.get("refdomain") != "py":
        return None
    parts = node["reftarget"].split(".")
    python = env.get_domain("py")
    for prefix in (LIBRARY, *(f"{LIBRARY}.{name}" for name in MODULES)):
        for size in (1, 2):  # Flow, Flow.forward
            target = ".".join([prefix, *parts[-size:]])
            if target in python.objects:
                options = env, node["refdoc"], app.builder, "obj", target, node, contnode
                return python.resolve_xref(*options)
    return None
