"""The token after the drafts that stand: drawn from what the drafter's distribution left of the target's."""
