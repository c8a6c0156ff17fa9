# Scores and a target to a plan and a smaller checkpoint.
rule prune:
    input:
        inputs_of,
    output:
        "results/prune/{label}/{key}/provenance.json",
    log:
        "logs/prune/{label}/{key}.log",
    localrule: runs_here("prune")
    resources:
        **of_step("prune"),
    params:
        request=request_of,
    shell:
        step_command("prune")
