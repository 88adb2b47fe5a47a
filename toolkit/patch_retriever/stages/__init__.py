"""The stages of a build, each a function from finished inputs to files in a folder.

They can be called alone; `build` is all of them in their order: `readout`, `sae`, `features`,
`scoring`, `selection`, `evaluation` (collecting, exporting and the report are elsewhere).
"""
