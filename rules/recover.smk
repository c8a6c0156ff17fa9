# Recovery of a pruned checkpoint; the adapter is the artefact. A killed run goes on from its last
# saved step.
rule recover:
    input:
        inputs_of,
    output:
        "results/recover/{label}/{key}/provenance.json",
    log:
        "logs/recover/{label}/{key}.log",
    threads: THREADS
    resources:
        **of_step("recover"),
    params:
        request=request_of,
    shell:
        step_command("recover")


# Asked for by `merge: true` in an experiment: the adapter added into the weights.
rule merge:
    input:
        inputs_of,
    output:
        "results/merge/{label}/{key}/provenance.json",
    log:
        "logs/merge/{label}/{key}.log",
    localrule: runs_here("merge")
    resources:
        **of_step("merge"),
    params:
        request=request_of,
    shell:
        step_command("merge")
