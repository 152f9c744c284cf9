"""Prove that a merged checkpoint is its base plus its adapters and nothing else, bit for bit.

The oracle works on its own: it reads files by itself, after safetensors' own reader found them sound, and derives the
expected cells a second time in torch. It shares no code with what it judges, so that a mistake there cannot hide here.
Where tasks were added to the dequantised base, it quantises every matrix anew through bitsandbytes' own layers; "the
base" is then the dequantised one.
"""

from .proof import Proof, TaskProof
from .prove import verify

__all__ = ["Proof", "TaskProof", "verify"]
