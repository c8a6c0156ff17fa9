"""The benchmark: an experiment file to a report, by content-keyed steps."""

from snakemake.utils import min_version

min_version("9.0")


configfile: f"{workflow.basedir}/config/config.yaml"


include: "rules/common.smk"
include: "rules/keys.smk"
include: "rules/cluster.smk"
include: "rules/fetch.smk"
include: "rules/calibration.smk"
include: "rules/statistics.smk"
include: "rules/scores.smk"
include: "rules/prune.smk"
include: "rules/recover.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"


localrules:
    all,
    report,


rule all:
    default_target: True
    input:
        # A function: jobs on a cluster read this file too, and have no use for it.
        lambda wildcards: [
            str(stamp := report_stamp(EXPERIMENT)),
            # The report asks for its cells when it is made; one that stands makes no lost artefact.
            *(node.target for node in TERMINAL if stamp.exists()),
            *BROKEN.values(),
        ],
