"""The paper's figures and tables, and the curves it lacks, for any backbone and SAE."""
