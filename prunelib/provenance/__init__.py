"""Content keys, code fingerprints, provenance records and the protocol that commits artefacts.

Nothing here changes a number that a step computes, so these modules are not part of any
fingerprint. Nothing here imports torch: the workflow reads it while it builds the DAG.
"""
