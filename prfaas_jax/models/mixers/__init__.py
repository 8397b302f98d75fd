"""The mixers, by the kind of their config."""

from flax import nnx

from prfaas_jax.models.layer_config import AttentionConfig, GatedDeltaConfig, KdaConfig, LatentConfig, LightningConfig, MixerConfig
from prfaas_jax.models.mixers.attention import Attention
from prfaas_jax.models.mixers.delta import GatedDelta, KimiDelta
from prfaas_jax.models.mixers.latent import LatentAttention
from prfaas_jax.models.mixers.lightning import Lightning
from prfaas_jax.models.modules import Maker


def make_mixer(config: MixerConfig, make: Maker) -> nnx.Module:
    """The module that computes what `config` describes: `(x, place, step, carry) -> (branch, carry, new)`."""
    match config:
        case AttentionConfig():
            return Attention(config, make)
        case LatentConfig():
            return LatentAttention(config, make)
        case KdaConfig():
            return KimiDelta(config, make)
        case GatedDeltaConfig():
            return GatedDelta(config, make)
        case LightningConfig():
            return Lightning(config, make)
