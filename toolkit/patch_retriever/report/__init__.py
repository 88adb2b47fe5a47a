"""The table of a build and the card of an export."""
