# One method's importance scores; they serve every target.
rule scores:
    input:
        inputs_of,
    output:
        "results/scores/{label}/{key}/provenance.json",
    log:
        "logs/scores/{label}/{key}.log",
    localrule: runs_here("scores")
    resources:
        **of_step("scores"),
    params:
        request=request_of,
    shell:
        step_command("score")
