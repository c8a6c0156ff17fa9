# One method's importance scores; they serve every target.
rule scores:
    input:
        inputs_of,
    output:
        "results/scores/{label}/{key}/provenance.json",
    log:
        "logs/scores/{label}/{key}.log",
    params:
        request=request_of,
    shell:
        f"{RUN}/score.py --request {{params.request:q}} > {{log}} 2>&1"
