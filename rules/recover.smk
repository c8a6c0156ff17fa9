# Recovery of a pruned checkpoint; the adapter is the artefact. A killed run goes on from its last
# saved step.
rule recover:
    input:
        inputs_of,
    output:
        "results/recover/{label}/{key}/provenance.json",
    log:
        "logs/recover/{label}/{key}.log",
    threads: threads_of
    params:
        request=request_of,
    shell:
        f"{RUN}/recover.py --request {{params.request:q}} > {{log}} 2>&1"


# Asked for by `merge: true` in an experiment: the adapter added into the weights.
rule merge:
    input:
        inputs_of,
    output:
        "results/merge/{label}/{key}/provenance.json",
    log:
        "logs/merge/{label}/{key}.log",
    params:
        request=request_of,
    shell:
        f"{RUN}/merge.py --request {{params.request:q}} > {{log}} 2>&1"
