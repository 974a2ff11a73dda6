"""Mixture-of-Memories models for Hugging Face's transformers, in the format of `fla.models.mom`.

Importing this package registers the models with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
`AutoModelForSequenceClassification`, so that these load FLA's folders too.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from mom_layers.hf.cache import MomCache
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.modeling_mom import MomForCausalLM, MomForSequenceClassification, MomModel
from mom_layers.hf.remote_code import save_remote_code

AutoConfig.register(MomConfig.model_type, MomConfig, exist_ok=True)
AutoModel.register(MomConfig, MomModel, exist_ok=True)
AutoModelForCausalLM.register(MomConfig, MomForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MomConfig, MomForSequenceClassification, exist_ok=True)

__all__ = ["MomCache", "MomConfig", "MomForCausalLM", "MomForSequenceClassification", "MomModel", "save_remote_code"]
