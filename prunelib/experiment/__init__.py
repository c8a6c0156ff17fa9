"""From an experiment file to the steps that it needs: validation, cells, content keys.

Used by the Snakefile, and importable without Snakemake and without torch.
"""
