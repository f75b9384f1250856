"""`ResNetClassifier`: the residual network of a `ClassifierConfig`, invertible or not."""

from collections.abc import Callable

from flax import nnx

from resflow_jax.functional.checks import check_type
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector, Shape
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.logit import Logit
from resflow_jax.layers.networks import LipschitzCNN
from resflow_jax.layers.padding import ZeroPadding
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.layers.shapes import Squeeze
from resflow_jax.layers.unconstrained import StridedBlock, UnconstrainedBlock
from resflow_jax.models.bases import MixtureOfNormals
from resflow_jax.models.classifier import Classifier
from resflow_jax.models.classifier_config import ClassifierConfig
from resflow_jax.models.heads import PooledHead
from resflow_jax.models.image_values import OfUnitImages
from resflow_jax.models.recipe_checks import check_rngs
from resflow_jax.models.residual_flow import flow_from_config, made_bijector


class ResNetClassifier(OfUnitImages, Classifier):
    """The residual network of a `ClassifierConfig`: i-ResNet, the same without a bound, or a standard ResNet.

    Every block is preceded by an `ActNorm` and consists of convolutions 3x3, 1x1 and 3x3 with activations between them.
    The methods, their costs and errors are those of `Classifier`.

    Args:
      config: sizes and kind of the network.
      rngs: `rngs.params` draws the parameters.

    Randomness: as in `Classifier`. Cost: construction iterates each bounded convolution's norm to convergence.

    Raises:
      ValueError: for another config, and for rngs without a stream for parameters.

    Source: Behrmann et al. (2019, arXiv 1811.00995), section 4.1 and appendix.

    Example:
      >>> config = rf.ClassifierConfig((4, 4, 1), 3, blocks=(1, 1), hidden_channels=(4, 4), padding=1)
      >>> network = rf.ResNetClassifier(config, rngs=nnx.Rngs(0))
      >>> x = jax.random.uniform(jax.random.key(0), (8, 4, 4, 1))
      >>> network.initialize(x)
      >>> network.logits(x).shape, network(x).shape, bool(jnp.allclose(network.inverse(network(x)), x, atol=1e-4))
      ((8, 3), (8, 2, 2, 8), True)
    """

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        check_type("config", config, ClassifierConfig)
        check_rngs(rngs)
        bijector = made_bijector(config, _bijector, rngs)
        shape = bijector.output_shape(config.shape)
        if config.head == "mixture":
            base, head = MixtureOfNormals(config.classes, shape, rngs=rngs), None
        else:
            options = {"hidden": config.head_channels, "activation": config.activation}
            base, head = None, PooledHead(shape, config.classes, **options, rngs=rngs)
        super().__init__(bijector, head, base, event_shape=config.shape)
        self.config = config


@flow_from_config.register
def _(config: ClassifierConfig, *, rngs: nnx.Rngs) -> ResNetClassifier:
    return ResNetClassifier(config, rngs=rngs)


def _bijector(config: ClassifierConfig, rngs: nnx.Rngs) -> Chain:
    """f of a network, from images to features; no bijection with padding or without a bound."""
    layers: list[Bijector] = [] if config.logit_alpha is None else [Logit(config.logit_alpha)]
    stages = _standard if config.architecture == "standard" else _invertible
    return Chain(layers + stages(config, rngs))


def _invertible(config: ClassifierConfig, rngs: nnx.Rngs) -> list[Bijector]:
    shape, layers = config.shape, []
    if config.squeeze_first:
        layers.append(Squeeze(shape))
        shape = layers[-1].output_shape(shape)
    if config.padding:
        layers.append(ZeroPadding(config.padding))
        shape = *shape[:2], shape[-1] + config.padding
    for stage, (depth, hidden) in enumerate(zip(config.blocks, config.hidden_channels, strict=True)):
        if stage:
            layers.append(Squeeze(shape))
            shape = layers[-1].output_shape(shape)
        layers += _stage(config, shape, hidden, depth, is_first=not stage, rngs=rngs)
    return layers


def _standard(config: ClassifierConfig, rngs: nnx.Rngs) -> list[Bijector]:
    """Every stage begins with a block that changes the resolution or the number of channels."""
    shape, layers = config.shape, [ActNorm(config.shape[-1:])]
    sizes = zip(config.blocks, config.hidden_channels, config.channels, strict=True)
    for stage, (depth, hidden, channels) in enumerate(sizes):
        options = {"stride": 2 if stage or config.squeeze_first else 1, "activation": config.activation}
        layers.append(StridedBlock(shape, channels, hidden, preactivation=bool(stage), **options, rngs=rngs))
        shape = layers[-1].output_shape(shape)
        if depth > 1:
            layers += _stage(config, shape, hidden, depth - 1, is_first=False, rngs=rngs)
    return layers


def _stage(
    config: ClassifierConfig, shape: Shape, hidden: int, depth: int, *, is_first: bool, rngs: nnx.Rngs
) -> list[Bijector]:
    """`depth` blocks with an ActNorm before each; the very first block has no activation before it."""

    def step(preactivation: bool) -> Callable[[nnx.Rngs], Chain]:
        options = {"activation": config.activation, "preactivation": preactivation}

        def make(rngs: nnx.Rngs) -> Chain:
            if config.coefficient is None:
                block = UnconstrainedBlock(shape, hidden, **options, rngs=rngs)
            else:
                options_of_g = {"coefficient": config.coefficient, **options}
                block = ResidualBlock(LipschitzCNN(shape, (hidden, hidden), (3, 1, 3), **options_of_g, rngs=rngs))
            return Chain([ActNorm(shape[-1:]), block])

        return make

    if not is_first:
        return [ResidualStack(step(True), depth, rngs=rngs)]
    return [step(False)(rngs)] + ([ResidualStack(step(True), depth - 1, rngs=rngs)] if depth > 1 else [])
