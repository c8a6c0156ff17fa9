# Scores and a target to a plan and a smaller checkpoint.
rule prune:
    input:
        inputs_of,
    output:
        "results/prune/{label}/{key}/provenance.json",
    log:
        "logs/prune/{label}/{key}.log",
    params:
        request=request_of,
    shell:
        f"{RUN}/prune.py --request {{params.request:q}} > {{log}} 2>&1"
