"""Plain Flax definitions for checkpoints that name a family but carry no code.

They are traced like anybody's module: full-sequence forward, unrolled layers, no cache.
"""

from effc.models.gemma import Gemma, GemmaConfig
from effc.models.gpt2 import Gpt2, Gpt2Config
from effc.models.llama import Llama, LlamaConfig
from effc.models.rope import Rope

__all__ = ["Gemma", "GemmaConfig", "Gpt2", "Gpt2Config", "Llama", "LlamaConfig", "Rope"]
