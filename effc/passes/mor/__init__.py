"""The mor pass: layers folded into a recursion over fewer arrays, routed where asked, healed."""

from effc.passes.mor.mor import Mor

__all__ = ["Mor"]
