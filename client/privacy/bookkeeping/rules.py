"""Which rule serves which layer. What has none is refused by name: no layer is silently left without clipping."""

from __future__ import annotations

from torch import nn

from medfl.client.privacy.bookkeeping.convolution import CONVOLUTIONS, ConvolutionRule, StandardisedConvolutionRule
from medfl.client.privacy.bookkeeping.linear import EmbeddingRule, LinearRule
from medfl.client.privacy.bookkeeping.normalisation import INSTANCE_NORMS, GroupNormRule, LayerNormRule, PReLURule
from medfl.client.privacy.bookkeeping.rule import Rule
from medfl.shared.errors import ConfigError
from medfl.shared.standardised import STANDARDISED

# Bare parameters of composite blocks that only ever meet the images by broadcasting over a leading axis of size one.
_BROADCAST = {"position_embeddings", "cls_token"}


def layers_with_rules(network: nn.Module) -> tuple[dict[nn.Module, Rule], list[tuple[nn.Module, str]]]:
    """Every layer with trainable parameters and its rule, and every broadcast parameter as (owner, name).

    Raises:
        ConfigError: naming the first layer that has no rule, with the way out.
    """
    rules: dict[nn.Module, Rule] = {}
    broadcast: list[tuple[nn.Module, str]] = []
    for name, module in network.named_modules():  # yields a module that is registered twice once only
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False):
            raise _no_rule(name, module, "it shares statistics between units")
        own = [key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        if not own:
            continue
        if set(own) <= _BROADCAST and all(module.get_parameter(key).shape[0] == 1 for key in own):
            broadcast.extend((module, key) for key in own)
        else:
            rules[module] = _rule_for(name, module)
    return rules, broadcast


def _rule_for(name: str, module: nn.Module) -> Rule:
    if "forward" in vars(module):
        raise _no_rule(name, module, "its forward was replaced")
    # The class that wrote forward: a subclass with its own (weight standardisation, LoRA) has another gradient.
    kind = next(k for k in type(module).__mro__ if "forward" in vars(k))
    if isinstance(module, CONVOLUTIONS) and kind in CONVOLUTIONS and _convolves_as(module, kind):
        return ConvolutionRule()
    if type(module) in STANDARDISED:
        return StandardisedConvolutionRule()
    match module:
        case nn.Linear() if kind is nn.Linear:
            return LinearRule()
        case nn.GroupNorm() if kind is nn.GroupNorm:
            return GroupNormRule()
        case nn.LayerNorm() if kind is nn.LayerNorm and module.weight is not None:
            return LayerNormRule()
        case nn.PReLU() if kind is nn.PReLU:
            return PReLURule()
        case nn.Embedding() if kind is nn.Embedding:
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                raise _no_rule(name, module, "max_norm, scale_grad_by_freq and sparse look across units")
            return EmbeddingRule()
    if isinstance(module, INSTANCE_NORMS) and kind is nn.modules.instancenorm._InstanceNorm:
        return GroupNormRule()
    raise _no_rule(name, module, "there is no per-unit gradient rule for it")


def _convolves_as(module: nn.Module, kind: type) -> bool:
    return getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)


def _no_rule(name: str, module: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"layer {name or '(the network itself)'} ({type(module).__name__}) cannot be trained in one private backward "
        f"pass, because {why}: set privacy.engine to loop, freeze the layer, or replace it"
    )
