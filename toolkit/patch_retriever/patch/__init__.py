"""The patch: operators, fitting, methods, artefact, export."""
