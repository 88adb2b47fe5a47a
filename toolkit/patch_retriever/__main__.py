"""`python -m patch_retriever`."""

from patch_retriever.cli import main

main()
