"""The draft pass: drafters attached, trained where they need it, measured before they are used."""

from effc.passes.draft.attach import Draft

__all__ = ["Draft"]
